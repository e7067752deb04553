"""What a task's module has loaded when it is imported is what its key names."""

import multiprocessing
import sys
from importlib import import_module

from tasks.engine.code import MACHINERY, modules_behind
from tests import ROOT

DYNAMIC = {"memit/__init__.py", "memit/editors/__init__.py", "memit/editors/base.py"}
"""Import by computed names: public names on demand, all editors, and users' editors, whose code is
in the keys of what they make."""


def modules_loaded_by(module: str) -> set[str]:
    """The project's modules after this one was imported where there were none."""
    ours = ("memit", "tasks")
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    import_module(module)
    return {name for name in sys.modules if name.partition(".")[0] in ours}


def test_each_task_is_keyed_on_all_that_it_loads() -> None:
    steps = [f"tasks.{path.stem}" for path in (ROOT / "tasks").glob("[!_]*.py")]
    # A process for each, in which the libraries are imported already.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        loaded = pool.map(modules_loaded_by, steps, chunksize=1)
    for step, names in zip(steps, loaded, strict=True):
        found = {name for name in names if not name.startswith(MACHINERY)}
        assert step in found <= modules_behind(step)


def test_no_other_module_is_imported_by_a_computed_name() -> None:
    files = [path for folder in ("memit", "tasks") for path in (ROOT / folder).rglob("*.py")]
    dynamic = {
        str(path.relative_to(ROOT))
        for path in files
        if "import_module(" in path.read_text() or "__import__" in path.read_text()
    }
    assert dynamic - {"tasks/engine/cache.py"} == DYNAMIC
