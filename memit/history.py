"""What the batches of a stream of facts leave for the next one: a directory of states.

A state is a folder with C_p = Σ K Kᵀ of each edited layer (Parquet, like second moments), the sum
of all changes of the weights, and `state.json`. The last folder counts. The one before it stays, so
that the last batch can be run again, or taken back by deleting its folder.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from memit.errors import InputError, IntegrityError
from memit.files.atomic import temporary, write_whole
from memit.files.digests import file_sha256

STATE = "state.json"
DELTA = "delta.safetensors"


@dataclass(frozen=True)
class State:
    """What some batches have left."""

    folder: Path
    model: str
    """Digest of the unedited model."""
    layers: tuple[int, ...]
    batches: tuple[str, ...]
    """Digests of the requests of each batch, see `memit.requests.requests_digest`."""

    @property
    def delta(self) -> Path:
        """The file with the sum of all changes."""
        return self.folder / DELTA

    @property
    def sums(self) -> dict[int, Path]:
        """The file with C_p of each layer."""
        return {layer: self.folder / _name(layer) for layer in self.layers}


def state_before(directory: Path, model: str, layers: Sequence[int], batch: str) -> State | None:
    """The state that a batch is edited upon; None if it is the first one. Where the batch itself
    came last, this is the state before it, so that to run it again changes nothing.

    Raises:
        InputError: the history is of another model or other layers, or the batch came earlier.
        IntegrityError: it is damaged.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: name a directory in edit.history.")
    states = _states(directory)
    if not states:
        return None
    last = states[-1]
    if (last.model, last.layers) != (model, tuple(layers)):
        raise InputError(
            f"{directory} is the history of another model or of other layers than "
            f"{', '.join(map(str, layers))}: name a directory of its own for each in edit.history."
        )
    if batch not in last.batches:
        return last
    earlier = last.batches[: last.batches.index(batch)]
    kept = {state.batches: state for state in states}
    if earlier == last.batches[:-1] and (not earlier or earlier in kept):
        return kept.get(earlier)
    raise InputError(
        f"these facts are batch {len(earlier) + 1} of {len(last.batches)} in {directory}, and what "
        "came before them is not kept any more: name the next batch in requests.path."
    )


def keep_state(
    directory: Path,
    before: State | None,
    batch: str,
    model: str,
    delta: Path,
    sums: Mapping[int, Path],
) -> None:
    """Add the state after a batch that was edited upon `before`, whole or not at all; the files of
    `delta` and `sums` are copied. States before these two are deleted.

    Raises:
        ResourceError: the disk is full.
    """
    states = _states(directory)
    last = states[-1] if states else None
    batches = (*(before.batches if before else ()), batch)
    files = {DELTA: delta, **{_name(layer): path for layer, path in sums.items()}}
    if last and last.batches == batches and _holds(last.folder, files):
        return
    folder = directory / f"{int(last.folder.name) + 1 if last else 1:04}"
    described = {"model": model, "layers": list(sums), "batches": batches}

    def write(making: Path) -> None:
        making.mkdir()
        for name, path in files.items():
            write_whole(making / name, partial(shutil.copyfile, path))
        text = json.dumps(described, indent=1) + "\n"
        write_whole(making / STATE, lambda path: path.write_text(text, encoding="utf-8"))

    write_whole(folder, write)
    for state in states:
        if state != before:  # with another name first, for a kill might leave a part of it
            with temporary(state.folder) as removed:
                os.replace(state.folder, removed)


def _holds(folder: Path, files: Mapping[str, Path]) -> bool:
    return all(file_sha256(folder / name) == file_sha256(path) for name, path in files.items())


def _name(layer: int) -> str:
    return f"layer-{layer:02}.parquet"


def _states(directory: Path) -> list[State]:
    numbered = [path for path in directory.glob("*") if path.name.isdigit()]
    return [_read(path) for path in sorted(numbered, key=lambda path: int(path.name))]


def _read(folder: Path) -> State:
    try:
        told = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return State(folder, told["model"], tuple(told["layers"]), tuple(told["batches"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise IntegrityError(
            f"{folder} is no state of a history ({error}): restore it, or delete it to go back to "
            "the state before it."
        ) from error
