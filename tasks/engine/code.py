"""The source files and libraries behind a result, found by following imports.

A module of the method (`memit/`) counts with everything that it imports, anywhere. In the floors
above only what a function uses is followed: from name to name, into the functions and modules that
it imports. Imports for type checkers do not count, nor does the machinery of those floors: no
result depends on a progress bar.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Set
from functools import cache
from importlib.metadata import version
from importlib.util import resolve_name
from pathlib import Path
from typing import Any, NamedTuple

from memit.errors import IntegrityError
from memit.files.reading import file_sha256

ROOT = Path(__file__).resolve().parents[2]
METHOD, FLOORS_ABOVE = "memit", ("tasks", "flows")
MACHINERY = ("tasks.engine", "flows.command", "flows.service")
"""Folders without steps: they are followed but do not count themselves."""
USERS_FOLDERS: set[Path] = set()
"""Folders of users' own files with editors."""
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
LIBRARIES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
"""Libraries whose next version may give other bits."""


class Import(NamedTuple):
    """One name that a module imports."""

    module: str
    attribute: str | None
    """The name in that module; None: the module itself."""
    name: str
    """The name in the importing module."""


def code_of(function: Callable[..., Any]) -> dict[str, str]:
    """SHA-256 of each source file behind a function's results, and versions of libraries."""
    return _digests(task_modules(function.__module__, function.__qualname__)) | library_versions()


def code_of_class(kind: type) -> dict[str, str]:
    """SHA-256 of each source file behind a class of the method, or of a user's own file, whose
    imports are also looked for beside it."""
    if kind.__module__.partition(".")[0] != METHOD:
        USERS_FOLDERS.add(Path(inspect.getfile(kind)).resolve().parent)
    return _digests(method_modules(kind.__module__))


def _digests(modules: Set[str]) -> dict[str, str]:
    """SHA-256 of the modules' files.

    Raises:
        IntegrityError: one has changed since this process started, so that it may run either code.
    """
    found = {}
    for module in sorted(modules):
        path = source_file(module)
        found[module] = file_sha256(path)
        if _AT_START.setdefault(path, found[module]) != found[module]:
            raise IntegrityError(f"{path} was changed while it was used: start the run again.")
    return found


@cache
def library_versions() -> dict[str, str]:
    """The installed version of each of `LIBRARIES`."""
    return {name: version(name) for name in LIBRARIES}


@cache
def task_modules(module: str, function: str) -> frozenset[str]:
    """The modules behind a task: what its function uses, and what importing them loads."""
    used = _Uses()
    used.follow(module, function)
    for visited in {module for module, _ in used.seen}:
        used.load(visited)
    return frozenset(used.modules)


@cache
def stage_modules(module: str, function: str) -> frozenset[str]:
    """The modules behind a flow, including those of every task that it runs."""
    used = _Uses()
    used.follow(module, function)
    tasks = (name for name in used.seen if _is_cached_task(*name))
    return frozenset(used.modules.union(*(task_modules(*name) for name in tasks)))


@cache
def method_modules(module: str) -> frozenset[str]:
    """A module of the method and everything that it imports."""
    used = _Uses()
    used.add(module)
    return frozenset(used.modules)


