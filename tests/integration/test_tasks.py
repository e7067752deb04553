"""The tasks on a small random model: pieces put together give what the whole gives."""

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from memit.editors.memit import Memit
from memit.errors import EditError, InputError, IntegrityError
from memit.evaluation.counterfact import ScoredPrompt, prompts_of
from memit.evaluation.generations import SCHEMA
from memit.evaluation.kept import SCHEMA as KEPT_SCHEMA
from memit.generation import generate_texts
from memit.hyperparameters import Hyperparameters
from memit.requests import EditRequest, Record, read_counterfact, write_records
from memit.second_moment import read_moment
from memit.targets import Targets
from memit.tracing import trace, traced_prompts
from memit.weight_delta import WeightDelta
from tasks.edit import Method, MethodEdit, changed_weights, describe_edit, edit_with
from tasks.engine.artifacts import Artifact, describe, write_file
from tasks.engine.edited_model import with_edit
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.tables import read_tables
from tasks.evaluation import (
    Measured,
    described_edit,
    examples,
    measure_piece,
    read_held_out,
    without_details,
)
from tasks.prefixes import draw_prefixes
from tasks.reporting.tracing import draw_tracing, effects
from tasks.requests import choose_requests
from tasks.statistics import (
    Corpus,
    CorpusSource,
    collect_corpus,
    collect_shard,
    describe_moment,
    merge_shards,
    read_texts,
)
from tasks.targets import StoredTargets, optimise_targets, plan_pieces, target_settings
from tasks.tracing import choose_traced, trace_piece
from tests import contents
from tests.integration.small_model import small_model

HYPERPARAMETERS = Hyperparameters(layers=(1, 2), covariance_weight=5.0, evaluations=4)
PREFIXES = ("The town is. ", "I was there. ")
BUDGET = 256
CITIES = ("Rome", "São Paulo", "a small town")


def record(case_id: int) -> Record:
    subject = f"Zoë O'Brien {case_id}"
    return Record(
        case_id,
        EditRequest(subject, "{} lives in", CITIES[case_id % 3], CITIES[(case_id + 1) % 3]),
        paraphrase_prompts=(f"The home of {subject} is",),
        neighborhood_prompts=("Ada Lovelace lives in", "Carl Gauss lives in"),
    )


