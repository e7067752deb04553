"""What batches leave for the next one: whole or not at all, and only to batches that it fits."""

from dataclasses import replace
from pathlib import Path
from shutil import rmtree

import pytest

from memit import history
from memit.editors.base import Resources
from memit.editors.memit import Memit
from memit.errors import InputError, IntegrityError, ResourceError
from memit.history import keep_state, state_before
from memit.layer_walk import layer_keys
from memit.quadratic import Past
from memit.second_moment import SecondMoment, read_moment, write_moment
from memit.sequence import key_sums
from memit.targets import compute_targets, edit_rows
from memit.weight_delta import WeightDelta
from tests import contents
from tests.reference import HYPERPARAMETERS, REQUESTS, build, reference, relative

LAYER = HYPERPARAMETERS.layers[0]
ONE_LAYER = replace(HYPERPARAMETERS, layers=(LAYER,))


def keep(directory: Path, batch: str, model: str = "m", text: str = "") -> None:
    """Add the state after a batch whose files hold its name, or `text`."""
    files = [directory.with_name(f"{batch} {number}") for number in range(3)]
    for path in files:
        path.write_text(text or batch)
    before = state_before(directory, model, (1, 2), batch)
    keep_state(directory, before, batch, model, files[0], {1: files[1], 2: files[2]})


def test_a_batch_finds_what_the_one_before_it_has_left(tmp_path: Path) -> None:
    directory = tmp_path / "history"
    assert state_before(directory, "m", (1, 2), "a") is None
    keep(directory, "a")
    keep(directory, "b")
    keep(directory, "c")
    state = state_before(directory, "m", (1, 2), "d")
    assert state is not None
    assert state.batches == ("a", "b", "c")
    assert [path.read_text() for path in (state.delta, *state.sums.values())] == ["c"] * 3
    assert len(list(directory.iterdir())) == 2


def test_states_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    directory = tmp_path / "history"
    keep(directory, "a")
    (directory / "0001").rename(directory / "9999")
    keep(directory, "b")
    keep(directory, "c")
    assert sorted(path.name for path in directory.iterdir()) == ["10000", "10001"]


def test_the_last_batch_can_be_run_again_and_be_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "history"
    keep(directory, "a")
    keep(directory, "b")
    before = contents(directory)
    keep(directory, "b")
    assert contents(directory) == before
    keep(directory, "b", text="with other settings")
    state = state_before(directory, "m", (1, 2), "c")
    assert state is not None
    assert (state.batches, state.delta.read_text()) == (("a", "b"), "with other settings")
    assert state_before(directory, "m", (1, 2), "b") == replace(
        state, folder=directory / "0001", batches=("a",)
    )


def test_the_last_batch_is_taken_back_by_deleting_its_folder(tmp_path: Path) -> None:
    directory = tmp_path / "history"
    for batch in "abc":
        keep(directory, batch)
    rmtree(directory / "0003")
    state = state_before(directory, "m", (1, 2), "c")
    assert state is not None
    assert state.batches == ("a", "b")
    with pytest.raises(InputError, match=r"batch 2 of 2.*not kept"):
        state_before(directory, "m", (1, 2), "b")


@pytest.mark.parametrize(
    ("model", "layers", "batch", "message"),
    [
        ("other", (1, 2), "c", "another model"),
        ("m", (1, 3), "c", "other layers"),
        ("m", (1, 2), "a", "batch 1 of 2"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    tmp_path: Path, model: str, layers: tuple[int, ...], batch: str, message: str
) -> None:
    directory = tmp_path / "history"
    keep(directory, "a")
    keep(directory, "b")
    before = contents(directory)
    with pytest.raises(InputError, match=message):
        state_before(directory, model, layers, batch)
    assert contents(directory) == before
    (directory / "0002" / "state.json").write_text("{")
    with pytest.raises(IntegrityError, match="0002"):
        state_before(directory, "m", (1, 2), "c")
    with pytest.raises(InputError, match="is a file"):
        state_before(directory / "0001" / "state.json", "m", (1, 2), "c")


@pytest.mark.parametrize("copied", range(3))
def test_a_killed_run_leaves_the_old_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: int
) -> None:
    directory = tmp_path / "history"
    keep(directory, "a")
    before, copy, calls = contents(directory), history.shutil.copyfile, []

    def full(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) > copied:
            raise OSError(28, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(history.shutil, "copyfile", full)
    with pytest.raises(ResourceError, match="No space"):
        keep(directory, "b")
    assert contents(directory) == before


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batches_add_up_to_the_edit_of_all_facts_at_once(family: str, tmp_path: Path) -> None:
    """One layer, no prefixes, so that keys are those at which targets are reached."""
    lm, editor = build(family), Memit(ONE_LAYER)
    targets = compute_targets(lm, REQUESTS, (), ONE_LAYER, token_budget=1 << 20)
    moments = {LAYER: SecondMoment(reference(family).covariances[LAYER] * 100, 100)}
    resources = Resources(1 << 20, moments=moments)
    at_once = editor.edit(lm, REQUESTS, replace(resources, targets=targets))
    whole: WeightDelta | None = None
    for number, request in enumerate(REQUESTS):
        given = replace(resources, targets=targets.chosen([number]))
        edit = editor.edit(lm, [request], given)
        edit.apply(lm)
        sums = key_sums(lm, [request], ONE_LAYER.layers, ONE_LAYER.key_average, resources)
        write_moment(sums[LAYER], tmp_path / "sums.parquet", {})
        keys = {LAYER: read_moment(tmp_path / "sums.parquet")[0]}
        resources = replace(resources, past=Past(keys))
        whole = edit if whole is None else edit.upon(whole)
    assert whole is not None
    rows = edit_rows(lm, REQUESTS, ())
    K = layer_keys(lm, rows, (LAYER,), ONE_LAYER.key_average, token_budget=1 << 20)[LAYER]
    assert relative(resources.past.keys[LAYER].sum, K @ K.T) < 1e-6
    assert resources.past.keys[LAYER].count == whole.provenance["count"] == len(REQUESTS)
    name = lm.weight_name(LAYER)
    assert relative(whole.changes[name].dense(), at_once.changes[name].dense()) < 1e-4
    for _ in REQUESTS:
        lm.applied[-1].delta.revert(lm)
    whole.apply(lm)
