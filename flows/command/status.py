"""`memit status`: which facts a model directory holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from flows.command.script import output
from memit.model_directory import edit_status
from memit.redaction import one_line


def show_status(directory: Path) -> None:
    """Print which facts are in a model directory, of which list and commit."""
    edits = [_status(*edit) for edit in edit_status(directory)]
    output.print(Text("\n".join(edits) or f"{directory} carries no edit."), soft_wrap=True)


def _status(
    folder: Path, state: str, origin: Mapping[str, str], provenance: Mapping[str, Any]
) -> str:
    head = (
        f"{folder.name}: {state}. {provenance.get('count', '?')} facts by "
        f"{provenance.get('method', '?')}, made for {provenance.get('model', '?')}"
    )
    if origin:
        head += f"; list {origin['list']}, commit {origin['commit'] or 'unknown'}"
    return "\n  ".join([head, *map(fact_line, provenance.get("facts", []))])


def fact_line(named: Mapping[str, str]) -> str:
    """A fact and its origin on one line."""
    origin = ", ".join(f"{k}: {v}" for k, v in named.items() if k not in ("prompt", "target"))
    return one_line(f"{named['prompt']} → {named['target']}{f' ({origin})' if origin else ''}")
