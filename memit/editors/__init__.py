"""Editors: ways to put requested facts into a model, all behind one small interface.

A new method is one new file in this package. Editors are imported from their own modules, so that
one editor's code is none of another's; `known_editors` imports all of them.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memit.editors.base import Editor


def known_editors() -> dict[str, type[Editor]]:
    """All editors by their names, those of files that `load_editors` has imported included."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    from memit.editors.base import EDITORS

    return EDITORS