RECORDS = [record(case_id) for case_id in range(7)]
DOCUMENTS = [
    f"{r.request.text} {r.request.target_true}. It is {'very ' * i}far away."
    for i, r in enumerate(RECORDS * 3)
]


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory that pieces are stored in."""
    path = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(path))
        yield path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ModelReference:
    return small_model(tmp_path_factory.mktemp("model"))


@dataclass(frozen=True)
class Inputs:
    """What an edit reads."""

    model: ModelReference
    records: Artifact
    targets: Artifact
    moments: dict[int, Artifact]

    def edited(
        self, hyperparameters: Hyperparameters = HYPERPARAMETERS, on_failure: str = "stop"
    ) -> MethodEdit:
        return edit_with.uncached(
            Method("memit", Memit(hyperparameters)),
            self.model,
            self.records,
            prefixes=PREFIXES,
            moments=self.moments,
            targets=self.targets,
            token_budget=BUDGET,
            on_failure=on_failure,
        )


@pytest.fixture(scope="module")
def inputs(project: Path, reference: ModelReference) -> Inputs:
    records = write_file(project / "requests.json", lambda path: write_records(RECORDS, path))
    targets = write_file(project / "targets.safetensors", targets_of(reference, 7).save)
    paths = {layer: project / f"layer-{layer}.parquet" for layer in HYPERPARAMETERS.layers}
    for layer, path in paths.items():
        write_moment(path, reference, corpus_of(project, 9), layer)
    return Inputs(reference, records, targets, {la: describe(path) for la, path in paths.items()})


@pytest.fixture(scope="module")
def edit(inputs: Inputs) -> Artifact:
    return inputs.edited().edit


def corpus_of(project: Path, per_shard: int, *, documents: int | None = 18) -> Corpus:
    text = "\n".join(DOCUMENTS) + "\n"
    file = write_file(project / "corpus.txt", lambda path: path.write_text(text))
    return collect_corpus.uncached(CorpusSource(file=file), documents, per_shard, 2)


def write_moment(path: Path, reference: ModelReference, corpus: Corpus, layer: int) -> None:
    shards = [collect_shard.uncached(r.texts, reference, (1, 2), BUDGET) for r in corpus.ranges]
    merge_shards(shards, describe_moment(reference, corpus.digest, layer), path)


def targets_of(reference: ModelReference, size: int) -> Targets:
    chosen = [record.request for record in RECORDS]
    pieces = [chosen[first : first + size] for first in range(0, len(chosen), size)]
    settings = target_settings(HYPERPARAMETERS)
    made = [
        optimise_targets.uncached(piece, reference, PREFIXES, settings, BUDGET) for piece in pieces
    ]
    return Targets.concatenate([Targets.load(piece.checked()) for piece in made])


def test_a_corpus_is_cut_into_ranges_and_the_rest_is_held_out(project: Path) -> None:
    made = corpus_of(project, 5)
    texts = [read_texts(part.texts.checked()) for part in made.ranges]
    assert [len(part) for part in texts] == [5, 5, 5, 3] == [part.count for part in made.ranges]
    assert [text for part in texts for text in part] == DOCUMENTS[:18]
    assert read_texts(made.held_out.texts.checked()) == DOCUMENTS[18:20]
    whole = corpus_of(project, 100, documents=None)
    assert whole.ranges[0].count == len(DOCUMENTS)
    assert whole.held_out.count == 0


def test_statistics_agree_across_shards(tmp_path: Path, reference: ModelReference) -> None:
    one, many, again = (tmp_path / name for name in ("one", "many", "again"))
    for path, per_shard in ((one, 18), (many, 4), (again, 4)):
        write_moment(path, reference, corpus_of(tmp_path, per_shard), 1)
    assert many.read_bytes() == again.read_bytes()
    (whole, _), (parts, origin) = read_moment(one), read_moment(many)
    assert whole.count == parts.count
    assert (whole.mean - parts.mean).norm() <= 1e-6 * whole.mean.norm()
    assert (origin["model"], origin["layer"]) == (reference.model.digest, 1)


def test_a_shard_of_another_layer_is_refused(tmp_path: Path, reference: ModelReference) -> None:
    made = corpus_of(tmp_path, 9)
    shard = collect_shard.uncached(made.ranges[0].texts, reference, (1, 2), BUDGET)
    swapped = shard.model_copy(update={"moments": {1: shard.moments[2], 2: shard.moments[1]}})
    with pytest.raises(IntegrityError):
        merge_shards([swapped], describe_moment(reference, made.digest, 1), tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()


def test_a_corpus_with_fewer_tokens_than_a_key_has_dimensions_leaves_no_statistics(
    tmp_path: Path, reference: ModelReference
) -> None:
    with pytest.raises(InputError, match="layer 1"):
        write_moment(tmp_path / "x.parquet", reference, corpus_of(tmp_path, 1, documents=2), 1)
    assert not (tmp_path / "x.parquet").exists()


def test_held_out_text_without_anything_to_predict_has_no_perplexity(
    tmp_path: Path, reference: ModelReference
) -> None:
    file = write_file(tmp_path / "corpus.txt", lambda path: path.write_text("q\nq\nq\n"))
    held_out = collect_corpus.uncached(CorpusSource(file=file), 1, 1, 2).held_out
    assert held_out.count == 2
    assert read_held_out.uncached(held_out.texts, reference, BUDGET) is None


def test_targets_agree_across_pieces(inputs: Inputs, reference: ModelReference) -> None:
    whole = Targets.load(inputs.targets.checked())
    parts, again = (targets_of(reference, 2) for _ in range(2))
    assert torch.equal(parts.z, again.z)
    assert (whole.z - parts.z).norm() <= 1e-4 * whole.z.norm()
    assert torch.equal(whole.losses.isnan(), parts.losses.isnan())


def optimised(
    stored: StoredTargets, requests: Sequence[EditRequest], reference: ModelReference, place: Path
) -> StoredTargets:
    """The stored targets with those of the requests, through the file; at most two in a piece."""
    settings = target_settings(replace(HYPERPARAMETERS, evaluations=2))
    plan = plan_pieces(stored.missing(requests), 2, place / "plan.json")
    made = [
        optimise_targets.uncached(piece, reference, PREFIXES, settings, BUDGET) for piece in plan
    ]
    (place / "plan.json").unlink(missing_ok=True)
    stored = stored.with_pieces(plan, made)
    stored.save(place / "stored.safetensors")
    return StoredTargets.load(place / "stored.safetensors", stored.key)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sets(st.integers(0, 6), min_size=1), min_size=2, max_size=4))
def test_a_fact_keeps_its_target_whatever_comes_and_goes(
    reference: ModelReference, tmp_path_factory: pytest.TempPathFactory, lists: list[set[int]]
) -> None:
    place = tmp_path_factory.mktemp("stored")
    stored, first = StoredTargets("key", {}, None), dict[int, torch.Tensor]()
    for numbers in lists:
        requests = [RECORDS[number].request for number in numbers]
        new = [number for number in numbers if number not in first]
        assert stored.missing(requests) == [RECORDS[number].request for number in new]
        stored = optimised(stored, requests, reference, place)
        found = dict(zip(numbers, stored.of(requests).z, strict=True))
        first |= {number: found[number] for number in new}
        assert all(torch.equal(found[number], first[number]) for number in numbers)
    assert len(stored.rows) == len(first)


def test_stored_targets_of_other_inputs_or_damaged_ones_are_not_used(
    reference: ModelReference, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    requests, path = [RECORDS[0].request], tmp_path / "stored.safetensors"
    stored = optimised(StoredTargets("key", {}, None), requests, reference, tmp_path)
    assert stored.missing(requests) == []
    assert StoredTargets.load(path, "other").missing(requests) == requests
    assert not caplog.records
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert StoredTargets.load(path, "key").missing(requests) == requests
    assert "damaged" in caplog.text


def test_the_plan_of_a_killed_run_is_kept_and_extended(tmp_path: Path) -> None:
    requests, plan = [record.request for record in RECORDS], tmp_path / "plan.json"
    killed = plan_pieces(requests[:5], 2, plan)
    assert killed == [requests[:2], requests[2:4], requests[4:5]]
    assert plan_pieces(requests[:5], 2, plan) == killed
    # Two facts are withdrawn, one of them with its piece, and two are added in front.
    wanted = [requests[6], requests[5], *requests[:3]]
    assert plan_pieces(wanted, 2, plan) == [*killed[:2], [requests[6], requests[5]]]
    plan.write_text("[[{")
    assert plan_pieces(wanted[:1], 2, plan) == [wanted[:1]]


def test_a_model_computes_alike_in_the_thread_that_loads_it_and_in_others(
    reference: ModelReference,
) -> None:
    def threads() -> int:
        with loaded(reference):
            return torch.get_num_threads()

    torch.set_num_threads(reference.threads + 1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(threads).result() == reference.threads
    assert threads() == reference.threads


def test_two_pieces_share_the_weights_and_other_tasks_wait(reference: ModelReference) -> None:
    two_cores = reference.model_copy(update={"threads": 2})
    found, events = [], []
    both_in, go_on = threading.Barrier(3, timeout=60), threading.Event()

    def piece() -> None:
        with loaded(two_cores, shared=True) as lm:
            both_in.wait()  # with one piece at a time nobody gets past this
            go_on.wait(60)
            logits = lm.model(torch.tensor([[1, 2, 3]])).logits
            found.append((lm, torch.get_num_threads(), logits))
        events.append("piece")

    def edit() -> None:
        with loaded(two_cores) as lm:
            events.append("alone")
            found.append((lm, torch.get_num_threads(), lm.model(torch.tensor([[1, 2, 3]])).logits))

    with ThreadPoolExecutor(3) as pool, torch.no_grad():
        pieces = [pool.submit(piece) for _ in range(2)]
        both_in.wait()
        waiting = pool.submit(edit)
        assert not events
        go_on.set()
        for each in (*pieces, waiting):
            each.result()
    (one, *_, first), (other, *_, second), (main, *_, third) = found
    assert [threads for _, threads, _ in found] == [1, 1, 2]
    assert one is not other is not main
    assert torch.equal(first, second)
    torch.testing.assert_close(first, third)
    assert one.weight(1).data_ptr() == other.weight(1).data_ptr() == main.weight(1).data_ptr()


def test_an_edit_is_signed_and_leaves_the_model_alone(
    reference: ModelReference, inputs: Inputs, edit: Artifact
) -> None:
    delta = WeightDelta.load(edit.checked())
    told = delta.provenance
    assert (told["method"], told["model"], told["count"]) == ("memit", "small", len(RECORDS))
    assert tuple(told["settings"]["hyperparameters"]["layers"]) == HYPERPARAMETERS.layers
    assert set(told["base"]["sha256"]) == set(delta.changes)
    original = load_file(Path(reference.directory, "model.safetensors"))
    with loaded(reference) as lm:
        for name in delta.changes:
            assert torch.equal(lm.parameter(name), original[name])
    changed = load_file(changed_weights.uncached(reference, edit).checked())
    assert set(changed) == set(delta.changes)
    for name, matrix in changed.items():
        assert torch.equal(matrix, original[name] + delta.changes[name].dense())
    assert inputs.edited().edit == edit


def test_statistics_of_another_model_or_layer_are_refused(
    reference: ModelReference, inputs: Inputs
) -> None:
    other = reference.model.model_copy(update={"files": {"model.safetensors": "0" * 64}})
    foreign = reference.model_copy(update={"model": other})
    with pytest.raises(IntegrityError, match=r"model\.safetensors"), loaded(foreign):
        pass
    wrong = Hyperparameters(layers=(2,), covariance_weight=5.0)
    with pytest.raises(IntegrityError, match="layer"):
        replace(inputs, moments={2: inputs.moments[1]}).edited(wrong)


def scores(
    prompts: Sequence[ScoredPrompt], model: ModelReference, edit: Artifact | None
) -> Artifact:
    return measure_piece.uncached(prompts, "prompts", model, edit, BUDGET)


def test_scores_are_equal_across_pieces_and_the_edit_comes_off(
    reference: ModelReference, edit: Artifact
) -> None:
    prompts = prompts_of(RECORDS)

    def scored(size: int, edit: Artifact | None):
        cuts = range(0, len(prompts), size)
        pieces = [prompts[start : start + size] for start in cuts]
        return read_tables(scores(piece, reference, edit) for piece in pieces)

    before, after, back = scored(99, None), scored(99, edit), scored(99, None)
    assert before["case_id"].to_pylist()[:5] == [0] * 4 + [1]
    assert before["kind"].to_pylist()[:4] == ["rewrite", "paraphrase", *["neighborhood"] * 2]
    assert before.equals(back)
    assert before["hit_new"].equals(scored(4, None)["hit_new"])
    for whole, parts in ((before, scored(4, None)), (after, scored(4, edit))):
        for column in ("nll_new", "nll_true"):
            assert abs(whole[column].to_numpy() - parts[column].to_numpy()).max() < 1e-4
    assert abs(before["nll_new"].to_numpy() - after["nll_new"].to_numpy()).max() > 0.1
    none = SCHEMA.empty_table()
    measured = Measured(after, none, KEPT_SCHEMA.empty_table(), none, None, None, {})
    metrics = measured.metrics(RECORDS, {})
    assert metrics["records"] == len(RECORDS)
    assert metrics["score_low"] <= metrics["score"] <= metrics["score_high"]
    assert "entropy" not in metrics


def test_a_model_is_measured_as_it_will_be_served(
    reference: ModelReference, edit: Artifact
) -> None:
    served = reference.model_copy(update={"served_in": "bfloat16"})
    prompts = prompts_of(RECORDS)
    given = ((reference, edit), (served, edit), (served, None))
    exact, rounded, unedited = (
        read_tables([scores(prompts, model, delta)])["nll_new"].to_numpy() for model, delta in given
    )
    assert 0 < abs(exact - rounded).max() < 0.3
    assert abs(unedited - rounded).max() > abs(exact - rounded).max()
    with with_edit(served, edit) as lm:
        assert lm.model.dtype == torch.bfloat16


def test_an_edit_that_cannot_be_written_stops_the_run_or_is_dropped(
    project: Path, inputs: Inputs
) -> None:
    targets = Targets.load(inputs.targets.checked())
    targets.finite[1] = False
    targets.z[4, 0] = float("nan")
    spoilt = replace(inputs, targets=write_file(project / "spoilt.safetensors", targets.save))
    stored = contents(project)
    with pytest.raises(EditError, match=RECORDS[1].request.text):
        spoilt.edited()
    assert contents(project) == stored
    made = spoilt.edited(on_failure="drop")
    summary = describe_edit(made, project / "spoilt.safetensors", project / "requests.json")
    assert summary["count"] == 5
    assert [(edit["case_id"], edit["prompt"]) for edit in summary["dropped"]] == [
        (case_id, RECORDS[case_id].request.text) for case_id in (1, 4)
    ]
    assert "layer 1" in summary["dropped"][1]["reason"]
    assert described_edit(summary)["dropped"] == 2
    delta = WeightDelta.load(made.edit.checked())
    assert delta.provenance["count"] == 5
    assert all(torch.isfinite(change.dense()).all() for change in delta.changes.values())
    kept = [record for record in RECORDS if record.case_id not in (1, 4)]
    file = write_file(project / "kept.json", lambda path: write_records(kept, path))
    rest = write_file(project / "kept.safetensors", targets.chosen([0, 2, 3, 5, 6]).save)
    alone = replace(inputs, records=file, targets=rest).edited()
    assert alone.edit.sha256 == made.edit.sha256
    targets.finite[:] = False
    none = replace(inputs, targets=write_file(project / "none.safetensors", targets.save))
    with pytest.raises(EditError):
        none.edited(on_failure="drop")


def test_perplexity_and_prefixes_are_the_models_own(
    project: Path, reference: ModelReference
) -> None:
    held_out = corpus_of(project, 18).held_out.texts
    found = [read_held_out.uncached(held_out, reference, BUDGET) for _ in range(2)]
    (_, first), (_, again) = (one for one in found if one)
    assert first == again > 1
    prefixes = draw_prefixes.uncached(reference, 3)
    assert len(prefixes) == 5
    assert prefixes == draw_prefixes.uncached(reference, 3)
    assert prefixes != draw_prefixes.uncached(reference, 4)


def test_examples_are_of_different_relations_as_long_as_there_are_some() -> None:
    relations = ["a", "a", "b", "a", "c", "b"]
    records = [
        Record(case, EditRequest("Ada", "{} lives in", "Rome", "Paris", relation))
        for case, relation in enumerate(relations)
    ]
    assert [record.case_id for record in examples(records, 4)] == [0, 2, 4, 1]
    assert len(examples(records, 9)) == 6


def test_requests_are_sampled_checked_and_completed(
    project: Path, reference: ModelReference, inputs: Inputs
) -> None:
    chosen = choose_requests.uncached("counterfact", inputs.records, 3, 0, reference)
    assert len(read_counterfact(chosen.records.checked())) == 3
    assert (chosen.count, chosen.available) == (3, len(RECORDS))
    facts = project / "facts.jsonl"
    lines = [{"subject": f"Ada {n}", "prompt": "{} lives in", "target": "Rome"} for n in range(9)]
    facts.write_text("\n".join(map(json.dumps, lines)))
    own = choose_requests.uncached("facts", describe(facts), None, 0, reference)
    assert (own.count, own.available) == (9, 9)
    answers = [record.request.target_true for record in read_counterfact(own.records.checked())]
    assert any(answers)  # a random model has no answer to some
    assert "Rome" not in answers
    facts.write_text('{"subject": "Ada", "prompt": "lives in", "target": "Rome"}\n')
    with pytest.raises(InputError, match="line 1"):
        choose_requests.uncached("facts", describe(facts), None, 0, reference)


def test_facts_that_the_model_answers_are_traced_in_pieces(
    tmp_path: Path, reference: ModelReference
) -> None:
    requests = [EditRequest(f"Person {n}", "{} lives in", "-", between="") for n in range(7)]
    with loaded(reference) as lm:
        texts = [request.text for request in requests]
        words = generate_texts(lm, texts, new_tokens=1, token_budget=BUDGET)
    answered = [
        Record(number, replace(request, target_true=word))
        for number, (request, word) in enumerate(zip(requests, words, strict=True))
    ]
    file = write_file(tmp_path / "facts.json", lambda path: write_records(answered, path))
    chosen = choose_traced.uncached("counterfact", file, 4, 0, reference)
    records = read_counterfact(chosen.records.checked())
    assert len(records) == chosen.count > 2
    pieces = [
        trace_piece.uncached(part, reference, chosen.deviation, BUDGET, mapped)
        for part, mapped in ((records[:2], False), (records[2:], False), (records[:2], True))
    ]
    traces = pyarrow.concat_tables([parquet.read_table(p.checked()) for p in pieces])
    found = effects(traces)
    with loaded(reference) as lm:
        prompts = traced_prompts(lm, [record.request for record in records])
        whole = trace(lm, prompts, chosen.deviation, token_budget=BUDGET)
    assert found["facts"] == chosen.count
    assert found["clean"] == pytest.approx(whole.clean.mean().item(), abs=1e-5)
    for kind, table in whole.restored.items():
        mean = (table - whole.noised[:, None]).mean(0)
        assert found["effects"][kind]["mean"] == pytest.approx(mean.tolist(), abs=1e-5)
    for name in ("a.png", "b.png"):
        draw_tracing(traces, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_facts_that_the_model_does_not_answer_are_not_traced(
    tmp_path: Path, reference: ModelReference
) -> None:
    file = write_file(tmp_path / "facts.json", lambda path: write_records(RECORDS, path))
    with pytest.raises(InputError, match="requests"):
        choose_traced.uncached("counterfact", file, 4, 0, reference)


def test_intervals_and_magnitudes_are_apart() -> None:
    measured = {"score": 1.0, "score_low": 0.5, "efficacy_accuracy": 3.0, "efficacy_magnitude": 2.0}
    plain, details = without_details({"after": measured})
    assert plain == {"after": {"score": 1.0, "efficacy_accuracy": 3.0}}
    assert details == {"after": {"score_low": 0.5, "efficacy_magnitude": 2.0}}
