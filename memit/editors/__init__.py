"""Editors: ways to put requested facts into a model, all behind one small interface.

Every file in this package is imported, so that a new method is one new file.
"""

import importlib
import pkgutil

from memit.editors.base import EDITORS, Edit, Editor, Resources, register
from memit.editors.fine_tuning import FineTuning
from memit.editors.memit import Memit
from memit.editors.mend import Mend
from memit.editors.rome import Rome
from memit.editors.saved_edit import load_edit
from memit.editors.serac import Serac
from memit.editors.unedited import Unedited

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

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
    "register",
]
