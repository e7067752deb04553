"""What every editor is: settings, and a method that turns requests into an edit.

A new method is one file in this package with a frozen dataclass of its settings that inherits
`Editor` and is decorated with `@register("name")`; see `docs/adding-a-method.md`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from memit.errors import InputError
from memit.language_model import LanguageModel
from memit.quadratic import NO_PAST, Past
from memit.requests import EditRequest, Record, requests_digest
from memit.second_moment import SecondMoment

if TYPE_CHECKING:
    from memit.hyperparameters import Hyperparameters
    from memit.targets import Targets


class Edit(Protocol):
    """The result of an editor: put it on a model, take it off, keep it."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Method, settings, model and requests that it came from."""
        ...

    def apply(self, lm: LanguageModel) -> None:
        """Make the model answer as edited."""

    def revert(self, lm: LanguageModel) -> None:
        """Make it answer exactly as before."""

    def save(self, path: Path) -> None:
        """Write it to a file."""


@dataclass(frozen=True)
class Resources:
    """What editors may draw on besides the model and the requests; each takes what it needs."""

    token_budget: int
    """Padded tokens on the device at a time."""
    prefixes: Sequence[str] = ()
    """Texts put before prompts, drawn once for all editors."""
    moments: Mapping[int, SecondMoment] = field(default_factory=dict)
    """Second moments by layer; may read its values on demand."""
    past: Past = NO_PAST
    """What earlier edits of the same model leave, for editors that are used in sequence."""
    targets: Targets | None = None
    """Targets of the requests, in order, with `Editor.target_hyperparameters`; None: not computed
    yet."""
    training: Sequence[Record] = ()
    """Records to learn from, disjoint from those that are edited or evaluated."""
    seed: int = 0
    """Seed of whatever the editor draws."""
    checkpoints: Path | None = None
    """Directory where an editor may keep unfinished work, to go on from when it was killed."""
    progress: Callable[[int], None] | None = None
    """Told the number of newly finished edits."""


class Editor(ABC):
    """A method with its settings."""

    name: ClassVar[str]
    """The name under which it is registered."""

    @property
    def moment_layers(self) -> tuple[int, ...]:
        """The layers whose second moments it asks `Resources.moments` for."""
        return ()

    @property
    def past_layers(self) -> tuple[int, ...]:
        """The layers of which it asks `Resources.past` for earlier keys and changes."""
        return ()

    @property
    def target_hyperparameters(self) -> Hyperparameters | None:
        """Settings of the targets (Eqn. 16) that it spreads; None: it needs none.

        A target depends on its request alone, so targets can be computed in pieces and shared.
        """
        return None

    def check(self, lm: LanguageModel) -> None:
        """Raise `InputError` for a model that it cannot edit, which may have no weights yet."""
        return

    @abstractmethod
    def edit(
        self, lm: LanguageModel, requests: Sequence[EditRequest], resources: Resources
    ) -> Edit:
        """Compute an edit that holds all requests; the model is given back as it was."""


Class = TypeVar("Class", bound=type[Editor])

EDITORS: dict[str, type[Editor]] = {}
"""All editors by name."""


def register(name: str) -> Callable[[Class], Class]:
    """Enter an editor's class into `EDITORS`."""

    def enter(editor: Class) -> Class:
        if name in EDITORS:
            raise InputError(f"there is an editor named {name} already; choose another name.")
        editor.name = name
        EDITORS[name] = editor
        return editor

    return enter


def load_editors(path: Path) -> None:
    """Import a user's own file of editors, or each file of a folder; they may import one another.

    Raises `InputError` for a file that cannot be imported, or has the name of another module.
    """
    for file in map(Path.resolve, sorted(path.glob("*.py")) if path.is_dir() else [path]):
        import_file(file)


def import_file(file: Path) -> ModuleType:
    """The module in a user's own file, which may import others beside it.

    Raises:
        InputError: it cannot be imported, or has the name of another module.
    """
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        found = import_module(file.stem)
    except Exception as error:  # it is anybody's code
        raise InputError(
            f"{file} cannot be imported ({type(error).__name__}: {error}): correct it."
        ) from error
    if found.__file__ is None or not file.samefile(found.__file__):
        raise InputError(f"{file} has the name of another module ({file.stem}): rename it.")
    return found


def provenance(editor: Editor, lm: LanguageModel, requests: Sequence[EditRequest]) -> dict:
    """Where an edit comes from: method, settings, model, requests."""
    return {
        "method": editor.name,
        "settings": asdict(editor),  # type: ignore[call-overload]
        "model": lm.name,
        "revision": lm.revision,
        "requests": requests_digest(requests),
        "count": len(requests),
    }
