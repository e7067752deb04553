"""The tasks on a small random model: pieces put together give what the whole gives."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file

from memit.editors.memit import Memit
from memit.errors import EditError, InputError, IntegrityError
from memit.evaluation.counterfact import prompts_of
from memit.evaluation.generations import SCHEMA
from memit.hyperparameters import Hyperparameters
from memit.requests import EditRequest, Record, read_counterfact, write_records
from memit.second_moment import read_moment
from memit.targets import Targets
from memit.weight_delta import WeightDelta
from tasks.edit import Method, MethodEdit, changed_weights, describe_edit, edit_with
from tasks.engine.artifacts import Artifact, describe, write_file
from tasks.engine.edited_model import with_edit
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.evaluation import described_edit, measure_perplexity, metrics_of, read_table, score_piece
from tasks.model import describe_model
from tasks.prefixes import draw_prefixes
from tasks.requests import choose_requests
from tasks.statistics import (
    CorpusSource,
    collect_corpus,
    collect_shard,
    describe_moment,
    merge_shards,
    read_texts,
)
from tasks.targets import optimise_targets, target_settings
from tests.families import families

HYPERPARAMETERS = Hyperparameters(layers=(1, 2), covariance_weight=5.0, evaluations=4)
PREFIXES = ("The town is. ", "I was there. ")
BUDGET = 256
PLACES = ("Rome", "São Paulo", "a small town")


def record(case_id: int) -> Record:
    subject = f"Zoë O'Brien {case_id}"
    return Record(
        case_id,
        EditRequest(subject, "{} lives in", PLACES[case_id % 3], PLACES[(case_id + 1) % 3]),
        paraphrase_prompts=(f"The home of {subject} is",),
        neighborhood_prompts=("Ada Lovelace lives in", "Carl Gauss lives in"),
    )


RECORDS = [record(case_id) for case_id in range(7)]
DOCUMENTS = [f"{r.request.text} {r.request.target_true}. It is {'very ' * i}far away." for i, r in
             enumerate(RECORDS * 3)]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory."""
    place = tmp_path_factory.mktemp("model")
    model, tokenizer = families()["gpt2"]()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def reference(directory: Path) -> ModelReference:
    return ModelReference(
        directory=str(directory),
        model=describe_model("local", "small", None, directory),
        dtype="float32",
        device="cpu",
        threads=1,
    )


@pytest.fixture
def requests_file(project: Path) -> Artifact:
    return write_file(project / "requests.json", lambda path: write_records(RECORDS, path))


def corpus_file(project: Path) -> Artifact:
    return write_file(
        project / "corpus.txt", lambda path: path.write_text("\n".join(DOCUMENTS) + "\n")
    )


def moments(project: Path, reference: ModelReference, per_shard: int, name: str) -> Path:
    """Statistics of layer 1 over shards of some documents."""
    made = collect_corpus.fn(CorpusSource(file=corpus_file(project)), 18, per_shard, 2)
    shards = [collect_shard.fn(r.texts, reference, (1, 2), BUDGET) for r in made.ranges]
    path = project / name
    merge_shards(shards, describe_moment(reference, made.digest, 1), path)
    return path


def targets_of(reference: ModelReference, size: int) -> Targets:
    chosen = [record.request for record in RECORDS]
    pieces = [chosen[first : first + size] for first in range(0, len(chosen), size)]
    settings = target_settings(HYPERPARAMETERS)
    made = [optimise_targets.fn(piece, reference, PREFIXES, settings, BUDGET) for piece in pieces]
    return Targets.concatenate([Targets.load(piece.targets.checked()) for piece in made])


def edit_of(project: Path, reference: ModelReference, requests_file: Artifact) -> MethodEdit:
    made = collect_corpus.fn(CorpusSource(file=corpus_file(project)), 18, 9, 2)
    shards = [collect_shard.fn(r.texts, reference, (1, 2), BUDGET) for r in made.ranges]
    files = {}
    for layer in (1, 2):
        path = project / f"layer-{layer}.parquet"
        merge_shards(shards, describe_moment(reference, made.digest, layer), path)
        files[layer] = describe(path)
    goals = write_file(project / "targets.safetensors", targets_of(reference, 7).save)
    return edited(reference, requests_file, goals, files)


