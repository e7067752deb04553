"""Three floors, arrows down only, no circles; and what a plain PyTorch image can import."""

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT, python

ABOVE = {
    "memit": {"tasks", "flows", "benchmarks", "prefect", "dvc", "mlflow", "pydantic", "cyclopts"},
    "tasks": {"flows", "benchmarks"},
    "flows": {"benchmarks"},
}
NOT_ON_A_PLAIN_IMAGE = ("prefect", "dvc", "mlflow", "pydantic", "datasets", "sklearn", "nltk")


def imported_packages(source: str) -> Iterator[str]:
    """Top-level packages that a module imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("floor", ABOVE)
def test_a_floor_imports_nothing_from_above(floor: str) -> None:
    modules = sorted((ROOT / floor).rglob("*.py"))
    assert modules
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in modules
        if (found := ABOVE[floor] & set(imported_packages(path.read_text(encoding="utf-8"))))
    }
    assert not wrong


def imported_modules(path: Path, known: Mapping[str, Path] | None = None) -> set[str]:
    """Modules, of the three floors by default, that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & (known or MODULES).keys()


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(path): path for floor in ABOVE for path in (ROOT / floor).rglob("*.py")}


@pytest.mark.parametrize("floor", ABOVE)
def test_a_floor_has_no_circles(floor: str) -> None:
    """A package's own `__init__` is left out: `memit` names what it re-exports."""
    inside = {name for name in MODULES if name.startswith(f"{floor}.")}
    arrows = {name: imported_modules(MODULES[name]) & inside for name in inside}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("folder", ["tasks/engine", "tasks/reporting", "flows/service"])
def test_machinery_imports_no_step(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        imported = imported_modules(path)
        steps = {name for name in imported if re.fullmatch(r"(tasks|flows)\.\w+", name)}
        steps = {name for name in steps if MODULES[name].name != "__init__.py"}
        assert not steps, path


def test_unit_tests_need_no_prefect() -> None:
    tests = {_module(path): path for path in (ROOT / "tests").rglob("*.py")}
    reached = {name for name in tests if name.startswith("tests.unit.")}
    waiting, using = list(reached), set()
    while waiting:
        name = waiting.pop()
        path = (MODULES | tests)[name]
        if {"prefect", "mlflow"} & set(imported_packages(path.read_text(encoding="utf-8"))):
            using.add(name)
        found = imported_modules(path, MODULES | tests) - reached
        reached |= found
        waiting += found
    assert using == set()


def test_mlflow_is_imported_in_one_module_only() -> None:
    modules = (path for floor in ABOVE for path in (ROOT / floor).rglob("*.py"))
    talking = [p for p in modules if "mlflow" in imported_packages(p.read_text(encoding="utf-8"))]
    assert [path.name for path in talking] == ["tracking.py"]


def test_the_method_and_the_benchmark_run_on_a_plain_image() -> None:
    """pydantic and its like are absent there; a module that is None in sys.modules is too."""
    hide = "".join(f"sys.modules[{name!r}] = None\n" for name in NOT_ON_A_PLAIN_IMAGE)
    program = (
        f"import sys\n{hide}"
        "import benchmarks.__main__, memit.editing, memit.reference\n"
        "import memit.evaluation.counterfact\n"
        "print('imported')"
    )
    ran = python("-c", program, cwd=ROOT)
    assert ran.stdout.strip() == "imported", ran.stderr


def test_the_reference_stands_alone() -> None:
    assert not imported_modules(ROOT / "memit" / "reference.py")


def test_importing_the_package_imports_no_torch() -> None:
    modules = "memit, memit.errors, memit.hyperparameters"
    program = f"import sys, {modules}; print('torch' in sys.modules)"
    ran = python("-c", program, cwd=ROOT)
    assert ran.stdout.strip() == "False", ran.stderr
