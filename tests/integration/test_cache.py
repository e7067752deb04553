"""A cached task computes once, and again where something of its result is missing or damaged."""

from collections.abc import Callable
from pathlib import Path

import pytest
from prefect import flow, unmapped

import tasks.statistics
from memit.errors import IntegrityError
from tasks.engine import code
from tasks.engine.artifacts import write_text
from tasks.engine.cache import cached_task
from tasks.engine.checkpoints import work_directory
from tasks.engine.workers import thread_runner
from tasks.statistics import Corpus, CorpusSource, collect_corpus

pytestmark = [pytest.mark.server, pytest.mark.timeout(600), pytest.mark.usefixtures("api")]


@cached_task("interrupted")
def interrupted(number: int) -> list[str]:
    """What an earlier process has left; ends the first one that computes it."""
    place = work_directory()
    assert place is not None
    found = sorted(path.name for path in place.glob("*"))
    (place / f"checkpoint-{number}").parent.mkdir(parents=True, exist_ok=True)
    (place / f"checkpoint-{number}").touch()
    if not found:
        raise SystemExit("killed")
    return found


@flow
def go_on(number: int) -> list[str]:
    """The task in a flow."""
    return interrupted(number)


def test_unfinished_work_is_found_again_and_forgotten_with_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    unfinished = tmp_path / ".cache" / "unfinished"
    for number in (1, 2):
        with pytest.raises(SystemExit):
            go_on(number)
    one, two = sorted(unfinished.iterdir())
    assert go_on(1) == ["checkpoint-1"]
    (left,) = unfinished.iterdir()
    assert [path.name for path in left.iterdir()] == ["checkpoint-2"]
    (record,) = (tmp_path / ".cache" / "records").iterdir()
    assert record.name in {one.name, two.name}
    (unfinished / record.name).mkdir()  # of a process that was killed after it wrote the record
    assert go_on(1) == ["checkpoint-1"]
    assert list(unfinished.iterdir()) == [left]


@flow(task_runner=thread_runner())
def collect_twice(source: CorpusSource) -> list[Corpus]:
    """The same piece for two threads at once."""
    sizes = map(unmapped, (3, 2, 1))
    return [future.result()[0] for future in collect_corpus.map([source, source], *sizes)]


def delete_a_piece(made: Corpus, record: Path) -> None:
    made.held_out.texts.file.unlink()


def damage_a_piece(made: Corpus, record: Path) -> None:
    made.ranges[0].texts.file.write_bytes(b"damaged")


def damage_the_record(made: Corpus, record: Path) -> None:
    record.write_bytes(record.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [delete_a_piece, damage_a_piece, damage_the_record])
def test_a_piece_is_computed_once_for_as_long_as_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Corpus, Path], None]
) -> None:
    calls: list[object] = []
    write_down = tasks.statistics._write_down
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(
        tasks.statistics, "_write_down", lambda *given: (calls.append(given), write_down(*given))[1]
    )
    source = CorpusSource(file=write_text(tmp_path / "corpus.txt", "one\ntwo\nthree\nfour\n"))
    first, second = collect_twice(source)
    assert first == second == collect_twice(source)[0]
    assert len(calls) == 1
    (record,) = (tmp_path / ".cache" / "records").iterdir()
    assert record.name.startswith("corpus-")
    damage(first, record)
    again = collect_twice(source)[0]
    assert len(calls) == 2
    assert again.ranges == first.ranges
    assert again.held_out.texts.intact()


def test_code_that_has_changed_meanwhile_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setitem(code._AT_START, code.source_file("tasks.statistics"), "as it was")
    source = CorpusSource(file=write_text(tmp_path / "corpus.txt", "one\ntwo\nthree\nfour\n"))
    with pytest.raises(IntegrityError, match=r"statistics\.py was changed"):
        collect_twice(source)
