"""Editing in batches, one after another, each on the model as edited so far."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from memit.editors.base import Edit, Editor, Resources
from memit.language_model import LanguageModel
from memit.layer_walk import layer_keys
from memit.quadratic import Past
from memit.requests import EditRequest
from memit.second_moment import SecondMoment
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
    keys = key_sums(lm, requests, editor.past_layers, settings.key_average, resources)
    change = dict(resources.past.change)
    for layer in keys:
        delta = edit.changes[lm.weight_name(layer)].dense().double()
        delta = delta.T if lm.is_transposed(layer) else delta
        change[layer] = change.get(layer, 0) + delta
    return Past(keys, change)


def key_sums(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    key_average: str,
    resources: Resources,
) -> dict[int, SecondMoment]:
    """C_p of each layer once an edit of some requests is in the weights: the sum K Kᵀ of their keys
    and that of earlier ones."""
    rows = edit_rows(lm, requests, resources.prefixes)
    found = layer_keys(lm, rows, layers, key_average, token_budget=resources.token_budget)
    earlier, sums = resources.past.keys, {}
    for layer, K in found.items():
        own = SecondMoment((K @ K.T).cpu(), K.shape[1])
        sums[layer] = own + earlier[layer] if layer in earlier else own
    return sums