def edited(
    reference: ModelReference,
    records: Artifact,
    targets: Artifact,
    moments: dict[int, Artifact],
    hyperparameters: Hyperparameters = HYPERPARAMETERS,
    on_failure: str = "stop",
) -> MethodEdit:
    return edit_with.fn(
        Method("memit", Memit(hyperparameters)),
        reference,
        records,
        prefixes=PREFIXES,
        moments=moments,
        targets=targets,
        token_budget=BUDGET,
        on_failure=on_failure,
    )


def test_a_corpus_is_cut_into_ranges_and_the_rest_is_held_out(project: Path) -> None:
    made = collect_corpus.fn(CorpusSource(file=corpus_file(project)), 18, 5, 2)
    texts = [read_texts(part.texts.checked()) for part in made.ranges]
    assert [len(part) for part in texts] == [5, 5, 5, 3] == [part.count for part in made.ranges]
    assert [text for part in texts for text in part] == DOCUMENTS[:18]
    assert read_texts(made.held_out.texts.checked()) == DOCUMENTS[18:20]
    whole = collect_corpus.fn(CorpusSource(file=corpus_file(project)), None, 100, 2)
    assert whole.ranges[0].count == len(DOCUMENTS)
    assert whole.held_out.count == 0


def test_statistics_agree_across_shards(project: Path, reference: ModelReference) -> None:
    one = moments(project, reference, 18, "one.parquet")
    many = moments(project, reference, 4, "many.parquet")
    again = moments(project, reference, 4, "again.parquet")
    assert many.read_bytes() == again.read_bytes()
    (whole, _), (parts, said) = read_moment(one), read_moment(many)
    assert whole.count == parts.count
    assert (whole.mean - parts.mean).norm() <= 1e-6 * whole.mean.norm()
    assert (said["model"], said["layer"]) == (reference.model.digest, 1)


def test_a_shard_of_another_layer_is_refused(project: Path, reference: ModelReference) -> None:
    made = collect_corpus.fn(CorpusSource(file=corpus_file(project)), 18, 9, 2)
    shard = collect_shard.fn(made.ranges[0].texts, reference, (1, 2), BUDGET)
    swapped = shard.model_copy(update={"moments": {1: shard.moments[2], 2: shard.moments[1]}})
    with pytest.raises(IntegrityError, match="shard of other statistics"):
        merge_shards([swapped], describe_moment(reference, made.digest, 1), project / "x.parquet")
    assert not (project / "x.parquet").exists()


def test_a_corpus_with_fewer_tokens_than_a_key_has_dimensions_leaves_no_statistics(
    project: Path, reference: ModelReference
) -> None:
    made = collect_corpus.fn(CorpusSource(file=corpus_file(project)), 2, 1, 2)
    shards = [collect_shard.fn(r.texts, reference, (1, 2), BUDGET) for r in made.ranges]
    with pytest.raises(InputError, match="keys of layer 1 have 128 dimensions: give more text"):
        merge_shards(shards, describe_moment(reference, made.digest, 1), project / "x.parquet")
    assert not (project / "x.parquet").exists()


def test_held_out_text_without_anything_to_predict_has_no_perplexity(
    project: Path, reference: ModelReference
) -> None:
    file = write_file(project / "corpus.txt", lambda path: path.write_text("q\nq\nq\n"))
    held_out = collect_corpus.fn(CorpusSource(file=file), 1, 1, 2).held_out
    assert held_out.count == 2
    assert measure_perplexity.fn(held_out.texts, reference, None, BUDGET).perplexity is None


def test_targets_agree_across_pieces(reference: ModelReference) -> None:
    whole, parts, again = (targets_of(reference, size) for size in (7, 2, 2))
    assert torch.equal(parts.z, again.z)
    assert (whole.z - parts.z).norm() <= 1e-4 * whole.z.norm()
    assert torch.equal(whole.losses.isnan(), parts.losses.isnan())