class _Uses:
    """The modules that are found while imports and names are followed."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self.seen: set[tuple[str, str]] = set()
        """Modules of the floors above, each with a name at its top."""
        self.loaded: set[str] = set()

    def follow(self, module: str, name: str) -> None:
        """Find everything that a name at the top of a module of the floors above uses."""
        if (module, name) in self.seen:
            return
        self.seen.add((module, name))
        if not module.startswith(MACHINERY):
            self.modules.add(module)
        source = _read(module)
        if name in source.imports:
            self._take(source.imports[name])
        for node in _walk(source.names[name]) if name in source.names else ():
            for found in _imports(node, module):
                self._take(found)
            if isinstance(node, ast.Name) and node.id in source.names | source.imports:
                self.follow(module, node.id)

    def _take(self, found: Import) -> None:
        floor = found.module.partition(".")[0]
        if floor == METHOD:
            self.add(found.module)
        elif floor in FLOORS_ABOVE and _path(found.module) is not None:
            for name in [found.attribute] if found.attribute else _read(found.module).names:
                self.follow(found.module, name)

    def load(self, module: str) -> None:
        """Add what importing a module of the floors above imports of the method."""
        if module in self.loaded or _path(module) is None:
            return
        self.loaded.add(module)
        for found in _read(module).imports.values():
            if found.module.partition(".")[0] == METHOD:
                self.add(found.module)
            else:
                self.load(found.module)

    def add(self, module: str) -> None:
        """Add a module of the method, or of a user's own, with its packages and all they import."""
        if module == METHOD:  # as a whole: `memit/__init__.py` imports its modules on demand
            for file in sorted((ROOT / METHOD).glob("[!_]*.py")):
                self.add(f"{METHOD}.{file.stem}")
        if module in self.modules or _path(module) is None:
            return
        self.modules |= {METHOD, module}
        package = module.rpartition(".")[0]
        if package not in ("", METHOD):
            self.add(package)
        for found in _all_imports(module):
            self.add(found.module)


class _Source(NamedTuple):
    """A parsed module."""

    tree: ast.Module
    names: dict[str, ast.stmt]
    """The definitions at its top."""
    imports: dict[str, Import]
    """The imports there."""


@cache
def _read(module: str) -> _Source:
    tree = ast.parse(source_file(module).read_bytes())
    names: dict[str, ast.stmt] = {}
    imports: dict[str, Import] = {}
    for node in _walk(tree, inside=False):
        imports |= {found.name: found for found in _imports(node, module)}
        if isinstance(node, DEFINITIONS):
            names[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            stored = (part for target in targets for part in ast.walk(target))
            names |= {part.id: node for part in stored if isinstance(part, ast.Name)}
    return _Source(tree, names, imports)


@cache
def _all_imports(module: str) -> tuple[Import, ...]:
    """Everything that a module imports, anywhere."""
    nodes = _walk(_read(module).tree)
    return tuple(dict.fromkeys(found for node in nodes for found in _imports(node, module)))


def _walk(node: ast.AST, *, inside: bool = True) -> Iterator[ast.AST]:
    """`ast.walk` without branches for type checkers or for a module that is run as a command, and,
    unless `inside`, without the bodies of functions and classes."""
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and {"TYPE_CHECKING", "__name__"} & _named(node.test):
        children = node.orelse
    elif isinstance(node, DEFINITIONS) and not inside:
        return
    for child in children:
        yield from _walk(child, inside=inside)


def _named(node: ast.AST) -> set[str]:
    """The names and attributes in an expression."""
    return {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node)}


def _imports(node: ast.AST, module: str) -> Iterator[Import]:
    """The imports of one statement."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, None, alias.asname or alias.name)
    elif isinstance(node, ast.ImportFrom):
        is_package = source_file(module).name == "__init__.py"
        package = module if is_package else module.rpartition(".")[0]
        base = resolve_name("." * node.level + (node.module or ""), package)
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            found = (base, alias.name) if _path(whole) is None else (whole, None)
            yield Import(*found, alias.asname or alias.name)


def _is_cached_task(module: str, name: str) -> bool:
    decorators = getattr(_read(module).names.get(name), "decorator_list", [])
    return any("cached_task" in _named(decorator) for decorator in decorators)


def source_file(module: str) -> Path:
    """The source file of a module of this project; LookupError for other modules."""
    path = _path(module)
    if path is None:
        raise LookupError(f"{module} is no module of this project.")
    return path


@cache
def _path(module: str) -> Path | None:
    """The source file of a module of this project; None for other modules."""
    parts = module.split(".")
    roots = (ROOT,) if parts[0] in (METHOD, *FLOORS_ABOVE) else tuple(USERS_FOLDERS)
    paths = [root.joinpath(*parts) for root in roots]
    files = (file for p in paths for file in (p.with_suffix(".py"), p / "__init__.py"))
    return next((file for file in files if file.is_file()), None)


_AT_START = {
    path: file_sha256(path)
    for package in (METHOD, *FLOORS_ABOVE)
    for path in (ROOT / package).rglob("*.py")
}
"""SHA-256 of each source file when this process started."""
