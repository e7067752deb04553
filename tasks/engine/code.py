"""Which source files and libraries a result comes from, read off the imports.

Nothing is listed by hand. A module of the method (``memit/``) counts with everything that it
imports. In the floors above only what a function uses is followed: from name to name, into the
functions and modules that it imports, wherever the import stands. What only a type checker reads
does not count, nor does the machinery of those floors: a progress bar changes no result.
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
from memit.files.digests import file_sha256

ROOT = Path(__file__).resolve().parents[2]
METHOD, FLOORS_ABOVE = "memit", ("tasks", "flows")
MACHINERY = ("tasks.engine", "flows.command", "flows.service")
"""What no result depends on, though steps use it: the folders that hold no step."""
USERS_FOLDERS: set[Path] = set()
"""Where methods lie that a user's own file brings."""
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
LIBRARIES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
"""Those whose next version may give other bits."""


class Import(NamedTuple):
    """One name that a module imports."""

    module: str
    attribute: str | None
    """What is taken from the module; None: the module itself."""
    name: str
    """What the importing module calls it."""


def code_of(function: Callable[..., Any]) -> dict[str, str]:
    """SHA-256 of each source file that a function's results come from, and library versions."""
    return _digests(task_modules(function.__module__, function.__qualname__)) | library_versions()


def code_of_class(kind: type) -> dict[str, str]:
    """SHA-256 of each source file behind a class of the method, or of a user's own file, whose
    imports are looked for beside it, too."""
    if kind.__module__.partition(".")[0] != METHOD:
        USERS_FOLDERS.add(Path(inspect.getfile(kind)).resolve().parent)
    return _digests(method_modules(kind.__module__))


def _digests(modules: Set[str]) -> dict[str, str]:
    """SHA-256 of the modules' files, if they are those that this process started with.

    Raises:
        IntegrityError: one was changed since, so that nobody knows what code is running.
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
    for visited in {place for place, _ in used.seen}:
        used.load(visited)
    return frozenset(used.modules)


@cache
def stage_modules(module: str, function: str) -> frozenset[str]:
    """The modules behind a flow, those of every task that it runs included."""
    used = _Uses()
    used.follow(module, function)
    tasks = (place for place in used.seen if _is_cached_task(*place))
    return frozenset(used.modules.union(*(task_modules(*place) for place in tasks)))


@cache
def method_modules(module: str, attribute: str | None = None) -> frozenset[str]:
    """A module of the method and all that it imports, as it stands in ``from module import``."""
    used = _Uses()
    used.add(module, attribute)
    return frozenset(used.modules)


class _Uses:
    """The modules that are found while imports and names are followed."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self.seen: set[tuple[str, str]] = set()
        """Functions and other names of the floors above, each with its module."""
        self.loaded: set[str] = set()

    def follow(self, module: str, name: str) -> None:
        """Everything that a name at the top of a module of the floors above uses."""
        if (module, name) in self.seen:
            return
        self.seen.add((module, name))
        if not module.startswith(MACHINERY):
            self.modules.add(module)
        source = _read(module)
        for node in _walk(source.names[name]) if name in source.names else ():
            for found in _imports(node, module):
                self._take(found)
            if isinstance(node, ast.Name):
                self._take_name(module, node.id)
        if name in source.imports:
            self._take(source.imports[name])

    def _take_name(self, module: str, name: str) -> None:
        source = _read(module)
        if name in source.names or name in source.imports:
            self.follow(module, name)

    def _take(self, found: Import) -> None:
        floor = found.module.partition(".")[0]
        if floor == METHOD:
            self.add(found.module, found.attribute)
        elif floor in FLOORS_ABOVE and _path(found.module) is not None:
            names = [found.attribute] if found.attribute else list(_read(found.module).names)
            for name in names:
                self.follow(found.module, name)

    def load(self, module: str) -> None:
        """What importing a module of the floors above imports of the method."""
        if module in self.loaded or _path(module) is None:
            return
        self.loaded.add(module)
        for found in _read(module).imports.values():
            if found.module.partition(".")[0] == METHOD:
                self.add(found.module, found.attribute)
            else:
                self.load(found.module)

    def add(self, module: str, attribute: str | None = None, *, runs: bool = True) -> None:
        """A module of the method with what it imports; a package also runs before its modules."""
        if not module or _path(module) is None:
            return
        package = module.rpartition(".")[0]
        if package:
            self.add(package, runs=False)
        if runs:
            for home in _homes(module, attribute):
                self.add(home)
        if module in self.modules:
            return
        self.modules.add(module)
        for found in _all_imports(module):
            self.add(found.module, found.attribute)


