"""Reading back what any editor's edit saved."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from memit.editors.base import Edit
from memit.editors.serac import SeracEdit
from memit.errors import IntegrityError
from memit.weight_delta import WeightDelta


def load_edit(path: Path) -> Edit:
    """The edit in a file, a change of weights or a memory; raises `IntegrityError` for others."""
    try:
        with safe_open(path, framework="pt") as file:
            described = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise IntegrityError(
            f"{path} does not hold an edit ({error}); make or fetch it again."
        ) from error
    return SeracEdit.load(path) if "requests" in described else WeightDelta.load(path)
