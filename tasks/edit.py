"""The tasks of the step `edit`: let an editor change the model, and keep what it made."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors.torch import save_file

from memit.editors.base import Edit, Editor, Resources
from memit.errors import EditError, IntegrityError
from memit.quadratic import Past
from memit.requests import read_counterfact
from memit.second_moment import SecondMoment, read_moment
from memit.targets import Targets
from memit.weight_delta import WeightDelta
from tasks.engine.artifacts import Artifact, Value, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.checkpoints import work_directory
from tasks.engine.code import code_of_own
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.progress import progress_bar

OnFailure = Literal["stop", "drop"]
"""What happens to edits that cannot be written: the run stops, or goes on without them."""
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """An editor with its settings, under the name that it has in tables."""

    name: str
    editor: Editor

    @property
    def cache_key(self) -> dict[str, object]:
        """Settings, and the SHA-256 of each source file that the editor comes from."""
        code = code_of_own(type(self.editor))
        return {"name": self.name, "editor": self.editor, "code": code}


class MethodEdit(Value):
    """What a method made of some requests."""

    edit: Artifact
    """What `Edit.save` wrote (safetensors)."""
    dropped: dict[int, str]
    """Index of each request that could not be written, with the reason."""


class StoredMoments(Mapping[int, SecondMoment]):
    """The second moments of the layers, each read when it is asked for."""

    def __init__(self, files: Mapping[int, Artifact], model_digest: str) -> None:
        self.files = files
        self.model_digest = model_digest

    def __getitem__(self, layer: int) -> SecondMoment:
        """Read one layer's sums, checked to be those of this model and layer."""
        path = self.files[layer].checked()
        moment, provenance = read_moment(path)
        if (provenance.get("model"), provenance.get("layer")) != (self.model_digest, layer):
            raise IntegrityError(
                f"{path} holds statistics of another model or layer: run the step statistics again."
            )
        return moment

    def __iter__(self) -> Iterator[int]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


@cached_task("edit")
def edit_with(
    method: Method,
    model: ModelReference,
    records: Artifact,
    *,
    prefixes: Sequence[str],
    moments: Mapping[int, Artifact],
    targets: Artifact | None,
    token_budget: int,
    on_failure: OnFailure,
    training: Artifact | None = None,
    trained: Artifact | None = None,
    seed: int = 0,
    earlier: Artifact | None = None,
    sums: Mapping[int, Artifact] | None = None,
) -> MethodEdit:
    """Let a method edit all records.

    `targets` are those of the records, of an editor that spreads some; `training` are records to
    learn from, and `trained` is the file of an editor that has learnt. An editor that resumes after
    a kill keeps its unfinished work in `work_directory`. With the delta of `earlier` edits and the
    `sums` of their keys, these are kept, and are part of the delta.

    Raises:
        EditError: edits cannot be written, and `on_failure` is not to drop them.
        NumericsError: none can.
    """
    asked = read_counterfact(records.checked())
    requests = [record.request for record in asked]
    goals = None if targets is None else Targets.load(targets.checked())
    checkpoints = work_directory(
        "edit", method, model, records, seed, prefixes, moments, training, trained
    )
    editor = method.editor
    if trained is not None:
        editor = replace(editor, trained=trained.checked())  # type: ignore[type-var]
    past = Past(StoredMoments(sums or {}, model.model.digest))
    with loaded(model, earlier) as lm:

        def write(kept: Sequence[int]) -> Edit:
            with progress_bar(method.name, len(kept), "edits") as bar:
                resources = Resources(
                    token_budget=token_budget,
                    prefixes=prefixes,
                    moments=StoredMoments(moments, model.model.digest),
                    past=past,
                    targets=goals and goals.chosen(kept),
                    training=read_counterfact(training.checked()) if training else (),
                    seed=seed,
                    checkpoints=checkpoints,
                    progress=bar.advance,
                )
                return editor.edit(lm, [requests[index] for index in kept], resources)

        edit, dropped = write_what_can_be(write, len(requests), on_failure)
    left_out = dict.fromkeys(edit.provenance.get("left_out", ()), "the editor left it out")
    if isinstance(edit, WeightDelta):
        written = [record for index, record in enumerate(asked) if index not in dropped | left_out]
        edit = edit.naming(written)
        if earlier is not None:
            edit = edit.upon(WeightDelta.load(earlier.checked()))
    file = store_piece("edit", ".safetensors", edit.save)
    return MethodEdit(edit=file, dropped=left_out | dropped)


def write_what_can_be(
    write: Callable[[Sequence[int]], Result], count: int, on_failure: OnFailure
) -> tuple[Result, dict[int, str]]:
    """Write `count` edits, or those that can be written; return what `write` makes of these, and
    the reason why each of the others was dropped.

    Raises:
        EditError: some cannot be written, and `on_failure` is "stop", or none can.
    """
    dropped: dict[int, str] = {}
    while True:
        kept = [index for index in range(count) if index not in dropped]
        try:
            return write(kept), dropped
        except EditError as error:
            if on_failure == "stop" or len(error.edits) == len(kept):
                raise
            logger.warning("%s %d edits are dropped.", error, len(error.edits))
            dropped |= {kept[index]: str(error) for index in error.edits}


@cached_task("changed_weights")
def changed_weights(model: ModelReference, delta: Artifact) -> Artifact:
    """W + Δ of each changed parameter, under its name in a checkpoint of the model."""
    change = WeightDelta.load(delta.checked())
    with loaded(model) as lm:
        change.apply(lm)
        try:
            matrices = {name: lm.parameter(name).cpu().contiguous() for name in change.changes}
            return store_piece(
                "edit", ".safetensors", lambda path: save_file(matrices, path, {"format": "pt"})
            )
        finally:
            change.revert(lm)


def describe_edit(
    made: MethodEdit, targets: Path, records: Path, note: str | None = None
) -> dict[str, Any]:
    """The content of `edit.json`: how large targets, residuals and updates are, what was dropped,
    and the `note` on settings that nobody has checked."""
    origin = WeightDelta.load(made.edit.checked()).provenance
    all_records, hyperparameters = read_counterfact(records), origin["settings"]["hyperparameters"]
    kept = [index for index in range(len(all_records)) if index not in made.dropped]
    shift = Targets.load(targets).chosen(kept).delta_ratios.mean()
    notes, rule = [] if note is None else [note], origin.get("covariance_weight")
    if rule is not None:
        notes.append(f"λ {rule['weight']:g} by rule: {rule['reason']}.")
    return {
        "count": len(kept),
        "layers": hyperparameters["layers"],
        "target_shift": round(float(shift), 6),
        **{
            name: origin[name]
            for name in ("residuals", "residual_left", "share_left", "update_ratio")
        },
        "hyperparameters": hyperparameters,
        **({"covariance_weight": rule} if rule else {}),
        **({"notes": notes} if notes else {}),
        "dropped": [
            {"case_id": record.case_id, "prompt": record.request.text, "reason": reason}
            for index, reason in made.dropped.items()
            for record in all_records[index : index + 1]
        ],
    }
