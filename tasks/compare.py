"""The methods that are compared: what they are called, how they edit, how they are measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from memit.errors import InputError
from memit.files.reading import check_file
from memit.requests import (
    Record,
    drop_conflicts,
    read_counterfact,
    sample_records,
    write_records,
)
from tasks.edit import StoredMoments
from tasks.engine.artifacts import Artifact, Value, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.checkpoints import work_directory
from tasks.engine.code import code_of_class
from tasks.engine.cost import Cost, Meter
from tasks.engine.loaded_model import ModelReference, loaded, with_edit
from tasks.engine.progress import piece_progress, progress_bar
from tasks.evaluation import TablePiece, kept_table
from tasks.requests import Source, read_source

if TYPE_CHECKING:
    from memit.editors.base import Editor
    from memit.evaluation.zsre import ZsreRecord
    from memit.hyperparameters import Hyperparameters

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

SECTIONS = {"memit": "the sections targets and edit", "mend": "mend", "serac": "serac"}
"""Where settings stand that are not in ``compare.settings``."""


@dataclass(frozen=True)
class Method:
    """A method with its settings, under the name that it has in the table."""

    name: str
    editor: Editor

    @property
    def label(self) -> str:
        """Its name for people."""
        return LABELS.get(self.name, self.name)

    @property
    def code(self) -> dict[str, str]:
        """SHA-256 of each source file that its editor comes from."""
        return code_of_class(type(self.editor))


def make_methods(
    names: Iterable[str],
    settings: Mapping[str, Mapping[str, Any]],
    hyperparameters: Hyperparameters,
    model: str,
    depth: int,
    editors: str | None = None,
) -> list[Method]:
    """The methods of these names, with the settings that differ from their presets; ``editors`` is
    a file or a folder that registers more of them.

    Raises:
        InputError: there is no such file, method, setting or layer.
    """
    if editors is not None:
        from memit.editors.base import load_editors

        if not Path(editors).is_dir():
            check_file(editors, "the editors")
        load_editors(Path(editors))
    for name in settings:
        if name not in names:
            raise InputError(
                f"compare.settings names {name}, which is not among compare.methods: add it there."
            )
    methods = [
        Method(name, _with_settings(name, _preset(name, hyperparameters, model, depth), settings))
        for name in names
    ]
    for method in methods:
        for layer in method.editor.moment_layers:
            if layer >= depth:
                raise InputError(
                    f"{method.label} is asked to edit layer {layer}, but {model} has {depth} "
                    f"blocks: the layers are 0 to {depth - 1}."
                )
    return methods


def _preset(name: str, hyperparameters: Hyperparameters, model: str, depth: int) -> Editor:
    from memit.editors import known_editors
    from memit.editors.fine_tuning import (
        PUBLISHED_LAYERS,
        FineTuning,
        constrained_fine_tuning,
        fine_tuning_with_decay,
    )
    from memit.editors.memit import Memit
    from memit.editors.rome import rome_preset
    from memit.hyperparameters import published_layer

    if name == "memit":
        return Memit(hyperparameters)
    if name == "rome":
        return rome_preset(model, depth)
    if name == "ft":
        return FineTuning(published_layer(PUBLISHED_LAYERS, model, depth))
    if name == "ft_w":
        return fine_tuning_with_decay(published_layer(PUBLISHED_LAYERS, model, depth))
    if name == "ft_l":
        return constrained_fine_tuning()
    editors = known_editors()
    if name not in editors:
        known = ", ".join(dict.fromkeys([*LABELS, *editors]))
        raise InputError(f"compare.methods names {name}, which is unknown: there are {known}.")
    try:
        return editors[name]()
    except TypeError as error:
        raise InputError(
            f"the editor {name} cannot be made without settings ({error}): give each of them a "
            "default."
        ) from None


def _with_settings(name: str, editor: Editor, settings: Mapping[str, Mapping[str, Any]]) -> Editor:
    chosen = settings.get(name, {})
    if not chosen:
        return editor
    assert is_dataclass(editor)
    known = [field.name for field in fields(editor) if field.name not in {"settings", "trained"}]
    for key in chosen:
        if key not in known or name in SECTIONS:
            there_are = f"there are {', '.join(known)}" if known else "it has none of its own"
            where = f" (those of {name} stand in {SECTIONS[name]})" if name in SECTIONS else ""
            raise InputError(f"compare.settings.{name} has no {key}: {there_are}{where}.")
        _check_setting(f"compare.settings.{name}.{key}", chosen[key], getattr(editor, key))
    return replace(editor, **chosen)  # pyright: ignore[reportArgumentType]


def _check_setting(name: str, value: Any, preset: Any) -> None:
    """A value must be of the preset's kind; none of the settings is negative."""
    kind = float if preset is None else type(preset)
    fits = isinstance(value, (int, float) if kind is float else kind)
    if fits and isinstance(value, bool) == (kind is bool):
        if isinstance(value, str) or value >= 0:
            return
    elif value is None and preset is None:
        return
    raise InputError(f"{name} is {value!r} where the preset is {preset!r}: give a value like it.")


# --- which records are edited, and from which may be learnt --------------------------------------


class Split(Value):
    """All records without contradictions, in two parts that share no subject."""

    edited: Artifact
    """Those that are sampled for editing."""
    training: Artifact
    """Those that editors may learn from."""
    count: int
    """How many can be edited."""
    training_count: int
    dropped: int
    """Records left out because they contradict an earlier one."""
    prompts_dropped: int
    """Neighbourhood prompts of edited records that ask what training tells."""


