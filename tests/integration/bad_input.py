"""The table of bad input: what a stranger may feed in, and what must be said of it.

Each kind spoils a place that holds a good experiment on a small model directory. `KINDS` are all of
them; whoever finds another adds a line.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from flows.command.checks import check_comparison
from flows.command.parameters import read_parameters
from memit.files.digests import file_sha256
from memit.second_moment import import_published
from memit.weight_delta import WeightDelta

FACT = {"subject": "Ada", "prompt": "{} lives in", "target": "Rome", "target_true": "Oslo"}
RECORD = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "{} lives in",
        "relation_id": "P1",
        "target_new": {"str": "Rome", "id": "Q1"},
        "target_true": {"str": "Oslo", "id": "Q2"},
        "subject": "Ada",
    },
    "paraphrase_prompts": ["The home of Ada is"],
    "neighborhood_prompts": ["Carl lives in"],
    "generation_prompts": ["Ada says"],
}
QUESTION = {
    "subject": "Ada",
    "src": "Where does Ada live?",
    "rephrase": "Where is Ada's home?",
    "answers": ["Rome"],
    "loc": "nq question: where is Oslo",
    "loc_ans": "Norway",
}
MOMENTS = [f"transformer.h.{layer}.mlp.c_proj_float32_mom2_9.npz" for layer in range(3)]
"""Names of published second moments."""
GOOD: dict[str, dict[str, Any]] = {
    "model": {"source": "local", "path": "model"},
    "requests": {"source": "facts", "path": "facts.jsonl", "count": None},
    "statistics": {"source": "file", "path": "corpus.txt"},
    "edit": {"layers": [1, 2]},
    "compare": {"methods": ["unedited", "memit"], "count": None, "training_records": 0},
}

Spoil = Callable[[], object]
"""Spoils the place, which is the working directory."""


@dataclass(frozen=True)
class Kind:
    """One kind of bad input."""

    name: str
    spoil: Spoil
    sentence: str
    """Part of what must be said."""
    read: Callable[[], object] | None = None
    """What reads it, where that is not the check of an experiment."""


# --- ways to spoil ------------------------------------------------------------------------------


def setting(**sections: Any) -> Spoil:
    """Other values in params.yaml."""

    def spoil() -> None:
        tree = yaml.safe_load(Path("params.yaml").read_text())
        for name, values in sections.items():
            if isinstance(values, dict) and isinstance(tree.get(name), dict):
                tree[name] = {**tree[name], **values}
            else:
                tree[name] = values
        Path("params.yaml").write_text(yaml.safe_dump(tree))

    return spoil


def parameters(content: str | bytes) -> Spoil:
    """Another params.yaml altogether."""
    data = content.encode() if isinstance(content, str) else content
    return lambda: Path("params.yaml").write_bytes(data)


def after(*spoils: Spoil) -> Spoil:
    """One after another."""
    return lambda: [spoil() for spoil in spoils]


def file(name: str, content: str | bytes) -> Spoil:
    """A file with some content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda: Path(name).write_bytes(data)


def facts(content: str | bytes) -> Spoil:
    """Another file of facts."""
    return file("facts.jsonl", content)


def fact(**changes: Any) -> Spoil:
    """One fact, changed; None takes a key away."""
    row = {key: value for key, value in {**FACT, **changes}.items() if value is not None}
    return facts(json.dumps(row))


def records(content: object) -> Spoil:
    """A CounterFact file."""
    text = content if isinstance(content, str) else json.dumps(content)
    return after(
        file("records.json", text),
        setting(requests={"source": "counterfact", "path": "records.json"}),
    )


def record(**changes: Any) -> Spoil:
    """One CounterFact record, changed."""
    return records([{**RECORD, **changes}])


def rewrite(**changes: Any) -> Spoil:
    """One CounterFact record with another rewrite."""
    return record(requested_rewrite={**RECORD["requested_rewrite"], **changes})


def corpus(name: str, content: str | bytes) -> Spoil:
    """Another corpus."""
    return after(file(name, content), setting(statistics={"path": name}))


def parquet(**columns: Any) -> Spoil:
    """A Parquet corpus."""

    def spoil() -> None:
        pq.write_table(pa.table(columns), "corpus.parquet")
        setting(statistics={"path": "corpus.parquet"})()

    return spoil


def cut(name: str, share: float = 0.5) -> Spoil:
    """A file without its end."""
    return lambda: os.truncate(name, int(os.path.getsize(name) * share))


