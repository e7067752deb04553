"""What lies beside memit's files is the user's, and what links lead to is somebody else's."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memit.errors import IntegrityError
from memit.files.atomic import PARTIAL, temporary, write_whole
from memit.files.tensors import save_tensors
from memit.requests import EditRequest, Record, write_records
from memit.second_moment import SecondMoment, write_moment
from memit.weight_delta import LowRank, WeightDelta
from tasks.engine.artifacts import copy_file, describe, remove_leftovers, store_piece, write_json
from tasks.engine.results import finish_step, upstream
from tests import ROOT


@pytest.fixture(autouse=True)
def _with_a_cache(project: Path) -> None:
    (project / ".cache").mkdir()


def files(folder: Path) -> set[str]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- leftovers ------------------------------------------------------------------------------------


def write_for_ever(kind: str) -> None:
    """Begin to write something and never end."""

    def stay(path: Path) -> None:
        path.write_text("half")
        path.with_name(path.name + "-journal").write_text("what SQLite leaves")
        Path("ready").touch()
        time.sleep(600)

    if kind == "result":
        write_whole(Path("artifacts/x.json"), stay)
    elif kind == "piece":
        store_piece("edit", ".txt", stay)
    else:
        with temporary(Path("exported")) as folder:
            folder.mkdir()
            stay(folder / "half")


@pytest.mark.parametrize("kind", ["result", "piece", "folder"])
def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(
    project: Path, kind: str
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for place in (".", "artifacts", "data/deep", ".cache/pieces/edit"):
        (project / place).mkdir(parents=True, exist_ok=True)
        for name in ("notes.partial.md", "a.partial", f".x.json.{dead.pid}-0a1b2c3d{PARTIAL}"):
            (project / place / name).write_text("mine")
        (project / place / "old.partial").mkdir()
    (project / ".cache" / "writing").mkdir()
    before = files(project)
    writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(kind,))
    writer.start()
    while not (project / "ready").exists():
        assert writer.is_alive()
        time.sleep(0.05)
    (project / "ready").unlink()
    during = files(project)
    remove_leftovers()
    assert files(project) == during > before
    writer.kill()
    writer.join()
    remove_leftovers()
    assert files(project) == before


def test_a_note_that_was_torn_deletes_nothing(project: Path) -> None:
    notes = project / ".cache" / "writing"
    notes.mkdir()
    (project / "mine").mkdir()
    for number, said in enumerate([str(project / "mine"), str(project), "", "/", "\0\0"]):
        (notes / f".x.1-{number:08}{PARTIAL}").write_text(said)
    remove_leftovers()
    assert files(project) == {".cache", ".cache/writing", "mine"}


def test_a_library_without_a_project_makes_none(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_ROOT")
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    with temporary(Path("x")) as folder:
        folder.mkdir()
    write_whole(Path("y"), lambda path: path.write_text("whole"))
    assert files(Path()) == {"y"}


# --- results of other settings --------------------------------------------------------------------


def test_a_step_takes_back_what_it_wrote_and_nothing_else(project: Path) -> None:
    folder = Path("artifacts/statistics")

    def finish(*layers: int) -> None:
        paths = [folder / f"layer-{layer:02}.parquet" for layer in layers]
        for path in paths:
            write_json(path, path.name)
        finish_step("statistics", paths, {}, [])

    (project / folder / "mine").mkdir(parents=True)
    for name in ("notes.md", "layer-99.parquet", ".x.json.1-ab.partial", "mine/a.ipynb"):
        (project / folder / name).write_text("mine")
    before = files(folder)
    finish(1, 2, 3, 4)
    (folder / "layer-03.parquet").write_text("changed by the user")
    (folder / "layer-04.parquet").unlink()
    (folder / "layer-04.parquet").symlink_to("notes.md")
    finish(1, 5)
    kept = {f"layer-{layer:02}.parquet" for layer in (1, 3, 4, 5)}
    assert files(folder) == before | kept
    finish(1)
    assert files(folder) == before | kept - {"layer-05.parquet"}


def test_a_step_takes_back_what_lies_below_its_results(project: Path) -> None:
    model, weights = Path("artifacts/model/model.json"), Path("artifacts/model/weights/a.json")
    other = Path("artifacts/other.json")
    for path in (model, weights, other):
        write_json(path, 1)
    (project / "artifacts/model/weights/notes.md").write_text("mine")
    astray = Path("artifacts/model/../other.json")
    finish_step("model", [model, weights, astray], {}, [])
    finish_step("model", [model], {}, [])
    assert files(project / "artifacts/model") == {"model.json", "weights", "weights/notes.md"}
    assert other.exists()


def test_dvc_sees_the_results_alone(project: Path) -> None:
    from dvc.repo import Repo

    Repo.init(str(project), no_scm=True).close()
    for name in (".dvcignore", "dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, project)
    (project / "methods").mkdir()
    shutil.copy(ROOT / "methods" / "stages.yaml", project / "methods" / "dvc.yaml")
    repository = Repo(str(project))
    is_ignored = repository.dvcignore.is_ignored_file
    outs = [out for stage in repository.index.stages for out in stage.outs]  # none may be ignored
    assert len(outs) > 30
    places = {Path(out.fs_path): out for out in outs}
    folders = {place for place in places if not place.suffix}
    assert all(places[place].persist for place in folders), "DVC deletes others before a stage runs"
    assert not is_ignored(str(project / "artifacts/statistics/layer-103.parquet"))
    beside = {place.parent for place in places} | folders
    for folder in beside - {project, project / "artifacts"}:
        for name in ("notes.md", "mine.ipynb", "mine/notes.md"):
            assert is_ignored(str(folder / name)), folder / name


def test_make_clean_leaves_what_is_not_its_own(project: Path) -> None:
    for name in ("Makefile", ".dvcignore", "constraints.txt"):
        shutil.copy(ROOT / name, project)
    kept = {"Makefile", ".dvcignore", "constraints.txt", "artifacts", "report", "evaluation"}
    kept |= {"report/notes.md", "artifacts/mine.txt", "evaluation/facts.xlsx"}
    results = ["report/index.html", "evaluation/facts.csv", "artifacts/steps/edit.json"]
    results += ["artifacts/edit/delta.safetensors", "artifacts/statistics/layer-07.parquet"]
    results += ["artifacts/model/weights/model.safetensors", "artifacts/requests.json"]
    results += ["comparison/statistics/layer-07.parquet", "metrics.json", ".cache/pieces/a"]
    for name in [*kept, *results]:
        if Path(name).suffix or "/" in name:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()
    subprocess.run(["make", "clean"], check=True, capture_output=True)
    assert files(project) == kept


# --- links ----------------------------------------------------------------------------------------

RECORD = Record(request=EditRequest("Ada", "{} lives in", "Rome"), case_id=0)
DELTA = WeightDelta({"w": LowRank(torch.ones(2, 1), torch.ones(3, 1))}, {"method": "x"})
WRITERS: dict[str, Callable[[Path], object]] = {
    "a result": lambda path: write_json(path, {"a": 1}),
    "a copy": lambda path: copy_file(Path("source"), path),
    "a delta": DELTA.save,
    "a delta at a path in words": lambda path: DELTA.save(str(path)),  # type: ignore[arg-type]
    "tensors": lambda path: save_tensors({"a": torch.ones(2)}, path, {}),
    "records": lambda path: write_records([RECORD], path),
    "second moments": lambda path: write_moment(SecondMoment(torch.eye(2), 3), path, {}),
}


def others() -> list[Path]:
    """Places for what is linked to: here, and where there is one on another file system."""
    memory = Path("/dev/shm")
    return [Path("store"), *([memory] if os.access(memory, os.W_OK) else [])]


@pytest.mark.parametrize("kind", ["absolute", "relative", "hard", "chain", "dangling"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_gives_way_to_the_file(project: Path, writer: str, kind: str) -> None:
    Path("source").write_text("source")
    for number, place in enumerate(others()):
        kept = place / f"memit-test-{os.getpid()}-{number}"
        kept.parent.mkdir(exist_ok=True)
        path = project / f"{number}" / "out.safetensors"
        path.parent.mkdir()
        kept.write_text("theirs")
        try:
            if kind == "hard" and place.is_absolute():
                continue  # not across file systems
            make_link(kind, path, kept.absolute())
            WRITERS[writer](path)
            assert not path.is_symlink()
            assert path.read_bytes() != b"theirs"
            assert kind == "dangling" or kept.read_text() == "theirs"
            assert kind != "dangling" or not kept.exists()
        finally:
            kept.unlink(missing_ok=True)


def make_link(kind: str, path: Path, kept: Path) -> None:
    """A link of some kind to what is kept."""
    if kind == "hard":
        os.link(kept, path)
    elif kind == "chain":
        path.with_name("between").symlink_to(kept)
        path.symlink_to("between")
    else:
        path.symlink_to(os.path.relpath(kept, path.parent) if kind == "relative" else kept)
    if kind == "dangling":
        kept.unlink()


def test_a_linked_folder_is_written_to(project: Path) -> None:
    (project / "disk").mkdir()
    Path("artifacts").symlink_to("disk")
    written = write_json(Path("artifacts/a.json"), 1)
    assert Path("artifacts").is_symlink()
    assert files(project / "disk") == {"a.json"}
    assert written == describe(Path("artifacts/a.json"))


def test_a_piece_is_named_by_its_content_through_any_writer(project: Path) -> None:
    piece = store_piece("edit", ".safetensors", DELTA.save)
    DELTA.save(project / "delta.safetensors")
    assert piece.checked().read_bytes() == (project / "delta.safetensors").read_bytes()
    assert files(project / ".cache" / "pieces") == {"edit", f"edit/{Path(piece.path).name}"}
    assert files(project / ".cache" / "writing") == set()


def test_a_manifest_names_the_files_and_not_what_they_link_to(project: Path) -> None:
    write_json(Path("kept"), {"a": 1})
    Path("evaluation").mkdir()
    Path("evaluation/facts.csv").symlink_to(project / "kept")
    manifest = finish_step("evaluation", [Path("evaluation/facts.csv")], {}, [])
    assert manifest.file(Path("evaluation/facts.csv")).path == str(project / "evaluation/facts.csv")
    assert manifest.files.keys() == {"evaluation/facts.csv"}
    assert upstream("evaluation") == {"evaluation": manifest}
    with pytest.raises(IntegrityError, match=r"facts\.txt .* the step evaluation again"):
        manifest.file(Path("evaluation/facts.txt"))
