"""The loaded model with an edit in its weights.

Apart from `loaded_model`, so that the key of a task that applies no edit names no editor's code.
"""

from functools import partial

from memit.editors.saved_edit import load_edit
from tasks.engine.loaded_model import loaded

with_edit = partial(loaded, load=load_edit)
"""`loaded`, with what any editor has made."""
