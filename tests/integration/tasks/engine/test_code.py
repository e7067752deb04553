"""The code that results are keyed on: what is imported, no more and no less."""

import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from flows.command import stages
from memit.editors import known_editors
from memit.editors.base import load_editors
from memit.errors import InputError, IntegrityError
from memit.hyperparameters import Hyperparameters
from tasks.compare import make_methods
from tasks.engine import code
from tasks.engine.cache import CachedTask, content_key
from tests import ROOT

FUNCTIONS = {
    task.name: task.uncached
    for path in (ROOT / "tasks").glob("[!_]*.py")
    for task in vars(import_module(f"tasks.{path.stem}")).values()
    if isinstance(task, CachedTask)
}
"""What each cached task runs."""
CACHED = (code._path, code._imports, code.modules_behind, code.library_versions)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test reads the sources anew."""
    monkeypatch.setattr(code, "_AT_START", {})
    monkeypatch.setattr(code, "USERS_FOLDERS", set())
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


def keys() -> dict[str, str]:
    """The key of each cached task, for no inputs."""
    code._AT_START.clear()
    return {name: content_key(name, code.code_of(run), {}) for name, run in FUNCTIONS.items()}


def modules_of(name: str) -> frozenset[str]:
    return code.modules_behind(FUNCTIONS[name].__module__)


def test_a_byte_in_a_module_changes_the_keys_of_the_tasks_that_import_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("memit", "tasks"):
        shutil.copytree(ROOT / package, tmp_path / package)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    closures = {name: modules_of(name) for name in FUNCTIONS}
    assert all(FUNCTIONS[name].__module__ in closures[name] for name in FUNCTIONS)
    assert all(code.code_of(run).keys() >= closures[name] for name, run in FUNCTIONS.items())
    before = keys()
    tables = tmp_path / "memit" / "world" / "relations.toml"
    for path in [*sorted(tmp_path.rglob("*.py"))[::6], tables]:
        module = ".".join(path.relative_to(tmp_path).with_suffix("").parts)
        module = module.removesuffix(".__init__")
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        after = keys()
        changed = {name for name in FUNCTIONS if after[name] != before[name]}
        assert changed == {name for name in FUNCTIONS if module in closures[name]}, module
        path.write_bytes(content)


def test_which_results_come_from_which_module() -> None:
    """Spot checks against the code as a reader sees it."""
    keyed_on = {
        module: {name for name in FUNCTIONS if module in modules_of(name)}
        for module in ("memit.layer_walk", "memit.editors.serac", "memit.world.people")
    }
    # It edits through the task of all methods.
    assert keyed_on["memit.layer_walk"] == {"key_sums"}
    assert "memit.layer_walk" in code.code_of_own(known_editors()["memit"])
    assert "memit.layer_walk" not in code.code_of_own(known_editors()["mend"])
    measuring = {"evaluation", "held_out", "kept", "reading", "references", "unedited"}
    assert keyed_on["memit.editors.serac"] == {"serac", *measuring}
    assert keyed_on["memit.world.people"] == {"model"}
    assert not any(name.startswith("tasks.reporting") for name in modules_of("evaluation"))
    assert all("memit.language_model" in modules_of(name) for name in FUNCTIONS)
    assert not any("engine" in module for name in FUNCTIONS for module in modules_of(name))


@pytest.mark.parametrize("library", code.LIBRARIES)
def test_another_version_of_a_library_changes_every_key(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, installed = keys(), code.version
    monkeypatch.setattr(code, "version", lambda name: installed(name) + ".1" * (name == library))
    code.library_versions.cache_clear()
    after = keys()
    assert all(after[name] != before[name] for name in FUNCTIONS)


def test_source_that_changes_while_it_is_used_gives_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "memit", tmp_path / "memit")
    shutil.copytree(ROOT / "tasks", tmp_path / "tasks")
    monkeypatch.setattr(code, "ROOT", tmp_path)
    code.code_of(FUNCTIONS["edit"])
    with (tmp_path / "memit" / "editors" / "base.py").open("a") as file:
        file.write("\n")
    with pytest.raises(IntegrityError, match=r"base\.py"):
        code.code_of(FUNCTIONS["edit"])
    code.code_of(FUNCTIONS["targets"])


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_imports_are_followed_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path,
        memit__used="from memit import deeper\nfrom .pack import inner\n",
        memit__deeper="def late():\n    import memit.latest\n",
        memit__latest="if True:\n    import memit.branch\n",
        memit__branch="",
        memit__typed="",
        memit__beside="",
        memit__other="",
        memit__pack__inner="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    import memit.typed\n",
        memit__pack__unused="import memit.other\n",
        tasks__step="from tasks.engine.machine import helper\nfrom flows.command import shown\n",
        tasks__engine__machine="import memit.used, tasks.beside\n",
        tasks__beside="import memit.beside\n",
        flows__command="import memit.other\n",
    )
    for folder in ("memit", "memit/pack"):
        (tmp_path / folder / "__init__.py").touch()
    monkeypatch.setattr(code, "ROOT", tmp_path)
    expected = "used deeper latest branch beside pack pack.inner"
    assert code.modules_behind("tasks.step") == {
        "memit",
        "tasks.step",
        "tasks.beside",
        *(f"memit.{name}" for name in expected.split()),
    }


EDITOR = """
from dataclasses import dataclass
from memit import LanguageModel
from memit.editors.base import Editor, register
from help_of_mine import strength

@register("mine")
@dataclass(frozen=True)
class Mine(Editor):
    def edit(self, lm, requests, resources): ...
"""


def test_a_users_own_editor_counts_with_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, an_editor_of_mine=EDITOR, help_of_mine="strength = 1\n")
    (made,) = make_methods(["mine"], {}, Hyperparameters((1,), 1.0), "m", 4, str(tmp_path))
    assert isinstance(made.editor, known_editors()["mine"])
    found = code.code_of_own(type(made.editor))
    assert {"an_editor_of_mine", "help_of_mine", "memit.editors.base"} < found.keys()
    assert "memit.editing" in found  # since `memit` imports its modules on demand
    assert "memit.editors.rome" not in found
    code._AT_START.clear()
    write(tmp_path, help_of_mine="strength = 2\n")
    changed = code.code_of_own(known_editors()["mine"])
    assert {name for name in found if found[name] != changed[name]} == {"help_of_mine"}


@pytest.mark.parametrize(
    ("name", "text"),
    [("broken_editor", "import no_such_module\n"), ("json", EDITOR), ("worse_editor", "(")],
)
def test_a_file_of_editors_that_cannot_be_used_is_named(
    tmp_path: Path, name: str, text: str
) -> None:
    write(tmp_path, **{name: text})
    with pytest.raises(InputError, match=rf"{name}\.py"):
        load_editors(tmp_path / f"{name}.py")


@pytest.mark.parametrize("file", stages.FILES, ids=str)
def test_stages_depend_on_the_code_behind_them(file: Path) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert stages.with_code(text) == text, "run make stages"


def test_a_stage_depends_no_more_on_folders_that_it_does_not_read() -> None:
    stage = "stages:\n  report:\n    deps:\n      - {}\n"
    text = stages.with_code(stage.format("memit/facts/relations\n      - artifacts/mine"))
    assert "artifacts/mine" in text
    assert "memit/facts/relations\n" not in text
