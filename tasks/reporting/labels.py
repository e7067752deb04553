"""Names of methods and of metrics, and precision of numbers, in tables and figures."""

from collections.abc import Mapping
from typing import Any

DECIMALS = 6
"""Digits after the point in `metrics.json`."""
OWN = "own_"
"""What the key of a metric from the user's own file begins with."""

LABELS = {
    "unedited": "unedited",
    "ft": "FT",
    "ft_w": "FT-W",
    "ft_bf": "FT-BF",
    "ft_l": "FT+L",
    "mend": "MEND",
    "rome": "ROME",
    "memit": "MEMIT",
    "joint": "JOINT",
    "memit_sequence": "MEMIT in sequence",
    "memit_forgetting": "MEMIT, forgetting",
    "encore": "ENCORE",
    "alphaedit": "AlphaEdit",
    "serac": "SERAC",
}
"""Names of the methods in tables and figures; others keep their registered name."""


def editor_label(edit: Mapping[str, Any]) -> str:
    """The name of the editor whose edit `edit.json` describes."""
    return label("joint" if edit["hyperparameters"]["site"] == "down_projections" else "memit")


def edit_title(edit: Mapping[str, Any]) -> str:
    """How many edits are where, and by which editor, out of `edit.json`."""
    layers = ", ".join(map(str, edit["layers"]))
    return f"{edit['count']} edits by {editor_label(edit)} in layers {layers}"


def label(method: str) -> str:
    """The name of a method in tables and figures."""
    return LABELS.get(method, method)
