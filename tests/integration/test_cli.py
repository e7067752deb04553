"""The console script on a small model directory: what it says, does and refuses."""

import io
import json
import re
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from flows import report
from flows.command import cli, estimate
from flows.command import script as command
from flows.command.answers import Questions
from flows.command.changes import check_losses
from flows.command.costs import Lengths
from flows.command.export import license_of
from flows.command.parameters import ModelSection, RequestsSection
from memit.errors import InputError
from memit.hyperparameters import preset
from memit.language_model import load_model
from memit.model_directory import applied_edits
from memit.requests import EditRequest, Record, write_records
from memit.weight_delta import WeightDelta
from tasks.engine.artifacts import copy_file, store_piece, write_file, write_json, write_text
from tasks.engine.loaded_model import ModelFiles, ModelReference
from tasks.engine.results import (
    DELTA_FILE,
    DETAILS_FILE,
    FACTS_FILE,
    METRICS_FILE,
    REQUESTS_FILE,
    Manifest,
    finish_step,
    remember_run,
)
from tests import contents, imported, python
from tests.families import save_model
from tests.integration.command import memit, said
from tests.integration.small_model import make_delta


@pytest.fixture
def place(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model and an edit of it."""
    monkeypatch.setenv("COLUMNS", "100")
    command.given_parameters.cache_clear()
    save_model("gpt2", "model")
    make_delta(load_model("model", device="cpu"), project / "delta.safetensors")
    return project


@pytest.mark.parametrize(
    "name",
    ["run", "repro", "deploy", "check", "ask", "apply", "revert", "export", "diff", "status"],
)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert memit("--help") == 0
    assert name in said(capsys)
    assert memit(name, "--help") == 0
    assert len(said(capsys)) > 150


def test_ask_shows_both_models_where_it_can_be_kept(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--model", "model", "--delta", "delta.safetensors")
    (place / "more.txt").write_text("Rome\n\nOslo\n")
    assert memit("ask", "[b]Paris", "Lima", "--file", "more.txt", *words) == 0
    kept = capsys.readouterr().out
    for part in ("[b]Paris", "Lima", "Rome", "Oslo", "unedited", "edited", "%"):
        assert part in kept
    monkeypatch.setattr("sys.stdin", io.StringIO("Bern\n"))
    assert memit("ask", *words) == 0
    assert "Bern" in capsys.readouterr().out
    assert memit("ask", " ", *words) == 2
    assert memit("ask", "Paris " * 500, *words) == 2
    assert memit("ask", "Paris", "--chat", *words) == 2
    assert "--chat" in said(capsys)


def test_ask_marks_the_objects_of_edited_facts_and_writes_whole_words(place: Path) -> None:
    lm = load_model("model", device="cpu")
    fact = EditRequest("Paris", "{} is", "Rome", "Oslo")
    asked = Questions(lm, None, [fact], top=4, tokens=3, is_chat=False)
    (table,) = asked.tables(["Paris is"])
    assert str(table.title) == "Paris is\nOslo → Rome"
    cells = [str(cell) for cell in table.columns[0].cells]
    assert len(cells) == 5
    assert all(re.match(r" *[\d.]+%  \S", cell) for cell in cells[:4])
    lm.tokenizer.chat_template = "<user>{{ messages[0].content }}<model>"
    asked = Questions(lm, None, [], top=1, tokens=1, is_chat=True)
    (chat,) = asked.tables(["Paris"])
    asked = Questions(lm, None, [], top=1, tokens=1, is_chat=False)
    (plain,) = asked.tables(["<user>Paris<model>"])
    assert list(chat.columns[0].cells) == list(plain.columns[0].cells)


def test_a_model_that_the_edit_was_not_made_for_is_asked_as_it_is(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "artifacts" / "edit").mkdir(parents=True)
    shutil.copy(place / "delta.safetensors", place / "artifacts" / "edit")
    assert memit("apply", "model", "--delta", "delta.safetensors") == 0
    capsys.readouterr()
    assert memit("ask", "Paris", "--model", "model") == 0
    captured = capsys.readouterr()
    assert "as it is" in captured.err
    assert "unedited" not in captured.out
    assert memit("ask", "Paris", "--model", "model", "--delta", "delta.safetensors") == 2


def test_an_exported_model_is_asked_as_it_is(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert memit("ask", "Paris", "--model", "model") == 0
    captured = capsys.readouterr()
    assert "Paris" in captured.out
    assert "edited" not in captured.out + captured.err


def test_a_file_that_is_missing_is_told_with_the_parameters_that_name_it(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(command.PARAMETERS, "mine.yaml")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    for text, way_out in (
        ("tune: {facts: gone}", "check the path of tune.facts"),
        ("evaluation: {metrics: gone}", "correct evaluation.metrics in mine.yaml"),
    ):
        (place / "mine.yaml").write_text(text)
        command.given_parameters.cache_clear()
        assert memit("tune") == 2
        assert f"gone does not exist: {way_out}" in said(capsys)


@pytest.mark.parametrize(
    ("level", "shown"), [(None, "memit ask 'a $b'"), ("1", "make ask PROMPT='a $$b'")]
)
def test_commands_are_shown_as_they_are_typed(
    level: str | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f".venv/bin/{name}")
    monkeypatch.delenv("MAKELEVEL", raising=False)
    if level:
        monkeypatch.setenv("MAKELEVEL", level)
    assert report._command("ask", "a $b") == shown


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert memit("--version") == 0
    assert said(capsys) == version("memit")


@pytest.mark.parametrize("words", [("check", "f.jsonl"), ("revert", "model")])
def test_what_needs_no_model_imports_none(place: Path, words: tuple[str, ...]) -> None:
    """A mistake in a file of facts, and an edit to undo, are found without the slow libraries."""
    (place / "f.jsonl").write_text("{}")
    ended = python("-X", "importtime", "-m", "flows.command.cli", *words, cwd=place)
    assert ended.returncode == 2
    assert not imported(ended) & {"prefect", "mlflow", "transformers", "sklearn"}


def test_apply_and_revert(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(place / "model")
    assert memit("apply", "model", "--delta", "delta.safetensors") == 0
    assert "memit-edits/0001" in said(capsys)
    assert contents(place / "model") != before
    assert memit("revert", "model") == 0
    assert contents(place / "model") == before
    assert memit("revert", "model") == 2
    assert memit("revert", "nowhere") != 0
    assert memit("apply", "model") == 2
    assert "artifacts/edit/delta.safetensors" in said(capsys)


def test_status_says_which_facts_are_in_a_directory(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert memit("status", "model") == 0
    assert "carries no edit" in said(capsys)
    delta = WeightDelta.load(place / "delta.safetensors").naming(facts("Ada"))
    delta.save(place / "named.safetensors")
    finished(facts("Ada"), place / "named.safetensors")
    (place / "params.yaml").write_text("requests: {source: facts, path: newer.jsonl}")
    assert memit("apply", "model") == 0
    assert memit("status", "model") == 0
    text = said(capsys)
    assert "0001: in the weights" in text
    assert "list facts.jsonl" in text  # of the run, whatever params.yaml names by now
    assert "c0ffee" in text
    assert "Ada lives in → Rome (id: Ada, source: A. Smith)" in text


def facts(*subjects: str) -> list[Record]:
    return [
        Record(
            number,
            EditRequest(subject, "{} lives in", "Rome", "Oslo"),
            (f"The home of {subject} is",),
            ("Carl lives in",),
            origin={"id": subject, "source": "A. Smith"},
        )
        for number, subject in enumerate(subjects)
    ]


def finished(records: list[Record], delta: Path) -> dict[str, Manifest]:
    """What a finished run with these facts leaves behind."""
    write_file(REQUESTS_FILE, lambda path: write_records(records, path))
    copy_file(delta, DELTA_FILE)
    made = {"requests": REQUESTS_FILE, "edit": DELTA_FILE}
    manifests = {step: finish_step(step, [path], {}, []) for step, path in made.items()}
    remember_run(manifests, "facts.jsonl", "c0ffee")
    for step, path in made.items():
        store_piece(step, path.suffix, partial(shutil.copyfile, path))
    return manifests


def test_diff_before_and_after_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "params.yaml").write_text("requests: {source: facts, path: facts.jsonl}")

    def listed(*subjects: str) -> str:
        lines = [{"subject": name, "prompt": "{} lives in", "target": "Rome"} for name in subjects]
        (place / "facts.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert memit("diff") == 0
        return said(capsys)

    assert "+ Ada lives in → Rome" in listed("Ada")
    lm = load_model("model", device="cpu")
    finished(facts("Ada", "Bo"), make_delta(lm, place / "one.safetensors", seed=1))
    text = listed("Ada", "Cy")
    assert "1 added, 1 withdrawn, 0 changed, 1 kept" in text
    assert "+ Cy lives in → Rome - Bo lives in → Rome (id: Bo, source: A. Smith)" in text
    finished(facts("Ada", "Cy"), make_delta(lm, place / "two.safetensors", seed=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_open_model", lambda _: lm)
        text = listed("Cy", "Ada")
    assert "against the one before: 1 added, 1 withdrawn" in text
    for prompt in ("Cy lives in", "The home of Bo is", "neighbour", "Carl lives in"):
        assert prompt in text
    assert lm.applied == []


def test_a_list_that_lost_many_facts_is_not_run(place: Path) -> None:
    section = RequestsSection(source="facts", path="facts.jsonl")
    names = [f"Ada {number}" for number in range(10)]
    finished(facts(*names), place / "delta.safetensors")

    def listed(*subjects: str) -> None:
        lines = [{"subject": name, "prompt": "{} lives in", "target": "Rome"} for name in subjects]
        (place / "facts.jsonl").write_text("\n".join(map(json.dumps, lines)))

    for kept in (names, names[:8], [*names, "Bo"]):
        listed(*kept)
        check_losses(section)
    listed(*names[:7])
    with pytest.raises(InputError, match=r"lost 3 facts .* --yes"):
        check_losses(section)
    (place / "facts.jsonl").rename(place / "others.jsonl")
    check_losses(RequestsSection(source="facts", path="others.jsonl"))


def test_export_writes_a_model_that_anything_loads(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", "model", "--delta", "delta.safetensors")
    assert memit("export", "out/here", "--dtype", "bfloat16", *words) == 0
    memit("apply", "model", "--delta", "delta.safetensors")
    edited = load_model("model", device="cpu").model.state_dict()
    exported = load_model("out/here", dtype="bfloat16", device="cpu").model.state_dict()
    assert edited.keys() == exported.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, edited[name].to(torch.bfloat16))
    before = contents(place / "out" / "here")
    assert {path.stat().st_mode & 0o044 for path in (place / "out" / "here").iterdir()} == {0o044}
    capsys.readouterr()
    assert memit("export", "out/here", *words) == 2
    assert "out/here" in said(capsys)
    assert contents(place / "out" / "here") == before
    assert [path.name for path in (place / "out").iterdir()] == ["here"]


def test_an_adapter_or_a_delta_is_exported_with_a_card(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", "model", "--delta", "delta.safetensors")
    (place / "model/README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    delta = WeightDelta.load(place / "delta.safetensors").naming(facts("Ada", "<b>"))
    delta.save(place / "delta.safetensors")
    assert memit("export", "adapter", "--as", "lora", *words) == 0
    assert "Rank 3, relative error" in said(capsys)
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in (place / "adapter").iterdir()) == files
    assert memit("export", "bare", "--as", "delta", *words) == 0
    assert (place / "bare/delta.safetensors").read_bytes() == Path(words[-1]).read_bytes()
    for folder in ("adapter", "bare"):
        card = ModelCard.load(place / folder / "README.md")
        assert card.data.to_dict()["license"] == "mit"
        assert card.data.to_dict()["base_model"] == "model"
        for said_of in (
            "Ada lives in → Rome",
            "&lt;b&gt; lives in",
            "## Limits",
            "Without the edit",
        ):
            assert said_of in card.text or folder == "bare"
    assert memit("export", "other", "--as", "gguf", *words) != 0
    assert license_of(None, ModelSection(package="no-such-package")) is None


def test_an_edit_beyond_the_limits_is_taken_by_force_only(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "params.yaml").write_text("limits: {score: 85, perplexity_ratio: 1.1}")
    manifests = finished(facts("Ada"), place / "delta.safetensors")
    measured = {"score": 82.5, "perplexity": 12.0}
    edit = {"update_ratio": {"1": 0.2}}
    write_json(METRICS_FILE, {"before": {"perplexity": 10.0}, "after": measured, "edit": edit})
    rows = "prompt,took,hurt\nAda lives in,false,0\nBo lives in,true,2\n"
    write_text(FACTS_FILE, rows)
    assert memit("apply", "model") == 3
    assert "not measured" in said(capsys)  # the metrics may be those of an earlier edit
    files = [METRICS_FILE, FACTS_FILE]
    finish_step("evaluation", files, {"edit": manifests["edit"]}, [])
    for words in (("apply", "model"), ("export", "out", "--as", "delta")):
        assert memit(*words) == 3
        text = said(capsys)
        assert "score is 82.5, below 85; perplexity_ratio is 1.2, above 1.1" in text
        assert "1 facts did not take, such as 'Ada lives in'. 1 facts hurt others" in text
    assert applied_edits(place / "model") == []
    assert memit("apply", "model", "--force") == 0
    write_json(DETAILS_FILE, {"after": {"perplexity_low": 11.0, "perplexity_high": 13.0}})
    finish_step("evaluation", [*files, DETAILS_FILE], {"edit": manifests["edit"]}, [])
    assert memit("export", "out", "--as", "delta", "--force") == 0
    row = "| Perplexity | 10.00 | 12.00 | 11.00 to 13.00 | – | – |"
    assert row in ModelCard.load(place / "out" / "README.md").text
    edit = manifests["edit"].model_copy(update={"files": {"other": "digest"}})
    finish_step("evaluation", [*files, DETAILS_FILE], {"edit": edit}, [])
    assert memit("export", "stale", "--as", "delta", "--force") == 0
    assert row not in ModelCard.load(place / "stale" / "README.md").text
    finish_step("evaluation", [*files, DETAILS_FILE], {"edit": manifests["edit"]}, [])
    (place / "params.yaml").write_text("limits: {score: 82.5}")
    command.given_parameters.cache_clear()
    assert memit("apply", "model") == 0


def test_check_reads_counts_and_runs_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "params.yaml").write_text("model:\n  source: synthetic\n")
    fact = {"subject": "Ada", "prompt": "{} lives in", "target": "Rome"}
    facts = place / "facts.jsonl"
    facts.write_text(json.dumps(fact))
    assert memit("check", "facts.jsonl") == 0
    text = said(capsys)
    assert "records │ 1" in text
    assert "contradictions │ none" in text
    assert "edited │ all" in text
    facts.write_text(json.dumps(fact) + "\n" + json.dumps({**fact, "target": "Oslo"}))
    assert memit("check", "facts.jsonl") == 2
    assert "facts.jsonl" in said(capsys)
    targets = ("Rome", "Lima", "Rome", "Bonn")
    asking = [EditRequest("Ada", "{} lives in", target) for target in targets]
    write_records([Record(*each) for each in enumerate(asking)], place / "records.json")
    assert memit("check", "records.json") == 0
    assert "2 records contradict" in said(capsys)
    assert memit("check", "gone.jsonl") == 2
    assert "gone.jsonl" in said(capsys)
    assert not (place / ".cache").exists()


def test_check_says_that_a_sample_is_edited(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f'{{"subject": "{n}", "prompt": "{{}} lives in", "target": "Rome"}}' for n in "abc"]
    (place / "facts.jsonl").write_text("\n".join(lines))
    for count, status, words in ((2, 0, "edited │ 2, a sample"), (4, 2, "the count is 4, but 3")):
        (place / "params.yaml").write_text(
            f"model:\n  source: synthetic\nrequests:\n  count: {count}\n"
        )
        command.given_parameters.cache_clear()
        assert memit("check", "facts.jsonl") == status
        assert words in said(capsys)


def test_check_estimates_before_the_first_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "model:\n  source: local\n  path: model\n"
    (place / "params.yaml").write_text(f"{model}edit:\n  layers: [1]\n")
    (place / "facts.jsonl").write_text(
        '{"subject": "a", "prompt": "{} lives in", "target": "Rome"}\n'
        '{"subject": "Ada", "prompt": "The home of {} is", "target": "Rome"}\n'
    )
    assert memit("check", "facts.jsonl") == 0
    text = said(capsys)
    assert "1 of 2 prompts" in text
    assert "2048 sampled tokens" in text
    assert "memory │ about" in text


def test_an_estimate_grows_with_the_job() -> None:
    files = ModelFiles(
        source="hub",
        id="EleutherAI/gpt-j-6b",
        revision="0" * 40,
        files={},
        architecture="GPTJForCausalLM",
        layers=28,
        width=4096,
        inner_width=16384,
        parameters=6_050_882_784,
    )
    reference = ModelReference(
        directory="/", model=files, dtype="bfloat16", device="cpu", threads=1
    )
    hyperparameters = preset(files.id, files.shape)
    small, large = (
        estimate.estimate_edit(files, hyperparameters, count, Lengths(8, 8), reference)
        for count in (10, 10_000)
    )
    assert large.seconds > 10 * small.seconds
    assert small.memory > 12e9
    assert 6 * 4 * 16384**2 < small.disk < large.disk < 40e9