@cached_task("split")
def split_records(
    source: Source | Literal["zsre"], file: Artifact, training: int, seed: int
) -> Split:
    """Set aside ``training`` records, at most half of all, whole subjects at a time."""
    records, dropped = _read(source, file.checked())
    edited, learnt = split_by_subject(records, training, seed)
    purged = without_prompts(edited, learnt)
    before, after = (sum(len(r.neighborhood_prompts) for r in part) for part in (edited, purged))

    def keep(part: Sequence[Record]) -> Artifact:
        return store_piece("split", ".json", lambda path: write_records(part, path))

    return Split(
        edited=keep(purged),
        training=keep(learnt),
        count=len(purged),
        training_count=len(learnt),
        dropped=dropped,
        prompts_dropped=before - after,
    )


def _read(source: Source | Literal["zsre"], path: Path) -> tuple[list[Record], int]:
    if source != "zsre":
        return read_source(source, path)
    from memit.evaluation.zsre import as_records, read_zsre

    return drop_conflicts(as_records(read_zsre(path)))


def split_by_subject(
    records: Sequence[Record], training: int, seed: int
) -> tuple[list[Record], list[Record]]:
    """Records to edit and records to learn from, which have no subject in common."""
    counts = Counter(record.request.subject for record in records)
    subjects = list(counts)
    Random(seed).shuffle(subjects)
    learnt: set[str] = set()
    wanted = min(training, len(records) // 2)
    while sum(counts[subject] for subject in learnt) < wanted:
        learnt.add(subjects.pop())
    return (
        [record for record in records if record.request.subject not in learnt],
        [record for record in records if record.request.subject in learnt],
    )


def without_prompts(edited: Sequence[Record], learnt: Sequence[Record]) -> list[Record]:
    """The edited records without neighbourhood prompts that a record to learn from contains."""
    told = {
        prompt for record in learnt for prompt in (record.request.text, *record.paraphrase_prompts)
    }
    return [
        replace(
            record,
            neighborhood_prompts=tuple(p for p in record.neighborhood_prompts if p not in told),
        )
        for record in edited
    ]


@cached_task("questions")
def sample_questions(edited: Artifact, count: int | None, seed: int) -> Artifact:
    """Some of zsRE's records, or all of them.

    Raises:
        InputError: there are fewer.
    """
    records = read_counterfact(edited.checked())
    chosen = records if count is None else sample_records(records, count, seed)
    return store_piece("questions", ".json", lambda path: write_records(chosen, path))


# --- editing ------------------------------------------------------------------------------------


class MethodEdit(Value):
    """What a method made of the requests."""

    edit: Artifact
    cost: Cost
    dropped: int = 0
    """Requests that could not be written."""


@cached_task("method")
def edit_with(
    name: str,
    editor: Editor,
    code: Mapping[str, str],
    model: ModelReference,
    records: Artifact,
    training: Artifact,
    trained: Artifact | None,
    prefixes: Sequence[str],
    moments: Mapping[int, Artifact],
    token_budget: int,
    seed: int,
) -> MethodEdit:
    """Let an editor edit; ``name`` and ``code`` are those of its `Method`, and ``trained`` is the
    file of one that has learnt.

    An editor that goes on where it was killed keeps its unfinished work in `work_directory`.
    """
    from memit.editors.base import Resources

    chosen = read_counterfact(records.checked())
    checkpoints = work_directory("method", editor, code, model, records, seed)
    if trained is not None:
        editor = replace(editor, trained=trained.checked())  # type: ignore[type-var]
    with (
        loaded(model) as lm,
        Meter() as meter,
        progress_bar(name, len(chosen), "edits") as bar,
    ):
        resources = Resources(
            token_budget=token_budget,
            prefixes=prefixes,
            moments=StoredMoments(moments, model.model.digest),
            training=read_counterfact(training.checked()),
            seed=seed,
            checkpoints=checkpoints,
            progress=lambda done: bar.advance(0, done),
        )
        edit = editor.edit(lm, [record.request for record in chosen], resources)
    return MethodEdit(
        edit=store_piece("method", ".safetensors", edit.save),
        cost=meter.cost,
        dropped=len(edit.provenance.get("left_out", ())),
    )


@cached_task("select_targets")
def select_targets(pieces: Sequence[Artifact], rows: Sequence[int]) -> Artifact:
    """Targets of some requests, each given by its row in all of the pieces, as one file."""
    from memit.targets import Targets

    whole = Targets.concatenate([Targets.load(piece.checked()) for piece in pieces])
    return store_piece("targets", ".safetensors", whole.chosen(rows).save)


# --- answers ------------------------------------------------------------------------------------


@cached_task("zsre")
def answer_piece(
    questions: Sequence[ZsreRecord],
    model: ModelReference,
    edit: Artifact | None,
    token_budget: int,
) -> TablePiece:
    """Answer some of zsRE's questions under teacher forcing."""
    from memit.evaluation.zsre import score_zsre

    with with_edit(model, edit) as lm, Meter() as meter, piece_progress("evaluation") as progress:
        table = score_zsre(lm, questions, token_budget=token_budget, progress=progress)
    return kept_table("evaluation", table, meter.cost)
