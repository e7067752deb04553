"""`memit diff`: what a list of facts changes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from flows.command.parameters import Parameters, RequestsSection
from flows.command.script import output
from flows.command.status import fact_line
from memit.batches import auto_token_budget
from memit.changes import Changes, changes_between
from memit.errors import InputError
from memit.evaluation.counterfact import ScoredPrompt, prompts_of, score_prompts
from memit.evaluation.generations import ANSWER_TOKENS
from memit.generation import generate_texts
from memit.language_model import LanguageModel
from memit.redaction import one_line
from memit.requests import Record, read_counterfact
from memit.weight_delta import WeightDelta
from tasks.engine.results import PastRun, last_runs
from tasks.requests import locate_records, read_source

MOVED = 5
"""Neighbours that are shown of those that moved."""
LARGEST_LOSS = 0.2
"""Share of a list's facts that may be withdrawn at once without being asked."""
CAPTION = "of neighbours: the change of their true object's lead over the new one, in nats"
FEW = 2
"""Facts that may always be withdrawn."""


def show_changes(parameters: Parameters, open_model: Callable[[], LanguageModel]) -> None:
    """Print what the list would change, or else what the last run has changed.

    Raises:
        InputError: nothing was run yet.
        ConflictError: facts of the list contradict each other.
    """
    runs = last_runs()
    pending = pending_changes(parameters.requests, runs)
    if pending:
        output.print(f"The list against the last run: {pending.summary}.")
        output.print(_described(pending), soft_wrap=True)
        output.print("`memit run` makes the model say so.")
        return
    if not runs:
        raise InputError("there is no finished run to compare: use `memit run` first.")
    done = changes_between(_records_of(runs[:-1]), _records_of(runs[-1:]))
    output.print(f"The last run against the one before: {done.summary}.")
    output.print(_described(done), soft_wrap=True)
    if done:
        output.print(_answers(open_model(), done, runs))


def pending_changes(section: RequestsSection, runs: Sequence[PastRun]) -> Changes | None:
    """What the list would change against the last run, if that was of this list; None if the source
    is no list of the user's, or only some of it is edited.

    Raises:
        ConflictError: facts of the list contradict each other.
    """
    if section.source != "facts" or section.wanted is not None or section.only_known:
        return None
    file = locate_records(section.path, section.url, section.sha256)
    last = [run for run in runs[-1:] if run.origin == section.origin]
    return changes_between(_records_of(last), read_source("facts", file)[0])


def check_losses(section: RequestsSection) -> None:
    """Check that the list has most of the last run's facts, since files get truncated.

    Raises:
        InputError: it has lost more than `LARGEST_LOSS`.
    """
    changes = pending_changes(section, last_runs())
    lost = len(changes.withdrawn) if changes else 0
    before = lost + len(changes.changed) + changes.kept if changes else 0
    if changes and lost > max(FEW, LARGEST_LOSS * before):
        raise InputError(
            f"{section.origin} has lost {lost} facts since the last run and has {changes.kept} "
            "left: restore them, or use `memit run --yes` if they are to be withdrawn (`memit "
            "diff` lists them)."
        )


def _records_of(runs: Sequence[PastRun]) -> list[Record]:
    """The facts of a run; none of no run."""
    return read_counterfact(runs[0].records.checked()) if runs else []


def _described(changes: Changes) -> Text:
    """A line for each fact that comes, goes or changes."""
    lines = [f"+ {_named(record)}" for record in changes.added]
    lines += [f"- {_named(record)}" for record in changes.withdrawn]
    lines += [f"~ {_named(new)}, instead of: {_named(old)}" for old, new in changes.changed]
    return Text("\n".join(lines))


def _named(record: Record) -> str:
    request = record.request
    return fact_line({"prompt": request.text, "target": request.target_new, **record.origin})


def _answers(lm: LanguageModel, changes: Changes, runs: Sequence[PastRun]) -> Table:
    """What the model said before the last run and says after it, to each changed fact and its
    paraphrases, and to those of its neighbours whose preference moved most."""
    table = Table(box=SIMPLE, title="What the model said and says now", title_justify="left")
    table.caption, table.caption_justify = CAPTION, "left"
    for name in ("", "prompt", "said", "says now"):
        table.add_column(name, overflow="fold")
    records = [*changes.added, *changes.withdrawn, *(new for _, new in changes.changed)]
    asked = [p for p in prompts_of(records) if p.kind != "neighborhood"]
    neighbors = [p for p in prompts_of(map(_with_kept, records)) if p.kind == "neighborhood"]
    was, now = (
        _ask(lm, run, [*asked, *neighbors]) for run in (runs[-2] if runs[1:] else None, runs[-1])
    )
    moves = {p.prompt: now[p.prompt][1] - was[p.prompt][1] for p in neighbors}
    rows = [("fact" if p.kind == "rewrite" else "in other words", p.prompt) for p in asked]
    for prompt in sorted(moves, key=lambda prompt: -abs(moves[prompt]))[:MOVED]:
        rows.append((f"neighbour {moves[prompt]:+.1f}", prompt))
    for kind, prompt in rows:
        table.add_row(kind, *map(Text, (one_line(prompt), was[prompt][0], now[prompt][0])))
    return table


def _with_kept(record: Record) -> Record:
    """A record whose prompts that must stay are neighbours like all others."""
    return replace(record, neighborhood_prompts=record.neighborhood_prompts + record.kept_prompts)


def _ask(
    lm: LanguageModel, run: PastRun | None, asked: Sequence[ScoredPrompt]
) -> dict[str, tuple[str, float]]:
    """What the model of a run, or the unedited one, says to each prompt, and by how many nats it
    prefers the true object to the new one."""
    prompts, budget = [p.prompt for p in asked], auto_token_budget(lm.shape, 4, str(lm.device))
    delta = run and WeightDelta.load(run.delta.checked())
    if delta:
        delta.apply(lm)
    texts = generate_texts(lm, prompts, new_tokens=ANSWER_TOKENS, token_budget=budget)
    scores = score_prompts(lm, asked, token_budget=budget).to_pylist()
    if delta:
        delta.revert(lm)
    margins = [row["nll_new"] - (row["nll_true"] or 0.0) for row in scores]
    return dict(zip(prompts, zip(map(one_line, texts), margins, strict=True), strict=True))
