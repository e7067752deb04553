"""The source files and libraries behind a result, found by following imports.

A result comes from the module of its task and from everything that this imports, at its top or
inside of functions. Imports for type checkers do not count, nor does the machinery around the
steps: no result depends on a progress bar.
"""

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Set
from functools import cache
from importlib.metadata import version
from importlib.util import resolve_name
from pathlib import Path
from threading import Lock
from typing import Any

from memit.errors import IntegrityError
from memit.files.digests import file_sha256

ROOT = Path(__file__).resolve().parents[2]
METHOD = "memit"
PACKAGES = (METHOD, "tasks", "flows")
MACHINERY = ("flows.command", "flows.service", "tasks.engine")
FOLLOWED = "tasks.engine"
"""Machinery that imports parts of the method for tasks, to load a model for example."""
USERS_FOLDERS: set[Path] = set()
"""Folders of users' own files with editors."""
_PARSING = Lock()
"""CPython counts the depth of a tree for all threads at once, and fails where two of them parse."""
LIBRARIES = ("gguf", "numpy", "safetensors", "tokenizers", "torch", "transformers")
"""Libraries whose next version may give other bits."""


def code_of(function: Callable[..., Any]) -> dict[str, str]:
    """SHA-256 of each source file behind a function's results, and versions of libraries."""
    return _digests(modules_behind(function.__module__)) | library_versions()


def code_of_own(kind: type | Callable[..., Any]) -> dict[str, str]:
    """SHA-256 of each source file behind a class or function of the method, or of a user's own
    file, whose imports are also looked for beside it."""
    if kind.__module__.partition(".")[0] != METHOD:
        USERS_FOLDERS.add(Path(inspect.getfile(kind)).resolve().parent)
    return _digests(modules_behind(kind.__module__))


def _digests(modules: Set[str]) -> dict[str, str]:
    """SHA-256 of the modules' files.

    Raises:
        IntegrityError: one has changed since this process started, so that it may run either code.
    """
    found = {}
    for module in sorted(modules):
        for path in source_files(module):
            digest = file_sha256(path)
            found[module + path.suffix.removesuffix(".py")] = digest
            if _AT_START.setdefault(path, digest) != digest:
                raise IntegrityError(f"{path} was changed while it was used: start the run again.")
    return found


@cache
def library_versions() -> dict[str, str]:
    """The installed version of each of `LIBRARIES`."""
    return {name: version(name) for name in LIBRARIES}


@cache
def modules_behind(module: str) -> frozenset[str]:
    """A module and everything of this project that it imports, without machinery."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        is_followed = name.startswith(FOLLOWED) or not name.startswith(MACHINERY)
        if is_followed and name not in found and _path(name) is not None:
            found.add(name)
            waiting += [name.rpartition(".")[0], *_imports(name)]
    return frozenset(name for name in found if not name.startswith(MACHINERY))


@cache
def _imports(module: str) -> tuple[str, ...]:
    """The modules that a module imports anywhere."""
    with _PARSING:
        tree = ast.parse(source_file(module).read_bytes())
    names = [name for node in _walk(tree) for name in _imported_by(node, module)]
    if METHOD in names:  # as a whole: `memit/__init__.py` imports its modules on demand
        names += [f"{METHOD}.{path.stem}" for path in (ROOT / METHOD).glob("[!_]*.py")]
    return tuple(names)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """`ast.walk` without branches for type checkers."""
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children = node.orelse
    for child in children:
        yield from _walk(child)


def _imported_by(node: ast.AST, module: str) -> Iterator[str]:
    """The modules that one statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        is_package = source_file(module).name == "__init__.py"
        package = module if is_package else module.rpartition(".")[0]
        base = resolve_name("." * node.level + (node.module or ""), package)
        for name in (f"{base}.{alias.name}" for alias in node.names):
            yield base if _path(name) is None else name


def source_file(module: str) -> Path:
    """The source file of a module of this project; LookupError for other modules."""
    path = _path(module)
    if path is None:
        raise LookupError(f"{module} is no module of this project.")
    return path


def source_files(module: str) -> list[Path]:
    """The source file of a module, and the tables in a `.toml` file of its name."""
    source = source_file(module)
    tables = source.with_suffix(".toml")
    return [source, tables] if tables.is_file() else [source]


@cache
def _path(module: str) -> Path | None:
    """The source file of a module of this project; None for other modules."""
    parts = module.split(".")
    roots = (ROOT,) if parts[0] in PACKAGES else tuple(USERS_FOLDERS) if module else ()
    paths = [root.joinpath(*parts) for root in roots]
    files = (file for p in paths for file in (p.with_suffix(".py"), p / "__init__.py"))
    return next((file for file in files if file.is_file()), None)


_AT_START = {
    path: file_sha256(path)
    for package in PACKAGES
    for kind in ("*.py", "*.toml")
    for path in (ROOT / package).rglob(kind)
}
"""SHA-256 of each source file when this process started."""
