"""The methods of the steps `compare` and `scaling`: names, editors and settings."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from memit.editors import known_editors
from memit.editors.base import Editor, load_editors
from memit.editors.fine_tuning import VARIANTS, fine_tuning_preset
from memit.editors.joint import Joint
from memit.editors.memit import Memit
from memit.editors.rome import rome_preset
from memit.errors import InputError
from memit.files.reading import check_file
from memit.hyperparameters import Hyperparameters, joint_settings
from tasks.edit import Method
from tasks.reporting.labels import LABELS, label

SECTIONS = {"memit": "the sections targets and edit", "mend": "mend", "serac": "serac"}
"""Sections with settings that are not in `compare.settings`."""
OTHERWISE_GIVEN = {"settings", "hyperparameters", "trained"}
"""Fields of editors that come from such sections, or from an earlier step."""


def make_methods(
    names: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    hyperparameters: Hyperparameters,
    model: str,
    depth: int,
    editors: str | None = None,
) -> list[Method]:
    """The methods of these names, with the settings that differ from their presets; `editors` is
    a file or a folder that registers more of them.

    Raises:
        InputError: there is no such file, method, setting or layer.
    """
    if editors is not None:
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
                    f"{label(method.name)} is asked to edit layer {layer}, but {model} has {depth} "
                    f"blocks: the layers are 0 to {depth - 1}."
                )
    return methods


def _preset(name: str, hyperparameters: Hyperparameters, model: str, depth: int) -> Editor:
    if name == "rome":
        return rome_preset(model, depth)
    if name in VARIANTS:
        return fine_tuning_preset(name, model, depth)
    if name == "joint":
        return Joint(joint_settings(hyperparameters))
    editors = known_editors()
    if name not in editors:
        known = ", ".join(dict.fromkeys([*LABELS, *editors]))
        raise InputError(f"compare.methods names {name}, which is unknown: there are {known}.")
    try:
        kind = editors[name]
        return kind(hyperparameters) if issubclass(kind, Memit) else kind()
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
    known = [field.name for field in fields(editor) if field.name not in OTHERWISE_GIVEN]
    kinds = get_type_hints(type(editor))
    for key in chosen:
        if key not in known or name in SECTIONS:
            available = f"it has {', '.join(known)}" if known else "it has none of its own"
            where = f" (those of {name} are in {SECTIONS[name]})" if name in SECTIONS else ""
            raise InputError(f"compare.settings.{name} has no {key}: {available}{where}.")
        try:
            TypeAdapter(kinds[key]).validate_python(chosen[key], strict=True)
        except ValidationError as error:
            wanted = (each["msg"].removeprefix("Input should be ") for each in error.errors())
            raise InputError(
                f"compare.settings.{name}.{key} is {chosen[key]!r}, but must be "
                f"{' or '.join(wanted)}, such as the preset's {getattr(editor, key)!r}."
            ) from None
    try:
        return replace(editor, **chosen)  # pyright: ignore[reportArgumentType]
    except InputError as error:  # a number out of its range
        raise InputError(f"compare.settings.{name}: {error}") from None
