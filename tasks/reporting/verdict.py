"""What a run amounts to in plain sentences: facts that are not said, damage, and what to change."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow

DAMAGE = "Damage"
"""What a sentence begins with if it is alarming."""
NAMED = 8
"""Facts that are named; the others are in `facts.csv`."""
LOST = 10.0
"""Percentage points of neighbours, or percent of perplexity, from which a loss is alarming."""
FAR = 0.3
"""Share of the way to the targets that may be left."""


def verdict(facts: pyarrow.Table, edit: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """Sentences about a run, out of `facts.csv`, `edit.json` and `metrics.json`: how many facts the
    model says (argmax), which it does not and what to change, what is alarming, what is missing,
    and which settings nobody has checked."""
    missed = [fact for fact in facts.to_pylist() if not fact["answered"]]
    said = f"{len(facts) - len(missed)} of {len(facts)} facts are said"
    if not missed:
        return [f"{said}.", *_alarms(metrics), *_absent(metrics), *edit.get("notes", ())]
    names = "; ".join(f"{fact['prompt']} → {fact['target_new']}" for fact in missed[:NAMED])
    more = f"; and {len(missed) - NAMED} more" if len(missed) > NAMED else ""
    return [
        f"{said}. Not said: {names}{more} (`answered` in evaluation/facts.csv).",
        _way_out(edit),
        *_alarms(metrics),
        *_absent(metrics),
        *edit.get("notes", ()),
    ]


def _way_out(edit: Mapping[str, Any]) -> str:
    """What to change so that more facts are said: the residuals show what held them back."""
    settings = edit["hyperparameters"]
    share = edit["share_left"]
    if share > FAR:
        weight = settings["covariance_weight"]
        return (
            f"{share:.0%} of the way to the targets is left after the last layer: try a smaller "
            f"edit.covariance_weight (λ, now {weight:g}), {weight / 10:g} for example, or more "
            "edit.layers."
        )
    longer = f"more targets.evaluations (now {settings['evaluations']})"
    if settings["argmax_stop"]:
        longer = f"a later targets.argmax_stop (now {settings['argmax_stop']}; 0: none)"
    return (
        f"The hidden states came near their targets ({share:.0%} of the way is left), which are "
        f"too weak: try {longer} or a larger targets.clamp_factor (now "
        f"{settings['clamp_factor']:g})."
    )


def _alarms(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Damage that the lenient metrics do not show."""
    before, after, edit = metrics["before"], metrics["after"], metrics["edit"]
    written = edit["count"] / (edit["count"] + edit["dropped"])  # what was dropped counts as failed
    way_out = "edit fewer facts, or with a larger edit.covariance_weight"
    for name, what in (
        ("neighborhood_accuracy", "says the true object on prompts about other subjects"),
        ("kept_accuracy", "answers the prompts that must stay as it did"),
    ):
        if written * before.get(name, 0.0) - after.get(name, 0.0) > LOST:
            yield (
                f"{DAMAGE}: the model {what} in {after[name]:.0f} % of cases, {before[name]:.0f} % "
                f"before: {way_out}."
            )
    was, now = before.get("perplexity"), after.get("perplexity")
    if was and now and now > was * (1 + LOST / 100):
        yield f"{DAMAGE}: the perplexity rose from {was:.1f} to {now:.1f}: {way_out}."
    layer, ratio = max(edit["update_ratio"].items(), key=lambda item: item[1])
    if ratio > 1:
        yield (
            f"{DAMAGE}: the update of layer {layer} is {ratio:.1f} times as large as its weights: "
            f"{way_out}."
        )


def _absent(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Why there is no score."""
    if "score" not in metrics["after"]:
        yield (
            "No score S: it needs paraphrases, and neighbours in CounterFact's sense, which share "
            "the old object. Neighbors of your own facts are measured as kept."
        )
