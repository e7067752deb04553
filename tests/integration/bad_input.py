"""The table of bad input: what a user may feed in, and what the error must name.

Each kind spoils a good experiment on a small model directory. `KINDS` are all of them; what is
wrong in params.yaml alone is in tests/unit/flows/command/test_parameters.py, and most of what a
reader of files refuses in that reader's own tests.
"""

import gzip
import json
import os
import shutil
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

from flows.command.checks import check_comparison, check_inputs
from flows.command.parameters import read_parameters
from memit.errors import InputError, IntegrityError, MemitError, ModelStructureError, ResourceError
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
    "model": {"source": "local", "path": "my-net"},
    "requests": {"source": "facts", "path": "facts.jsonl", "count": None},
    "statistics": {"source": "file", "path": "corpus.txt"},
    "edit": {"layers": [1, 2]},
    "compare": {"methods": ["unedited", "memit"], "count": None, "training_records": 0},
}

Spoil = Callable[[], object]
"""Spoils the experiment in the working directory."""


def check() -> object:
    """What `memit run` does before it begins."""
    return check_inputs(read_parameters())


def compared() -> object:
    """What a comparison does before it begins."""
    return check_comparison(read_parameters())


def published() -> object:
    """Read the published second moments."""
    return import_published(Path("moments.npz"), 3)


def delta() -> object:
    """Read an edit."""
    return WeightDelta.load(Path("delta.safetensors"))


@dataclass(frozen=True)
class Kind:
    """One kind of bad input."""

    name: str
    spoil: Spoil
    named: str
    """The file, key or record that the error must name."""
    error: type[MemitError] = InputError
    read: Callable[[], object] = check
    """What finds it."""