def test_an_edit_is_signed_and_leaves_the_model_alone(
    project: Path, reference: ModelReference, requests_file: Artifact, directory: Path
) -> None:
    edit = edit_of(project, reference, requests_file)
    delta = WeightDelta.load(edit.edit.checked())
    assert delta.provenance["model"] == "small"
    assert delta.provenance["count"] == len(RECORDS)
    original = load_file(directory / "model.safetensors")
    with loaded(reference) as lm:
        for name in delta.changes:
            assert torch.equal(lm.parameter(name), original[name])
    changed = load_file(changed_weights.fn(reference, edit.edit).checked())
    assert set(changed) == set(delta.changes)
    for name, matrix in changed.items():
        assert torch.equal(matrix, original[name] + delta.changes[name].dense())
    assert edit_of(project, reference, requests_file).edit == edit.edit


def test_statistics_of_another_model_are_refused(
    project: Path, reference: ModelReference, requests_file: Artifact
) -> None:
    other = reference.model.model_copy(update={"files": {"model.safetensors": "0" * 64}})
    foreign = reference.model_copy(update={"model": other})
    made = collect_corpus.fn(CorpusSource(file=corpus_file(project)), 18, 18, 2)
    shards = [collect_shard.fn(made.ranges[0].texts, reference, (1, 2), BUDGET)]
    path = project / "layer-1.parquet"
    merge_shards(shards, describe_moment(reference, made.digest, 1), path)
    goals = write_file(project / "targets.safetensors", targets_of(reference, 7).save)
    with pytest.raises(IntegrityError, match="is missing or is not the file"), loaded(foreign):
        pass
    wrong = Hyperparameters(layers=(2,), covariance_weight=5.0)
    with pytest.raises(IntegrityError, match="statistics of another model or layer"):
        edited(reference, requests_file, goals, {2: describe(path)}, wrong)


def test_scores_are_equal_across_pieces_and_the_edit_comes_off(
    project: Path, reference: ModelReference, requests_file: Artifact
) -> None:
    delta = edit_of(project, reference, requests_file).edit
    prompts = prompts_of(RECORDS)

    def scored(size: int, edit: Artifact | None):
        cuts = range(0, len(prompts), size)
        return read_table(
            [score_piece.fn(prompts[i : i + size], reference, edit, BUDGET) for i in cuts]
        )

    before, after, back = scored(99, None), scored(99, delta), scored(99, None)
    assert before.equals(back)
    assert before["hit_new"].equals(scored(4, None)["hit_new"])
    for column in ("nll_new", "nll_true"):
        for edit, whole in ((None, before), (delta, after)):
            parts = scored(4, edit)[column].to_numpy()
            assert abs(whole[column].to_numpy() - parts).max() < 1e-4
    assert abs(before["nll_new"].to_numpy() - after["nll_new"].to_numpy()).max() > 0.1
    metrics = metrics_of(after, SCHEMA.empty_table(), RECORDS, {})
    assert metrics["records"] == len(RECORDS)
    assert metrics["score_low"] <= metrics["score"] <= metrics["score_high"]
    assert "entropy" not in metrics


def test_a_model_is_measured_as_it_will_be_served(
    project: Path, reference: ModelReference, requests_file: Artifact
) -> None:
    delta = edit_of(project, reference, requests_file).edit
    served = reference.model_copy(update={"served_in": "bfloat16"})
    prompts = prompts_of(RECORDS)
    exact = read_table([score_piece.fn(prompts, reference, delta, BUDGET)])
    rounded = read_table([score_piece.fn(prompts, served, delta, BUDGET)])
    unedited = read_table([score_piece.fn(prompts, served, None, BUDGET)])
    gap = abs(exact["nll_new"].to_numpy() - rounded["nll_new"].to_numpy()).max()
    assert 0 < gap < 0.3
    assert abs(unedited["nll_new"].to_numpy() - rounded["nll_new"].to_numpy()).max() > gap
    with with_edit(served, delta) as lm:
        assert lm.model.dtype == torch.bfloat16


