"""Edit thousands of facts in a language model: the method, torch in and torch out.

    import memit

    lm = memit.load_model("path/to/a/model")
    records = memit.read_records("facts.jsonl")
    delta = memit.edit(lm, records, corpus="corpus.txt")
    print(memit.ask(lm, "The mother tongue of Danielle Darrieux is"))
    delta.save("facts.safetensors")

Names are imported when they are used, so that `import memit` itself costs nothing.
"""

# ruff: noqa: F401 - type checkers read the imports below, everybody else `_MODULES`

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memit.editing import Answer, ask, edit
    from memit.hyperparameters import Hyperparameters
    from memit.language_model import LanguageModel, load_model
    from memit.requests import EditRequest, Record, read_records
    from memit.weight_delta import WeightDelta

_MODULES = {
    "editing": ("Answer", "ask", "edit"),
    "hyperparameters": ("Hyperparameters",),
    "language_model": ("LanguageModel", "load_model"),
    "requests": ("EditRequest", "Record", "read_records"),
    "weight_delta": ("WeightDelta",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memit' has no attribute '{name}'")
    return getattr(import_module(f"memit.{_HOMES[name]}"), name)
