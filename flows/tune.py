"""Find settings for a model, on facts that are not the user's (`memit tune`).

Results: `tuning/` with the trials (`trials.md`, `trials.png`) and a preset (`preset.toml`) for
`edit.preset`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.text import Text

from flows.command.estimate import LENGTHS, estimate_edit
from flows.command.script import console
from flows.compare import Sample, edit_sample, shared_targets
from flows.evaluation import measure
from flows.requests import split_source
from flows.service.step import Run, step
from flows.statistics import collect_layers
from memit.editors.joint import editor_for
from memit.errors import InputError, NumericsError
from memit.evaluation.counterfact import prompts_of
from memit.facts.neighbors import without_edited_neighbors
from memit.hyperparameters import Hyperparameters, summary
from memit.requests import Record, read_counterfact, sample_records
from memit.weight_delta import WeightDelta
from tasks.edit import Method
from tasks.engine.artifacts import Artifact, describe
from tasks.requests import (
    choose_requests,
    keep_records,
    locate_records,
    split_by_subject,
    write_embedded,
)
from tasks.tune import (
    LOWEST_SCORE,
    STAGES,
    Trial,
    draw_trials,
    neighbors,
    positions,
    preset_text,
    trials_table,
)

TUNING = Path("tuning")
FEWEST = 16
"""Facts that the model must know."""


@dataclass
class Facts:
    """Facts that are edited together."""

    run: Run
    records: Sequence[Record]
    held_out: Artifact | None
    """A text for the perplexity, if it is measured."""
    sample: Sample = field(init=False)

    def __post_init__(self) -> None:
        self.sample = Sample(keep_records(self.records), tuple(self.records))

    def metrics(self, edit: Artifact | None) -> dict[str, float]:
        """Of the model with an edit, or without one."""
        run, records = self.run, self.sample.records
        seed = run.parameters.evaluation.seed
        measured = measure(run, edit, prompts_of(records), (), records, self.held_out, seed)
        return measured.metrics(records, {})

    def trial(self, settings: Hyperparameters, moments: Mapping[int, Artifact]) -> Trial:
        """Edit with some settings, and measure that. Every piece is cached, so that trials which
        differ below L or in λ share their targets, and a search that was stopped goes on."""
        editor = editor_for(settings)
        method = Method(editor.name, editor)
        targets = shared_targets(self.run, method, self.sample.records)
        try:
            made, _ = edit_sample(self.run, method, self.sample, targets, moments)
            metrics = self.metrics(made.edit)
        except NumericsError as error:
            return Trial(settings, failure=str(error))
        used = WeightDelta.load(made.edit.checked()).provenance["settings"]["hyperparameters"]
        return Trial(settings, used["covariance_weight"], metrics)


@step("tune", reads=("model", "prefixes"))
def tune(run: Run) -> None:
    """Search coarse to fine until the time is over, and confirm the best on other facts."""
    deadline = time.monotonic() + 60 * run.parameters.tune.minutes
    start, depth = run.hyperparameters, run.model.model.layers
    chosen, others = _known_facts(run)
    _check_budget(run, start, len(chosen))
    highest = max(one.layers[-1] for stage in (positions, neighbors) for one in stage(start, depth))
    collected = collect_layers(run, range(highest + 1), tuning=True)
    paths, _ = collected.write(TUNING / "statistics")
    moments = {layer: describe(path) for layer, path in paths.items()}
    run.files += paths.values()
    search, check = Facts(run, chosen, None), Facts(run, others, collected.held_out)
    before = search.metrics(None)
    trials = list(search_settings(search, start, moments, before, deadline))
    best = max(trials, key=lambda trial: trial.rank(before))
    unedited = check.metrics(None)
    confirmed = check.trial(best.settings, moments)
    figures = confirmed.figures(unedited) or confirmed.failure
    run.write_text(TUNING / "trials.md", trials_table(trials, before, figures))
    run.write(TUNING / "trials.png", lambda path: draw_trials(trials, before, path))
    if not confirmed.keeps(unedited) or confirmed.metrics.get("score", 0.0) < LOWEST_SCORE:
        run.finish()
        raise InputError(
            f"no settings were found with which {run.model.model.id} can be edited: the best were "
            f"{summary(best.settings)}, with {figures}; give tune.minutes more time, and see "
            f"{TUNING}/trials.md."
        )
    text = preset_text(run.model.model.id, run.model.model.shape, confirmed, unedited, len(others))
    run.write_text(TUNING / "preset.toml", text)
    _say(f"{len(trials)} trials; the best: ", confirmed)
    console.print(
        f"  edit.preset: {TUNING}/preset.toml in params.yaml takes it; {TUNING}/trials.md"
    )


def search_settings(
    facts: Facts,
    start: Hyperparameters,
    moments: Mapping[int, Artifact],
    before: Mapping[str, float],
    deadline: float,
) -> Iterator[Trial]:
    """Trials, each stage around the best of those before; twice the time of the longest one is left
    for what follows."""
    depth, longest = facts.run.model.model.layers, 0.0
    best, seen = Trial(start), set[Hyperparameters]()
    for propose in STAGES:
        base = best.settings
        if propose.__name__ == "weights":
            if not best.weight:
                continue  # no trial has kept what must stay
            base = replace(base, covariance_weight=best.weight)
        for settings in propose(base, depth):
            began = time.monotonic()
            if settings in seen or not set(settings.layers) <= moments.keys():
                continue
            if seen and began + 3 * longest > deadline:
                return
            seen.add(settings)
            trial = facts.trial(settings, moments)
            longest = max(longest, time.monotonic() - began)
            _say("  ", trial)
            yield trial
            best = max(best, trial, key=lambda one: one.rank(before))


def _known_facts(run: Run) -> tuple[list[Record], list[Record]]:
    """Facts that the model knows, for the search and for the check, without a common subject and
    without neighbors that are edited.

    Raises:
        InputError: there are fewer than `FEWEST`, or one of the parts has no facts or no neighbors.
    """
    section, file = run.parameters.tune, write_embedded("choosing")
    if section.facts is not None:
        file = describe(locate_records(section.facts, None, None))
    elif run.parameters.model.source == "synthetic":
        file = split_source(run.parameters).training
    chosen = run.compute(choose_requests, "counterfact", file, None, section.seed, run.model, True)
    asked = read_counterfact(chosen.records.checked())
    known = [one for one in asked if one.paraphrase_prompts and one.neighborhood_prompts]
    if len(known) < FEWEST:
        raise InputError(
            f"{run.model.model.id} knows {len(known)} facts with paraphrases and neighborhood "
            f"prompts, and tuning needs {FEWEST}: name a file of CounterFact's form with facts "
            "that it knows in tune.facts."
        )
    wanted = min(2 * section.count, len(known))
    others, search = split_by_subject(known, wanted // 2, section.seed)
    count = min(wanted - wanted // 2, len(others))
    checked = sample_records(others, count, section.seed) if others else []
    parts = [without_edited_neighbors(part)[0] for part in (search, checked)]
    if not all(any(one.neighborhood_prompts for one in part) for part in parts):
        raise InputError(
            f"the facts that {run.model.model.id} knows are about too few subjects, or their "
            "neighbors are all edited themselves, so that nothing shows what an edit spares: "
            "choose a smaller tune.count, or name other facts in tune.facts."
        )
    return parts[0], parts[1]


def _check_budget(run: Run, settings: Hyperparameters, count: int) -> None:
    """Raise `InputError` unless the time is enough for a trial and its confirmation."""
    trial = estimate_edit(run.model.model, settings, count, LENGTHS, run.model).seconds
    if 2 * trial > 60 * run.parameters.tune.minutes:
        raise InputError(
            f"a trial takes about {trial / 60:.0f} minutes here, and tune.minutes is "
            f"{run.parameters.tune.minutes}: give it more, or fewer facts in tune.count."
        )


def _say(what: str, trial: Trial) -> None:
    """Print the settings of a trial, and S."""
    score = f"S {trial.metrics['score']:.1f}" if trial.metrics else trial.failure
    settings = trial.settings
    effort = f"{settings.evaluations} evaluations, rate {settings.learning_rate:g}"
    console.print(Text(f"{what}{summary(settings)}, {effort}: {score}"), soft_wrap=True)
