"""Editors: ways to put requested facts into a model, all behind one small interface."""

from memit.editors.base import EDITORS, Edit, Editor, Resources, register
from memit.editors.memit import Memit

__all__ = ["EDITORS", "Edit", "Editor", "Memit", "Resources", "register"]