def configuration(**changes: Any) -> Spoil:
    """Other values in the model's config.json."""

    def spoil() -> None:
        path = Path("model/config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Spoil:
    """Other tensors in the model's weights."""
    path = "model/model.safetensors"
    return lambda: save_file(change(load_file(path)), path, {"format": "pt"})


def zsre(content: object) -> Spoil:
    """A file of questions to compare on."""
    text = content if isinstance(content, str) else json.dumps(content)
    return after(file("zsre.json", text), setting(compare={"zsre": "zsre.json"}))


def snippets(content: object) -> Spoil:
    """A file of snippets to compare with."""
    text = content if isinstance(content, str) else json.dumps(content)
    return after(file("snippets.json", text), setting(evaluation={"snippets": "snippets.json"}))


def published_files(*names: str, **others: Any) -> Spoil:
    """Statistics of others in place of a corpus, in files with these names."""

    def spoil() -> None:
        Path("moments").mkdir()
        for name in names:
            Path("moments", name).write_bytes(b"")
        setting(statistics={"source": "published", "path": "moments"}, **others)()

    return spoil


def npz(**arrays: Any) -> Spoil:
    """Published second moments."""
    return lambda: np.savez(
        "moments.npz", **{name.replace("_", "."): a for name, a in arrays.items()}
    )


def instead(name: str, make: Callable[[str], object]) -> Spoil:
    """Something else in place of a file."""
    return lambda: (Path(name).unlink(), make(name))


def zipped() -> bytes:
    """A zip file with facts in it."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("facts.jsonl", json.dumps(FACT))
    return target.getvalue()


def absent_shards() -> None:
    """A model directory whose index names a file that is not there."""
    Path("model/model.safetensors").unlink()
    index = '{"weight_map": {"a": "part-2.safetensors"}}'
    Path("model/model.safetensors.index.json").write_text(index)


class Malicious:
    """Unpickling it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What a pickle would run."""
        return (os.mkdir, ("pwned",))


def only_a_pickle() -> None:
    """A model directory whose weights are a pickle that would run something."""
    Path("model/model.safetensors").unlink()
    torch.save({"weight": Malicious()}, "model/pytorch_model.bin")


def no_tokenizer() -> None:
    """A model directory without its tokenizer."""
    Path("model/tokenizer.json").unlink()
    Path("model/tokenizer_config.json").unlink()


def only_an_adapter() -> None:
    """An adapter without the model that it is for."""
    shutil.rmtree("model")
    Path("model").mkdir()
    Path("model/adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.ones(1)}, "model/adapter_model.safetensors")


def a_floor_too_high() -> None:
    """A folder of the hub's cache in place of the snapshot in it."""
    shutil.move("model", "abc")
    Path("model/snapshots").mkdir(parents=True)
    shutil.move("abc", "model/snapshots")


def experts(model_type: str, **settings: Any) -> Spoil:
    """A model whose blocks choose among experts."""

    def spoil() -> None:
        config = AutoConfig.for_model(
            model_type,
            vocab_size=512,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            **settings,
        )
        config.save_pretrained("model")

    return spoil


def code_of_its_own() -> None:
    """A model directory that wants its own code to be run."""
    configuration(
        model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    )()
    Path("model/code.py").write_text("import os\nos.mkdir('pwned')\n")


def laughs() -> str:
    """YAML that would take a billion places in memory."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(lines)


def published() -> object:
    """Read the published second moments."""
    return import_published(Path("moments.npz"), 3)


def compared() -> object:
    """What a comparison does before it begins."""
    return check_comparison(read_parameters())


def delta() -> object:
    """Read an edit."""
    return WeightDelta.load(Path("delta.safetensors"))


LINE = json.dumps(FACT)
EYE = np.eye(3)
LONG = "x" * 5_000

REQUESTS = [
    Kind("no file of facts", lambda: Path("facts.jsonl").unlink(), "facts.jsonl does not exist"),
    Kind("an empty file", facts(""), "holds no records"),
    Kind("nothing but white space", facts(" \n\n\t\n"), "holds no records"),
    Kind("a directory in place of a file", instead("facts.jsonl", os.mkdir), "is a directory"),
    Kind("a pipe", instead("facts.jsonl", os.mkfifo), "is a pipe or a device"),
    Kind("a device", setting(requests={"path": "/dev/zero"}), "is a pipe or a device"),
    Kind("a terminal", setting(requests={"path": "/dev/tty"}), "/dev/tty"),
    Kind("a loop of links", instead("facts.jsonl", lambda n: os.symlink(n, n)), "cannot be read"),
    Kind("a link to nothing", instead("facts.jsonl", lambda n: os.symlink("gone", n)), "not exist"),
    Kind("a name of 5000 letters", setting(requests={"path": LONG}), "at most 4096"),
    Kind("a name too long for a disk", setting(requests={"path": "x" * 999}), "name too long"),
    Kind("a file as a directory", setting(requests={"path": "facts.jsonl/x"}), "cannot be read"),
    Kind("a name with NUL", setting(requests={"path": "a\0b"}), "requests.path is"),
    Kind("more than is ever read", lambda: os.truncate("facts.jsonl", 1 << 31), "more than the"),
    Kind("Latin-1", facts('{"subject": "Zoë"}'.encode("latin-1")), "is not UTF-8"),
    Kind("UTF-16", facts(LINE.encode("utf-16")), "is not UTF-8"),
    Kind("UTF-32 without a mark", facts(LINE.encode("utf-32-le")), "facts.jsonl"),
    Kind("NUL bytes", facts(LINE + "\0"), "facts.jsonl"),
    Kind("gzip", facts(gzip.compress(LINE.encode())), "unpack it"),
    Kind("zip", facts(zipped()), "facts.jsonl is no"),
    Kind("random bytes", facts(bytes(range(256))), "is not UTF-8"),
    Kind("HTML", facts("<!DOCTYPE html>\n<html><body>404</body></html>"), "not known"),
    Kind("JSON without its end", facts(LINE[:30]), "not whole JSON"),
    Kind("two objects on a line", facts(LINE + LINE), "Extra data"),
    Kind("a comma at a line's end", facts(LINE + ",\n" + LINE), "line 1 is not whole JSON"),
    Kind("single quotes", facts(str(FACT)), "not whole JSON"),
    Kind("a comma too many", facts(LINE[:-1] + ",}"), "line 1 is not whole JSON"),
    Kind("NaN", facts(LINE.replace('"Rome"', "NaN")), "'target' is the number nan"),
    Kind("-Infinity", facts(LINE.replace('"Rome"', "-Infinity")), "'target' is the number -inf"),
    Kind("a number without end", facts('{"subject": ' + "9" * 5_000 + "}"), "is not whole JSON"),
    Kind("nesting without end", facts("[" * 100_000), "is not whole JSON"),
    Kind("nested objects", facts('{"a":' * 100_000), "is not whole JSON"),
    Kind("a list of numbers", facts("[1, 2]"), "where a JSON object is needed"),
    Kind("a number alone", facts("17"), "not known"),
    Kind("null in a list", facts("[null]"), "is nothing where a JSON object"),
    Kind("an unknown key", fact(targte="x"), "'targte' is not known"),
    Kind("no subject", fact(subject=None), "'subject' is missing"),
    Kind("no prompt", fact(prompt=None), "'prompt' is missing"),
    Kind("no target", fact(target=None), "'target' is missing"),
    Kind("an empty subject", fact(subject=""), "subject is empty"),
    Kind("a subject of spaces", fact(subject=" \u3000 "), "subject is empty"),
    Kind("an empty object", fact(target="  "), "new object is empty"),
    Kind("an empty true object", fact(target_true=" "), "true object is empty"),
    Kind("an object that is the true one", fact(target_true="Rome"), "is the true one"),
    Kind("a prompt without {}", fact(prompt="she lives in"), "has 0 '{}'"),
    Kind("a prompt with two {}", fact(prompt="{} and {}"), "has 2 '{}'"),
    Kind("a prompt with {0}", fact(prompt="{0} lives in"), "has 0 '{}'"),
    Kind("a number for the subject", fact(subject=7), "'subject' is the number 7"),
    Kind("a list for the prompt", fact(prompt=["{}"]), "'prompt' is a list"),
    Kind("an object for the target", fact(target={"str": "x"}), "'target' is an object"),
    Kind("true for the target", fact(target=True), "'target' is true or false"),
    Kind("a text for paraphrases", fact(paraphrases="one"), "'paraphrases' is a text"),
    Kind("a number among neighbors", fact(neighbors=["a", 3]), "'neighbors' is the number 3"),
    Kind("an empty paraphrase", fact(paraphrases=["a", " "]), "holds an empty prompt"),
    Kind("half a surrogate pair", fact(subject="\ud800"), "control character '\\ud800'"),
    Kind("an escape character", fact(subject="A\x1b[31mda"), "control character '\\x1b'"),
    Kind("an escaped NUL", fact(target="Ro\0me"), "control character '\\x00'"),
    Kind("a backspace in a prompt", fact(prompt="{} liv\b in"), "control character '\\x08'"),
    Kind("a subject of a novel's length", fact(subject="Ada " * 5_000), "shorten or remove it"),
    Kind("a prompt over the context", fact(prompt="{} " + "and so " * 999), "shorten or remove it"),
    Kind("a paraphrase over the context", fact(paraphrases=["ab " * 300]), "the paraphrase prompt"),
    Kind("a neighbor over the context", fact(neighbors=["ab " * 300]), "the neighborhood prompt"),
    Kind("no room for a prefix", fact(prompt="{} " + "q" * 180 + " in"), "the prefixed prompt"),
    Kind(
        "CounterFact: a generation prompt over the context",
        record(generation_prompts=["q" * 193]),
        "the generation prompt of record 0",
    ),
    Kind("contradicting facts", facts(LINE + "\n" + LINE.replace("Rome", "Bonn")), "contradict"),
    Kind("CSV: an unknown column", facts("subject,prompt,target,x\na,{} is,b,c\n"), "column 'x'"),
    Kind("CSV: no header", facts("Ada,{} lives in,Rome\n"), "column 'Ada'"),
    Kind("CSV: a column twice", facts("subject,prompt,target,target\na,{} is,b,c\n"), "twice"),
    Kind("CSV: semicolons", facts("subject;prompt;target\nAda;{} is;b\n"), "separated by commas"),
    Kind("CSV: a cell too few", facts("subject,prompt,target\nAda,{} is\n"), "number of fields"),
    Kind("CSV: a cell too many", facts("subject,prompt,target\na,{} is,b,c\n"), "number of fields"),
    Kind("CSV: an open quote", facts('subject,prompt,target\nAda,{} is,"b\n'), "is not CSV"),
    Kind("CSV: a header alone", facts("subject,prompt,target\n"), "holds no records"),
    Kind("CSV: a huge cell", facts("subject,prompt,target\na,{}," + "x" * 200_000), "not CSV"),
    Kind("more than there are", setting(requests={"count": 2}), "count is 2"),
    Kind("another checksum", setting(requests={"sha256": "0" * 64}), "has the sha256"),
    Kind("CounterFact: an object", records(RECORD), "holds no list of records"),
    Kind("CounterFact: an empty list", records([]), "holds no records"),
    Kind("CounterFact: cut off", records(json.dumps([RECORD])[:-40]), "not whole JSON"),
    Kind("CounterFact: facts instead", records([FACT]), "to facts for your own"),
    Kind("CounterFact: questions", records([QUESTION]), "compare.zsre"),
    Kind("facts: CounterFact instead", facts(json.dumps([RECORD])), "source to counterfact"),
    Kind("facts: questions", facts(json.dumps([QUESTION])), "compare.zsre"),
    Kind(
        "facts: another program's keys",
        fact(target_new="Rome", rephrase_prompt="x"),
        "'target_new' (here 'target'), 'rephrase_prompt' (here 'paraphrases') is not known",
    ),
    Kind("a neighbour with {}", fact(neighbors=["{} lives in"]), "'neighbors' has a '{}'"),
    Kind("joined that is neither", fact(joined="yes"), "'joined' is neither true nor false"),
    Kind("CounterFact: a text as rewrite", record(requested_rewrite="x"), "is a text where"),
    Kind("CounterFact: a text as object", rewrite(target_new="Rome"), "'target_new' is a text"),
    Kind("CounterFact: no str", rewrite(target_new={"id": "Q1"}), "'str' is missing"),
    Kind("CounterFact: a number as object", rewrite(target_new={"str": 4}), "the number 4"),
    Kind("CounterFact: equal objects", rewrite(target_new={"str": "Oslo"}), "is the true one"),
    Kind("CounterFact: no {}", rewrite(prompt="Ada lives in"), "has 0 '{}'"),
    Kind("CounterFact: a case_id in letters", record(case_id="one"), "'case_id'"),
    Kind("CounterFact: a huge case_id", record(case_id=2**70), "whole number from 0"),
    Kind("CounterFact: a negative case_id", record(case_id=-1), "whole number from 0"),
    Kind("CounterFact: a case_id twice", records([RECORD, RECORD]), "share the case_id 0"),
    Kind("CounterFact: prompts in a text", record(paraphrase_prompts="x"), "list of texts"),
    Kind("CounterFact: prompts in an object", record(neighborhood_prompts={"a": 1}), "an object"),
    Kind("CounterFact: a prompt of null", record(generation_prompts=[None]), "is nothing where"),
]

ADDRESSES = [
    Kind(
        f"an address {name}",
        setting(requests={"path": None, "url": url, "sha256": "0" * 64}),
        sentence,
    )
    for name, url, sentence in (
        ("of a file here", "file:///etc/passwd", "give an http or https address"),
        ("for FTP", "ftp://127.0.0.1/x", "give an http or https address"),
        ("for data", "data:text/plain,x", "give an http or https address"),
        ("without a host", "http:///x", "give an http or https address"),
        ("with a password", "http://me:secret-word@127.0.0.1/x", "requests.url holds a password"),
        ("with a token", "http://127.0.0.1/x?token=secret-word", "requests.url holds a password"),
        ("with spaces", "http://a b/c", "give an http or https address"),
        ("with half a bracket", "http://[::1/x", "cannot be fetched"),
    )
] + [
    Kind(
        "an address without a checksum",
        setting(requests={"path": None, "url": "http://127.0.0.1/x"}),
        "needs requests.sha256",
    ),
    Kind("an address and a path", setting(requests={"url": "http://x"}), "either requests.path or"),
    Kind("a checksum of 12", setting(requests={"sha256": "12"}), 'requests.sha256 is "12"'),
]

PARAMETERS = [
    Kind("no params.yaml", lambda: Path("params.yaml").unlink(), "params.yaml is not here"),
    Kind("params.yaml: empty", parameters(""), "must hold sections"),
    Kind("params.yaml: a directory", instead("params.yaml", os.mkdir), "is a directory"),
    Kind("params.yaml: a pipe", instead("params.yaml", os.mkfifo), "is a pipe or a device"),
    Kind("params.yaml: a text", parameters("model"), "must hold sections"),
    Kind("params.yaml: a list", parameters("- model"), "must hold sections"),
    Kind("params.yaml: UTF-16", parameters("model: {}".encode("utf-16")), "is not UTF-8"),
    Kind("params.yaml: NUL", parameters("model: {}\0"), "params.yaml"),
    Kind("params.yaml: a tab", parameters("edit:\n\tlayers: [1]"), "line 2"),
    Kind("params.yaml: an open brace", parameters("edit: {"), "is not YAML"),
    Kind("params.yaml: two documents", parameters("edit: {}\n---\nedit: {}\n"), "is not YAML"),
    Kind("params.yaml: a key twice", parameters("edit: {}\nedit: {}\n"), "duplicate key"),
    Kind("params.yaml: an alias", parameters("edit: &e {}\ntargets: *e\n"), "(*name)"),
    Kind("params.yaml: a billion laughs", parameters(laughs()), "repeats another place"),
    Kind("params.yaml: an alias of itself", parameters("a: &a [*a]"), "repeats another place"),
    Kind(
        "params.yaml: a Python object",
        parameters("model: !!python/object/apply:os.mkdir ['pwned']"),
        "is not YAML",
    ),
    Kind("params.yaml: a name of Python", parameters("a: !!python/name:os.method"), "is not YAML"),
    Kind("params.yaml: depth", parameters("[" * 500), "is not YAML"),
    Kind("params.yaml: depth of objects", parameters("{a: " * 400 + "}" * 400), "params.yaml"),
    Kind("params.yaml: a list as key", parameters("? [a, b]\n: 1\n"), "value of no use"),
    Kind("params.yaml: a date as key", parameters("2020-01-01: 1\n"), "value of no use"),
    Kind("params.yaml: a number as key", parameters("1: 2\n"), "there is no key 1"),
    Kind("params.yaml: too large", parameters("#" * (1 << 21)), "more than the 1048576"),
    Kind("a section misspelt", setting(modle={}), "did you mean model?"),
    Kind("a key misspelt", setting(edit={"layrs": [1]}), "did you mean edit.layers?"),
    Kind(
        "a key of another section", setting(requests={"layers": [1]}), "did you mean edit.layers?"
    ),
    Kind("remote code", setting(model={"trust_remote_code": True}), "no key model.trust_"),
    Kind("a section of null", setting(targets=None), "targets is null"),
    Kind("a list as section", setting(targets=[1]), "targets is [1]"),
    Kind("a text for a number", setting(requests={"count": "64"}), "not a number: write 64"),
    Kind("a number in quotes", parameters('edit: {covariance_weight: "15000"}'), "write 15000.0"),
    Kind("true for a number", setting(requests={"count": True}), "requests.count is true"),
    Kind("a fraction of records", setting(requests={"count": 6.5}), "requests.count is 6.5"),
    Kind("no records", setting(requests={"count": 0}), "requests.count is 0"),
    Kind("a list for a number", setting(requests={"seed": [1]}), "requests.seed is [1]"),
    Kind("a negative seed", setting(prefixes={"seed": -1}), "prefixes.seed is -1"),
    Kind("a seed of 33 bits", setting(prefixes={"seed": 2**32}), "prefixes.seed is 4294967296"),
    Kind("a huge number", setting(prefixes={"seed": 10**400}), "prefixes.seed is 1000"),
    Kind("a hexadecimal novel", parameters("prefixes:\n  seed: 0x" + "f" * 9_000), "of no use"),
    Kind(".nan", setting(targets={"learning_rate": float("nan")}), "learning_rate is NaN"),
    Kind(".inf", setting(edit={"covariance_weight": float("inf")}), "is Infinity"),
    Kind("a negative rate", setting(targets={"learning_rate": -0.5}), "learning_rate is -0.5"),
    Kind("a negative λ", setting(edit={"covariance_weight": -1}), "covariance_weight is -1"),
    Kind("λ of 0", setting(edit={"covariance_weight": 0}), "covariance_weight is 0"),
    Kind("no evaluations", setting(targets={"evaluations": 0}), "targets.evaluations is 0"),
    Kind("a token budget of 3", setting(targets={"token_budget": 3}), "token_budget is 3"),
    Kind("a token budget of words", setting(edit={"token_budget": "all"}), "should be 'auto'"),
    Kind("no layers", setting(edit={"layers": []}), "edit.layers is []"),
    Kind("layers out of order", setting(edit={"layers": [2, 1]}), "ascending order"),
    Kind("a layer twice", setting(edit={"layers": [1, 1]}), "each layer once"),
    Kind("a negative layer", setting(edit={"layers": [-1]}), "edit.layers[0] is -1"),
    Kind("a layer in words", setting(edit={"layers": ["last"]}), 'edit.layers[0] is "last"'),
    Kind("one layer for a list", setting(edit={"layers": 3}), "edit.layers is 3"),
    Kind("a layer too deep", setting(edit={"layers": [99]}), "names layer 99"),
    Kind("an update of nothing", setting(edit={"largest_update": 0}), "largest_update is 0"),
    Kind("a failure of no kind", setting(edit={"on_failure": "skip"}), 'on_failure is "skip"'),
    Kind("an unknown device", setting(model={"device": "gpu"}), 'model.device is "gpu"'),
    Kind("a device that is not here", setting(model={"device": "cuda:63"}), "torch does not find"),
    Kind("an unknown dtype", setting(model={"dtype": "int8"}), 'model.dtype is "int8"'),
    Kind("no threads", setting(model={"threads": 0}), "model.threads is 0"),
    Kind("a source that is none", setting(model={"source": "web"}), 'model.source is "web"'),
    Kind("facts of another world", setting(requests={"source": "synthetic"}), "invented people"),
    Kind("an experiment without a name", setting(report={"experiment": ""}), "experiment is"),
    Kind("a store of no kind", setting(report={"tracking_uri": "htp://x"}), "no store of MLflow's"),
    Kind(
        "a store's password",
        setting(report={"tracking_uri": "postgresql://me:secret-word@db/mlflow"}),
        "report.tracking_uri holds a password",
    ),
    Kind(
        "a token of the hub",
        setting(model={"revision": "hf_secretwordsecretwordsecret"}),
        "model.revision holds a password",
    ),
    Kind("half a character", parameters('model:\n  id: "\\ud800"\n'), "value of no use"),
    Kind(
        "a hub name that climbs",
        setting(model={"source": "hub", "id": "../../etc", "revision": "main", "path": None}),
        "is no name on the hub",
    ),
    Kind(
        "a hub model without a revision",
        setting(model={"source": "hub", "id": "a/b", "path": None}),
        "needs model.revision",
    ),
    Kind("a method twice", setting(compare={"methods": ["memit", "memit"]}), "memit twice"),
    Kind("no methods", setting(compare={"methods": []}), "compare.methods is []"),
    Kind("a method of no kind", setting(compare={"methods": ["memmit"]}), "which is unknown"),
    Kind("a method that climbs", setting(compare={"methods": ["../x"]}), "compare.methods[0] is"),
    Kind("settings of an absent method", setting(compare={"settings": {"rome": {}}}), "names rome"),
    Kind(
        "a setting of no kind",
        setting(compare={"methods": ["ft_w"], "settings": {"ft_w": {"rate": 1}}}),
        "ft_w has no rate",
    ),
    Kind(
        "a setting in words",
        setting(compare={"methods": ["ft_w"], "settings": {"ft_w": {"learning_rate": "fast"}}}),
        "learning_rate is 'fast'",
    ),
    Kind(
        "a negative setting",
        setting(compare={"methods": ["ft_w"], "settings": {"ft_w": {"learning_rate": -1.0}}}),
        "learning_rate is -1.0",
    ),
    Kind("no size", setting(scaling={"counts": []}), "scaling.counts is []"),
    Kind("a size of 0", setting(scaling={"counts": [0]}), "scaling.counts[0] is 0"),
    Kind("a negative size", setting(scaling={"counts": [-5]}), "scaling.counts[0] is -5"),
    Kind("more blocks than there are", setting(mend={"blocks": 9}), "mend.blocks is 9"),
]

CORPORA = [
    Kind("no corpus", lambda: Path("corpus.txt").unlink(), "corpus.txt does not exist"),
    Kind("an empty corpus", corpus("corpus.txt", ""), "holds no text"),
    Kind("a corpus of blank lines", corpus("corpus.txt", "\n \n\n"), "holds no text"),
    Kind("a corpus of another kind", corpus("corpus.docx", "x"), "no corpus that can be read"),
    Kind("a corpus in a directory", instead("corpus.txt", os.mkdir), "is a directory"),
    Kind("a corpus from a pipe", instead("corpus.txt", os.mkfifo), "is a pipe or a device"),
    Kind("a corpus in Latin-1", corpus("corpus.txt", "Zoë".encode("latin-1")), "is not UTF-8"),
    Kind("JSON lines: cut off", corpus("c.jsonl", '{"text": "a"}\n{"te'), "line 2"),
    Kind("JSON lines: another key", corpus("c.jsonl", '{"body": "a"}'), "under 'text'"),
    Kind("JSON lines: a number", corpus("c.jsonl", '{"text": 4}'), "under 'text'"),
    Kind("JSON lines: depth", corpus("c.jsonl", "[" * 100_000), "line 1"),
    Kind("JSON lines: half a character", corpus("c.jsonl", '{"text": "\\ud800"}'), "line 1"),
    Kind("Parquet: no Parquet", corpus("c.parquet", "PAR1 or so"), "no whole Parquet file"),
    Kind("Parquet: cut off", after(parquet(text=["a"] * 999), cut("corpus.parquet")), "no whole"),
    Kind("Parquet: another column", parquet(body=["a"]), "no column 'text'"),
    Kind("Parquet: numbers", parquet(text=[1, 2]), "holds int64 under 'text'"),
    Kind("Parquet: bytes", parquet(text=[b"a"]), "holds binary under 'text'"),
    Kind("Parquet: lists", parquet(text=[["a"]]), "under 'text'"),
    Kind("Parquet: no rows", parquet(text=pa.array([], pa.string())), "holds no text"),
    Kind("Parquet: nothing but null", parquet(text=pa.array([None], pa.string())), "no text"),
    Kind(
        "a data set that climbs",
        setting(
            statistics={"source": "dataset", "path": None, "dataset": "../x", "revision": "main"}
        ),
        "is no name on the hub",
    ),
    Kind(
        "published: no directory",
        setting(statistics={"source": "published", "path": "moments"}),
        "moments is no directory",
    ),
    Kind("published: no path", setting(statistics={"source": "published", "path": None}), "path"),
    Kind("published: no files", published_files(), f"holds no {MOMENTS[1].replace('9', '*')}"),
    Kind("published: a layer lacks", published_files(MOMENTS[1]), "moment of layer 2"),
    Kind(
        "published: two of a layer",
        published_files(MOMENTS[1], MOMENTS[1].replace("9", "8"), MOMENTS[2]),
        "both for layer 1",
    ),
    Kind(
        "published: none of ROME's layer",
        published_files(
            MOMENTS[1],
            MOMENTS[2],
            compare={"methods": ["rome"], "settings": {"rome": {"layer": 0}}},
        ),
        "moment of layer 0",
        compared,
    ),
    Kind(
        "published: texts to learn from",
        published_files(mend={"learn_from": "texts"}),
        "which has no texts",
    ),
    Kind(
        "published: of a model made here",
        published_files(model={"source": "synthetic"}),
        "nobody has published",
    ),
    Kind("an empty column name", setting(statistics={"column": ""}), 'statistics.column is ""'),
    Kind("no documents", setting(statistics={"documents": 0}), "statistics.documents is 0"),
    Kind("no held-out text", setting(statistics={"held_out_documents": 0}), "documents is 0"),
]

MODELS = [
    Kind("no model", lambda: shutil.rmtree("model"), "model is no directory"),
    Kind("a file as model", setting(model={"path": "facts.jsonl"}), "is no directory"),
    Kind("a path too long", setting(model={"path": "x" * 999}), "is no directory"),
    Kind("an empty directory", setting(model={"path": "empty"}), "does not hold a causal"),
    Kind("no configuration", lambda: Path("model/config.json").unlink(), "does not hold a causal"),
    Kind("a torn configuration", cut("model/config.json"), "does not hold a causal"),
    Kind("a configuration of numbers", file("model/config.json", "[1]"), "does not hold a causal"),
    Kind("a model of no kind", configuration(model_type="abacus"), "does not hold a causal"),
    Kind("an encoder", configuration(model_type="vit"), "does not hold a causal"),
    Kind("layers in words", configuration(n_layer="six"), "does not hold a causal"),
    Kind("a negative width", configuration(n_embd=-8), "does not hold a causal"),
    Kind("code of its own", code_of_its_own, "code of its own is not run"),
    Kind("a torn tokenizer", cut("model/tokenizer.json"), "its tokenizer cannot be used"),
    Kind("no tokenizer", no_tokenizer, "its tokenizer cannot be used"),
    Kind("an adapter", only_an_adapter, "is an adapter"),
    Kind("a floor too high", a_floor_too_high, "model/snapshots/abc has one"),
    Kind("an encoder-decoder", configuration(model_type="t5"), "is an encoder-decoder"),
    *(
        Kind(
            f"quantised: {method}",
            configuration(quantization_config={"quant_method": method}),
            "are quantised",
        )
        for method in ("bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "hqq")
    ),
    Kind("a quantisation of no kind", configuration(quantization_config={}), "are quantised"),
    *(
        Kind(
            f"quantised without a word: {name}",
            weights(lambda t, n=name: {**t, f"transformer.h.0.mlp.{n}": torch.ones(9).char()}),
            f"holds transformer.h.0.mlp.{name} as I8",
        )
        for name in ("c_fc.weight_packed", "c_fc.qweight", "experts.down_proj_blocks")
    ),
    Kind(
        "experts and one for all",
        experts("qwen2_moe", num_experts=4, shared_expert_intermediate_size=40),
        "experts were found; mixtures of experts and blocks without an MLP cannot be edited: "
        "choose another model",
    ),
    Kind(
        "experts from the second block on",
        experts("glm4_moe", n_routed_experts=4, first_k_dense_replace=1, head_dim=8),
        "choose among the layers 0.",
    ),
    Kind(
        "experts in every other block",
        experts("qwen3_moe", num_experts=4, decoder_sparse_step=2),
        "choose among the layers 0, 2.",
    ),
    Kind("weights in a pickle only", only_a_pickle, "has no safetensors weights"),
    Kind("weights cut off", cut("model/model.safetensors"), "model.safetensors is damaged"),
    Kind("weights of 7 bytes", cut("model/model.safetensors", 1e-5), "is damaged"),
    Kind("weights of text", file("model/model.safetensors", "x" * 99), "is damaged"),
    Kind("weights in whole numbers", weights(lambda t: {n: w.long() for n, w in t.items()}), "I64"),
    Kind(
        "an index of absent shards",
        absent_shards,
        "names part-2.safetensors",
    ),
    Kind("a model for no disk", configuration(n_embd=1 << 20, n_head=1), "GB free"),
    Kind("a million blocks", configuration(n_layer=10**6), "more than 1000 blocks"),
    Kind("a tokenizer of another model", configuration(vocab_size=9), "belongs to another model"),
]

COMPARISONS = [
    Kind("zsRE: no file", setting(compare={"zsre": "gone.json"}), "gone.json does not exist"),
    Kind("zsRE: cut off", zsre(json.dumps([QUESTION])[:-9]), "not whole JSON"),
    Kind("zsRE: an empty list", zsre([]), "holds no questions"),
    Kind("zsRE: records", zsre([RECORD]), "'subject' is missing"),
    Kind("zsRE: numbers", zsre([3]), "no JSON object"),
    Kind("zsRE: no answers", zsre([{**QUESTION, "answers": []}]), "'answers' is no list"),
    Kind("zsRE: an empty answer", zsre([{**QUESTION, "answers": [" "]}]), "object is empty"),
    Kind("zsRE: no subject in it", zsre([{**QUESTION, "src": "Who?"}]), "not name its subject"),
    Kind(
        "zsRE: a question over the context",
        zsre([{**QUESTION, "loc": "q" * 200}]),
        "the specificity prompt of record 0",
        compared,
    ),
    Kind(
        "CounterFact+: over the context",
        record(neighborhood_prompts=["q" * 188]),
        "the neighborhood_plus prompt of record 0",
        compared,
    ),
    Kind("snippets: no file", setting(evaluation={"snippets": "gone.json"}), "gone.json does not"),
    Kind("snippets: an object", snippets({"a": 1}), "does not hold attribute snippets"),
    Kind("snippets: a number", snippets(4), "does not hold attribute snippets"),
    Kind("snippets: no samples", snippets([{"relation_id": "a", "target_id": "b"}]), "samples"),
    Kind("more edits than records", setting(compare={"count": 9}), "count is 9", compared),
    Kind(
        "nothing to learn from",
        setting(compare={"methods": ["serac"]}),
        "serac learns from records",
        compared,
    ),
]

FILES = [
    Kind("moments: no file", lambda: None, "moments.npz", published),
    Kind("moments: text", file("moments.npz", "x"), "does not hold published", published),
    Kind("moments: other names", npz(a=EYE), "does not hold published", published),
    Kind("moments: another size", npz(mom2_mom2=np.eye(4), mom2_count=9), "3 × 3", published),
    Kind("moments: one row", npz(mom2_mom2=np.ones(3), mom2_count=9), "3 × 3", published),
    Kind("moments: no count", npz(mom2_mom2=EYE, mom2_count=0), "not finite", published),
    Kind("moments: many counts", npz(mom2_mom2=EYE, mom2_count=[1, 2]), "does not hold", published),
    Kind("moments: NaN", npz(mom2_mom2=EYE * np.nan, mom2_count=9), "not finite", published),
    Kind("moments: texts", npz(mom2_mom2=EYE.astype(str), mom2_count=9), "moments.npz", published),
    Kind(
        "moments: not symmetric",
        npz(mom2_mom2=EYE + np.eye(3, k=1), mom2_count=9),
        "is not symmetric",
        published,
    ),
    Kind("moments: singular", npz(mom2_mom2=EYE * 0, mom2_count=9), "not positive def", published),
    Kind("moments: indefinite", npz(mom2_mom2=-EYE, mom2_count=9), "not positive def", published),
    Kind(
        "moments: a pickle",
        npz(mom2_mom2=np.array([[Malicious()]], dtype=object), mom2_count=9),
        "does not hold published",
        published,
    ),
    Kind("an edit: no file", lambda: None, "delta.safetensors", delta),
    Kind("an edit: text", file("delta.safetensors", "x" * 99), "does not hold a weight", delta),
    Kind(
        "an edit: weights",
        lambda: shutil.copy("model/model.safetensors", "delta.safetensors"),
        "does not hold a weight delta",
        delta,
    ),
]

KINDS = [*REQUESTS, *ADDRESSES, *PARAMETERS, *CORPORA, *MODELS, *COMPARISONS, *FILES]


def digests(place: Path) -> dict[str, str]:
    """Everything below a directory: folders, links, pipes, and the content of files."""
    found = {}
    for path in sorted(place.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "other"
        if path.is_file() and path.stat().st_size < 1 << 30:
            kind = file_sha256(path)
        found[str(path.relative_to(place))] = kind
    return found