class _Source(NamedTuple):
    """A module as it is written."""

    tree: ast.Module
    names: dict[str, ast.stmt]
    """What a module defines at its top."""
    imports: dict[str, Import]
    """What it imports there."""


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
    """What a module imports anywhere."""
    nodes = _walk(_read(module).tree)
    return tuple(dict.fromkeys(found for node in nodes for found in _imports(node, module)))


def _walk(node: ast.AST, *, inside: bool = True) -> Iterator[ast.AST]:
    """`ast.walk` without branches for type checkers or for a module that is run as a command;
    what stands ``inside`` functions and classes can be left out, too."""
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and {"TYPE_CHECKING", "__name__"} & _named(node.test):
        children = node.orelse
    elif isinstance(node, DEFINITIONS) and not inside:
        return
    for child in children:
        yield from _walk(child, inside=inside)


def _named(node: ast.AST) -> set[str]:
    """The names in an expression, and those of attributes."""
    parts = (getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(node))
    return {part for part in parts if part is not None}


def _imports(node: ast.AST, module: str) -> Iterator[Import]:
    """What one statement or call imports."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, None, alias.asname or alias.name)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            is_package = source_file(module).name == "__init__.py"
            package = module if is_package else module.rpartition(".")[0]
            base = resolve_name("." * node.level + base, package)
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            found = (base, alias.name) if _path(whole) is None else (whole, None)
            yield Import(*found, alias.asname or alias.name)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        first = node.args[0] if node.args else None
        if called == "import_module" and isinstance(first, ast.Constant):
            yield Import(str(first.value), None, "")


def _homes(package: str, attribute: str | None) -> Iterator[str]:
    """The modules in which a package looks for its attributes when they are asked for: those that
    its texts name. Of a table that names the attribute, only what stands beside it."""
    source = _read(package)
    if "__getattr__" not in source.names:
        return
    tables = [node for node in ast.walk(source.tree) if isinstance(node, ast.Dict)]
    pairs = [pair for table in tables for pair in zip(table.keys, table.values, strict=True)]
    beside = [value for key, value in pairs if _text(key) == attribute]
    for text in filter(None, map(_text, beside or [value for _, value in pairs])):
        inside = f"{package}.{text}"
        yield inside if _path(inside) is not None else text


def _text(node: ast.AST | None) -> str | None:
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, str) else None


def _is_cached_task(module: str, name: str) -> bool:
    decorators = getattr(_read(module).names.get(name), "decorator_list", [])
    return any("cached_task" in _named(decorator) for decorator in decorators)


def source_file(module: str) -> Path:
    """Where a module of this project stands; raises LookupError for those of others."""
    path = _path(module)
    if path is None:
        raise LookupError(f"{module} is no module of this project.")
    return path


@cache
def _path(module: str) -> Path | None:
    """The source file of a module of this project; None for those of others."""
    parts = module.split(".")
    roots = (ROOT,) if parts[0] in (METHOD, *FLOORS_ABOVE) else tuple(USERS_FOLDERS)
    places = [root.joinpath(*parts) for root in roots]
    files = (file for p in places for file in (p.with_suffix(".py"), p / "__init__.py"))
    return next((file for file in files if file.is_file()), None)


_AT_START = {
    path: file_sha256(path)
    for package in (METHOD, *FLOORS_ABOVE)
    for path in (ROOT / package).rglob("*.py")
}
"""The source as it was when this process began."""