def kinds(
    named: str,
    spoils: dict[str, Spoil],
    error: type[MemitError] = InputError,
    read: Callable[[], object] = check,
) -> list[Kind]:
    """Kinds whose error has one type and names one thing."""
    return [Kind(name, spoil, named, error, read) for name, spoil in spoils.items()]


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
        path = Path("my-net/config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Spoil:
    """Other tensors in the model's weights."""
    path = "my-net/model.safetensors"
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


def absent_shards() -> None:
    """A model directory whose index names a file that is not there."""
    Path("my-net/model.safetensors").unlink()
    index = '{"weight_map": {"a": "part-2.safetensors"}}'
    Path("my-net/model.safetensors.index.json").write_text(index)


class Malicious:
    """Unpickling it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What a pickle would run."""
        return (os.mkdir, ("pwned",))


def only_a_pickle() -> None:
    """A model directory whose weights are a pickle that would run something."""
    Path("my-net/model.safetensors").unlink()
    torch.save({"weight": Malicious()}, "my-net/pytorch_model.bin")


def no_tokenizer() -> None:
    """A model directory without its tokenizer."""
    Path("my-net/tokenizer.json").unlink()
    Path("my-net/tokenizer_config.json").unlink()


def only_an_adapter() -> None:
    """An adapter without the model that it is for."""
    shutil.rmtree("my-net")
    Path("my-net").mkdir()
    Path("my-net/adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.ones(1)}, "my-net/adapter_model.safetensors")


def a_floor_too_high() -> None:
    """A folder of the hub's cache in place of the snapshot in it."""
    shutil.move("my-net", "abc")
    Path("my-net/snapshots").mkdir(parents=True)
    shutil.move("abc", "my-net/snapshots")


def experts() -> None:
    """A model whose blocks choose among experts, beside one for all."""
    config = AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=4,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    )
    config.save_pretrained("my-net")


def code_of_its_own() -> None:
    """A model directory that wants its own code to be run."""
    configuration(
        model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    )()
    Path("my-net/code.py").write_text("import os\nos.mkdir('pwned')\n")


LINE = json.dumps(FACT)
EYE = np.eye(3)

FACTS = kinds(
    "facts.jsonl",
    {
        "no file": lambda: Path("facts.jsonl").unlink(),
        "a directory instead of a file": instead("facts.jsonl", os.mkdir),
        "a pipe": instead("facts.jsonl", os.mkfifo),
        "a loop of links": instead("facts.jsonl", lambda name: os.symlink(name, name)),
        "more than is ever read": lambda: os.truncate("facts.jsonl", 1 << 31),
        "NUL bytes": facts(LINE + "\0"),
        "gzip": facts(gzip.compress(LINE.encode())),
        "HTML": facts("<!DOCTYPE html>\n<html><body>404</body></html>"),
        "two objects on a line": facts(LINE + LINE),
        "a comma at a line's end": facts(LINE + ",\n" + LINE),
        "a comma too many": facts(LINE[:-1] + ",}"),
        "NaN": facts(LINE.replace('"Rome"', "NaN")),
        "a key twice": facts(LINE[:-1] + ', "target": "Oslo"}'),
        "a number without end": facts('{"subject": ' + "9" * 5_000 + "}"),
        "nesting without end": facts('{"a":' * 100_000),
        "a list of numbers": facts("[1, 2]"),
        "a number alone": facts("17"),
        "a subject of spaces": fact(subject=" \u3000 "),
        "an object that is the true one": fact(target_true="Rome"),
        "a number for the subject": fact(subject=7),
        "a list for the prompt": fact(prompt=["{}"]),
        "a text for paraphrases": fact(paraphrases="one"),
        "a number among neighbors": fact(neighbors=["a", 3]),
        "an empty paraphrase": fact(paraphrases=["a", " "]),
        "joined that is neither": fact(joined="yes"),
        "half a surrogate pair": fact(subject="\ud800"),
        "an escape character": fact(subject="A\x1b[31mda"),
        "questions": facts(json.dumps([QUESTION])),
        "CSV: no header": facts("Ada,{} lives in,Rome\n"),
        "CSV: a column twice": facts("subject,prompt,target,target\na,{} is,b,c\n"),
        "CSV: semicolons": facts("subject;prompt;target\nAda;{} is;b\n"),
        "CSV: a header alone": facts("subject,prompt,target\n"),
        "CSV: a huge cell": facts("subject,prompt,target\na,{}," + "x" * 200_000),
    },
) + kinds(
    "prompt of record",
    {
        "a subject of a novel's length": fact(subject="Ada " * 5_000),
        "a prompt over the context": fact(prompt="{} " + "and so " * 999),
        "a paraphrase over the context": fact(paraphrases=["ab " * 300]),
        "no room for a prefix": fact(prompt="{} " + "q" * 180 + " in"),
    },
)

RECORDS = kinds(
    "records.json",
    {
        "CounterFact: questions": records([QUESTION]),
        "CounterFact: a text as rewrite": record(requested_rewrite="x"),
        "CounterFact: no str": rewrite(target_new={"id": "Q1"}),
        "CounterFact: equal objects": rewrite(target_new={"str": "Oslo"}),
        "CounterFact: a huge case_id": record(case_id=2**70),
        "CounterFact: prompts in an object": record(neighborhood_prompts={"a": 1}),
        "CounterFact: a prompt of null": record(generation_prompts=[None]),
    },
)

PARAMETERS = [
    Kind("a device", setting(requests={"path": "/dev/zero"}), "/dev/zero"),
    Kind("a name too long", setting(requests={"path": "x" * 999}), "xxx"),
    Kind("too many records", setting(requests={"count": 2}), "the count is 2"),
    Kind("another checksum", setting(requests={"sha256": "0" * 64}), "facts.jsonl", IntegrityError),
    Kind(
        "an address with half a bracket",
        setting(requests={"path": None, "url": "http://[::1/x", "sha256": "0" * 64}),
        "http://[::1/x",
    ),
    Kind("no params.yaml", lambda: Path("params.yaml").unlink(), "params.yaml"),
    Kind("a key misspelt", setting(edit={"layrs": [1]}), "edit.layers"),
    Kind("remote code", setting(model={"trust_remote_code": True}), "model.trust_remote_code"),
    Kind("a layer too deep", setting(edit={"layers": [99]}), "edit.layers"),
    Kind("a device that is not here", setting(model={"device": "cuda:63"}), "model.device"),
    Kind(
        "a hub name that climbs",
        setting(model={"source": "hub", "id": "../../etc", "revision": "main", "path": None}),
        "../../etc",
    ),
    Kind(
        "a data set that climbs",
        setting(
            statistics={"source": "dataset", "path": None, "dataset": "../x", "revision": "main"}
        ),
        "../x",
    ),
]

METHODS = (
    kinds(
        "compare.methods",
        {
            "a method of no kind": setting(compare={"methods": ["memmit"]}),
            "nothing to learn from": setting(compare={"methods": ["serac"]}),
            "settings of an absent method": setting(compare={"settings": {"rome": {}}}),
        },
        read=compared,
    )
    + kinds(
        "compare.settings.ft_w",
        {
            f"a setting {name}": setting(
                compare={"methods": ["ft_w"], "settings": {"ft_w": settings}}
            )
            for name, settings in {
                "of no kind": {"rate": 1},
                "in words": {"learning_rate": "fast"},
                "below zero": {"learning_rate": -1.0},
            }.items()
        },
        read=compared,
    )
    + [
        Kind(
            "more blocks than there are",
            setting(mend={"blocks": 9}, compare={"methods": ["mend"], "training_records": 1}),
            "mend.blocks",
            read=compared,
        ),
        Kind("too many edits", setting(compare={"count": 9}), "compare.count", read=compared),
    ]
)

CORPORA = kinds(
    "corpus.",
    {
        "no corpus": lambda: Path("corpus.txt").unlink(),
        "a corpus of blank lines": corpus("corpus.txt", "\n \n\n"),
        "a corpus in a directory": instead("corpus.txt", os.mkdir),
        "a corpus from a pipe": instead("corpus.txt", os.mkfifo),
        "JSON lines: a number": corpus("corpus.jsonl", '{"text": 4}'),
        "JSON lines: depth": corpus("corpus.jsonl", "[" * 100_000),
        "JSON lines: half a character": corpus("corpus.jsonl", '{"text": "\\ud800"}'),
        "Parquet: numbers": parquet(text=[1, 2]),
        "Parquet: lists": parquet(text=[["a"]]),
        "Parquet: no rows": parquet(text=pa.array([], pa.string())),
        "Parquet: nothing but null": parquet(text=pa.array([None], pa.string())),
        "Parquet: cut off": after(parquet(text=["a"] * 999), cut("corpus.parquet")),
    },
)

PUBLISHED = [
    Kind(
        "published: no directory",
        setting(statistics={"source": "published", "path": "moments"}),
        "moments",
    ),
    Kind("published: no files", published_files(), MOMENTS[1].replace("9", "*")),
    Kind("published: a layer lacks", published_files(MOMENTS[1]), "layer 2"),
    Kind(
        "published: two of a layer",
        published_files(MOMENTS[1], MOMENTS[1].replace("9", "8"), MOMENTS[2]),
        "layer 1",
    ),
    Kind(
        "published: none of ROME's layer",
        published_files(
            MOMENTS[1],
            MOMENTS[2],
            compare={"methods": ["rome"], "settings": {"rome": {"layer": 0}}},
        ),
        "layer 0",
        read=compared,
    ),
    Kind(
        "published: texts to learn from",
        published_files(mend={"learn_from": "texts"}),
        "mend.learn_from",
    ),
]

MODELS = (
    kinds(
        "my-net",
        {
            "no model": lambda: shutil.rmtree("my-net"),
            "no configuration": lambda: Path("my-net/config.json").unlink(),
            "a torn configuration": cut("my-net/config.json"),
            "a configuration of numbers": file("my-net/config.json", "[1]"),
            "a model of no kind": configuration(model_type="abacus"),
            "an encoder": configuration(model_type="vit"),
            "layers in words": configuration(n_layer="six"),
            "a negative width": configuration(n_embd=-8),
            "code of its own": code_of_its_own,
            "a torn tokenizer": cut("my-net/tokenizer.json"),
            "no tokenizer": no_tokenizer,
            "an adapter": only_an_adapter,
            "a directory too high": a_floor_too_high,
            "weights in a pickle only": only_a_pickle,
            "weights in whole numbers": weights(lambda t: {n: w.long() for n, w in t.items()}),
            "quantised": configuration(quantization_config={"quant_method": "gptq"}),
            "a quantisation of no kind": configuration(quantization_config={}),
            "a million blocks": configuration(n_layer=10**6),
            "a tokenizer of another model": configuration(vocab_size=9),
            **{
                f"quantised without a word: {name}": weights(
                    lambda t, n=name: {**t, f"transformer.h.0.mlp.{n}": torch.ones(9).char()}
                )
                for name in ("c_fc.weight_packed", "c_fc.qweight", "experts.down_proj_blocks")
            },
        },
    )
    + kinds(
        "my-net",
        {
            "weights cut off": cut("my-net/model.safetensors"),
            "weights of 7 bytes": cut("my-net/model.safetensors", 1e-5),
            "weights of text": file("my-net/model.safetensors", "x" * 99),
            "an index of absent shards": absent_shards,
        },
        IntegrityError,
    )
    + [
        Kind("an encoder-decoder", configuration(model_type="t5"), "my-net", ModelStructureError),
        Kind("experts", experts, "mixtures of experts", ModelStructureError),
        Kind("a file as model", setting(model={"path": "facts.jsonl"}), "facts.jsonl"),
        Kind(
            "a model for no disk",
            configuration(n_embd=1 << 20, n_head=1),
            "statistics.documents_per_shard",
            ResourceError,
        ),
    ]
)

QUESTIONS = kinds(
    "zsre.json",
    {
        "zsRE: no file": setting(compare={"zsre": "zsre.json"}),
        "zsRE: cut off": zsre(json.dumps([QUESTION])[:-9]),
        "zsRE: an empty list": zsre([]),
        "zsRE: records": zsre([RECORD]),
    },
    read=compared,
) + kinds(
    "record 0",
    {
        "zsRE: a question over the context": zsre([{**QUESTION, "loc": "q" * 200}]),
        "CounterFact: over the context": record(generation_prompts=["q" * 193]),
        "CounterFact+: over the context": record(neighborhood_prompts=["q" * 188]),
    },
    read=compared,
)

SNIPPETS = kinds(
    "snippets.json",
    {
        "snippets: no file": setting(evaluation={"snippets": "snippets.json"}),
        "snippets: an object": snippets({"a": 1}),
        "snippets: a number": snippets(4),
        "snippets: no samples": snippets([{"relation_id": "a", "target_id": "b"}]),
    },
)

MOMENT_FILES = kinds(
    "moments.npz",
    {
        "moments: no file": lambda: None,
        "moments: many counts": npz(mom2_mom2=EYE, mom2_count=[1, 2]),
        "moments: texts": npz(mom2_mom2=EYE.astype(str), mom2_count=9),
        "moments: other arrays": npz(a=EYE),
        "moments: a pickle": npz(mom2_mom2=np.array([[Malicious()]], dtype=object), mom2_count=9),
    },
    IntegrityError,
    published,
)

EDITS = kinds(
    "delta.safetensors",
    {
        "an edit: no file": lambda: None,
        "an edit: text": file("delta.safetensors", "x" * 99),
        "an edit: weights": lambda: shutil.copy("my-net/model.safetensors", "delta.safetensors"),
    },
    IntegrityError,
    delta,
)

KINDS = [
    *(FACTS + RECORDS + PARAMETERS + METHODS + CORPORA + PUBLISHED + MODELS),
    *(QUESTIONS + SNIPPETS + MOMENT_FILES + EDITS),
]


def digests(place: Path) -> dict[str, str]:
    """Everything below a directory: folders, links, pipes, and the content of files."""
    found = {}
    for path in sorted(place.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "other"
        if path.is_file() and path.stat().st_size < 1 << 30:
            kind = file_sha256(path)
        found[str(path.relative_to(place))] = kind
    return found
