"""Reading back what any editor's edit saved."""

from pathlib import Path

from memit.editors.base import Edit
from memit.files.tensors import load_metadata
from memit.weight_delta import WeightDelta


def load_edit(path: Path) -> Edit:
    """The edit in a file, a change of weights or a memory; raises `IntegrityError` for others."""
    if "requests" not in load_metadata(path):
        return WeightDelta.load(path)
    from memit.editors.serac import SeracEdit

    return SeracEdit.load(path)
