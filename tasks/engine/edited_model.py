"""The loaded model with an edit in its weights.

Apart from `loaded_model`, so that the key of a task that applies no edit names no editor's code.
"""

from contextlib import AbstractContextManager

from memit.editors.saved_edit import load_edit
from memit.language_model import LanguageModel
from tasks.engine.artifacts import Artifact
from tasks.engine.loaded_model import LOADED, ModelReference, loaded


def with_edit(
    reference: ModelReference, edit: Artifact | None, *, shared: bool = False
) -> AbstractContextManager[LanguageModel]:
    """The model with the edit in the file `edit`, if there is one; see `loaded`.

    Raises:
        IntegrityError: a file of the model or the edit is not what it was.
    """
    if edit is None:
        return loaded(reference, shared=shared)
    return LOADED.held(reference, edit.sha256, lambda: load_edit(edit.checked()), shared)
