"""How tables and figures name methods and round numbers."""

from __future__ import annotations

DECIMALS = 6
"""Digits after the point in `metrics.json`."""

LABELS = {
    "unedited": "unedited",
    "ft": "FT",
    "ft_w": "FT-W",
    "ft_l": "FT+L",
    "mend": "MEND",
    "rome": "ROME",
    "memit": "MEMIT",
    "serac": "SERAC",
}
"""How tables and figures name the methods; others go by the name that they are registered under."""


def label(method: str) -> str:
    """A method's name for people."""
    return LABELS.get(method, method)
