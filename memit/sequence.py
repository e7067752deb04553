"""Editing in batches, one after another, each on the model as edited so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from memit.editors.base import Edit, Editor, Resources
from memit.language_model import LanguageModel
from memit.layer_walk import layer_keys
from memit.quadratic import Past
from memit.requests import EditRequest
from memit.targets import edit_rows
from memit.weight_delta import WeightDelta


def edit_in_batches(
    lm: LanguageModel,
    editor: Editor,
    batches: Sequence[Sequence[EditRequest]],
    resources: Resources,
) -> Iterator[Edit]:
    """Edit batch by batch; each edit is yielded when it has been applied to the model, and stays.

    An editor with `past_layers` is told the keys and changes of the batches before. Targets are
    those of the model as it is when a batch's turn comes, unless `resources.targets` holds those of
    all batches.
    """
    done = 0
    for batch in batches:
        given, targets = resources, resources.targets
        if targets is not None:
            given = replace(given, targets=targets.chosen(range(done, done + len(batch))))
        edit = editor.edit(lm, batch, given)
        edit.apply(lm)
        yield edit
        done += len(batch)
        if editor.past_layers:
            assert isinstance(edit, WeightDelta)
            past = after(lm, editor, batch, edit, resources)
            resources = replace(resources, past=past)


def after(
    lm: LanguageModel,
    editor: Editor,
    requests: Sequence[EditRequest],
    edit: WeightDelta,
    resources: Resources,
) -> Past:
    """What the next edit needs to know, once `edit` of some requests is in the weights."""
    settings = editor.target_hyperparameters
    assert settings is not None
    found = layer_keys(
        lm,
        edit_rows(lm, requests, resources.prefixes),
        editor.past_layers,
        settings.key_average,
        token_budget=resources.token_budget,
    )
    keys, change = dict(resources.past.keys), dict(resources.past.change)
    for layer, K in found.items():
        delta = edit.changes[lm.weight_name(layer)].dense().to(K.device).double()
        delta = delta.T if lm.is_transposed(layer) else delta
        keys[layer] = keys.get(layer, 0) + K @ K.T
        change[layer] = change.get(layer, 0) + delta
    return Past(keys, change)