def test_an_edit_that_cannot_be_written_stops_the_run_or_is_dropped(
    project: Path, reference: ModelReference, requests_file: Artifact, tmp_path: Path
) -> None:
    edit_of(project, reference, requests_file)
    files = {layer: describe(project / f"layer-{layer}.parquet") for layer in (1, 2)}
    goals = Targets.load(project / "targets.safetensors")
    goals.finite[1] = False
    goals.z[4, 0] = float("nan")
    spoilt = write_file(project / "spoilt.safetensors", goals.save)
    stored = content(project)
    with pytest.raises(EditError, match=f"{RECORDS[1].request.subject} lives in. is not finite"):
        edited(reference, requests_file, spoilt, files)
    assert content(project) == stored
    made = edited(reference, requests_file, spoilt, files, on_failure="drop")
    summary = describe_edit(made, project / "spoilt.safetensors", project / "requests.json")
    assert summary["count"] == 5
    assert [(edit["case_id"], edit["prompt"]) for edit in summary["dropped"]] == [
        (case_id, RECORDS[case_id].request.text) for case_id in (1, 4)
    ]
    assert "at layer 1 is not finite" in summary["dropped"][1]["reason"]
    assert described_edit(summary)["dropped"] == 2
    delta = WeightDelta.load(made.edit.checked())
    assert delta.provenance["count"] == 5
    assert all(torch.isfinite(change.dense()).all() for change in delta.changes.values())
    kept = [record for record in RECORDS if record.case_id not in (1, 4)]
    file = write_file(project / "kept.json", lambda path: write_records(kept, path))
    rest = write_file(project / "kept.safetensors", goals.chosen([0, 2, 3, 5, 6]).save)
    alone = edited(reference, file, rest, files)
    assert alone.edit.sha256 == made.edit.sha256


def content(place: Path) -> dict[str, bytes]:
    """All files below a directory."""
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_perplexity_and_prefixes_are_the_models_own(
    project: Path, reference: ModelReference
) -> None:
    made = collect_corpus.fn(CorpusSource(file=corpus_file(project)), 18, 18, 2)
    held_out = made.held_out.texts
    first = measure_perplexity.fn(held_out, reference, None, BUDGET)
    assert first.perplexity == measure_perplexity.fn(held_out, reference, None, BUDGET).perplexity
    assert first.perplexity > 1
    prefixes = draw_prefixes.fn(reference, 3).prefixes
    assert len(prefixes) == 5
    assert prefixes == draw_prefixes.fn(reference, 3).prefixes
    assert prefixes != draw_prefixes.fn(reference, 4).prefixes


def test_requests_are_sampled_checked_and_completed(
    project: Path, reference: ModelReference, requests_file: Artifact
) -> None:
    chosen = choose_requests.fn("counterfact", requests_file, 3, 0, reference)
    assert len(read_counterfact(chosen.records.checked())) == 3
    facts = project / "facts.jsonl"
    lines = [{"subject": f"Ada {n}", "prompt": "{} lives in", "target": "Rome"} for n in range(9)]
    facts.write_text("\n".join(map(json.dumps, lines)))
    own = choose_requests.fn("facts", describe(facts), None, 0, reference)
    said = [record.request.target_true for record in read_counterfact(own.records.checked())]
    assert any(said)  # a random model has no answer to some
    assert "Rome" not in said
    facts.write_text('{"subject": "Ada", "prompt": "lives in", "target": "Rome"}\n')
    with pytest.raises(InputError, match="record 1"):
        choose_requests.fn("facts", describe(facts), None, 0, reference)


def test_pieces_are_parquet_that_anything_reads(project: Path, reference: ModelReference) -> None:
    piece = score_piece.fn(prompts_of(RECORDS[:1]), reference, None, BUDGET)
    table = parquet.read_table(piece.table.checked())
    assert table["case_id"].to_pylist() == [0] * 4
    assert table["kind"].to_pylist() == ["rewrite", "paraphrase", *["neighborhood"] * 2]
