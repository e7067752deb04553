"""Editors: ways to put requested facts into a model, all behind one small interface."""

from memit.editors.base import EDITORS, Edit, Editor, Resources, register
from memit.editors.fine_tuning import FineTuning
from memit.editors.memit import Memit
from memit.editors.mend import Mend
from memit.editors.rome import Rome
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
    "Unedited",
    "register",
]
