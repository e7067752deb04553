"""What a task's module has loaded when it is imported is what its key names."""

from __future__ import annotations

import json
import subprocess
import sys

from tasks.engine.code import MACHINERY, modules_behind
from tests import ROOT

DYNAMIC = {"memit/__init__.py", "memit/editors/__init__.py", "memit/editors/base.py"}
"""Import by computed names: public names on demand, all editors, and users' editors, whose code is
in the keys of what they make."""
LOAD_EACH = """
import json, os, sys
from importlib import import_module
for library in (  # what takes long to import, once for all processes
    "matplotlib.pyplot", "mlflow", "nltk", "prefect.task_runners", "pyarrow.parquet",
    "sklearn.feature_extraction.text", "torch._dynamo", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.modeling_utils",
):
    import_module(library)
for module in sys.argv[1:]:
    if os.fork() == 0:
        import_module(module)
        loaded = [name for name in sys.modules if name.partition(".")[0] in ("memit", "tasks")]
        print(json.dumps([module, loaded]), flush=True)
        os._exit(0)
    os.wait()
"""


def test_each_task_is_keyed_on_all_that_it_loads() -> None:
    steps = [f"tasks.{path.stem}" for path in (ROOT / "tasks").glob("[!_]*.py")]
    ran = subprocess.run(
        [sys.executable, "-c", LOAD_EACH, *steps],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    loaded = dict(map(json.loads, ran.stdout.splitlines()))
    assert loaded.keys() == set(steps), ran.stderr
    for step, names in loaded.items():
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
