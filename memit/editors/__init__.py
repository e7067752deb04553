"""Editors: ways to put requested facts into a model, all behind one small interface.

A new method is one new file in this package: whoever asks for `EDITORS` has every file imported.
Other names are imported from where they stand when they are used, so that one editor's code is
none of another's.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memit.editors.base import EDITORS, Edit, Editor, Resources, load_editors, register
    from memit.editors.fine_tuning import FineTuning
    from memit.editors.memit import Memit
    from memit.editors.mend import Mend
    from memit.editors.rome import Rome
    from memit.editors.saved_edit import load_edit
    from memit.editors.serac import Serac
    from memit.editors.unedited import Unedited

__all__ = [
    "EDITORS",
    "Edit",
    "Editor",
    "FineTuning",
    "Memit",
    "Mend",
    "Resources",
    "Rome",
    "Serac",
    "Unedited",
    "load_edit",
    "load_editors",
    "register",
]

_HOMES = {
    "EDITORS": "base",
    "Edit": "base",
    "Editor": "base",
    "FineTuning": "fine_tuning",
    "Memit": "memit",
    "Mend": "mend",
    "Resources": "base",
    "Rome": "rome",
    "Serac": "serac",
    "Unedited": "unedited",
    "load_edit": "saved_edit",
    "load_editors": "base",
    "register": "base",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memit.editors' has no attribute {name!r}")
    if name == "EDITORS":
        for module in pkgutil.iter_modules(__path__):
            import_module(f"{__name__}.{module.name}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
