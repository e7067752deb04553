"""`memit diff` and `memit status`: what a list changes, and what a model directory holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from flows.command.parameters import Parameters, RequestsSection
from memit.batches import auto_token_budget
from memit.changes import Changes, changes_between
from memit.errors import InputError
from memit.evaluation.counterfact import prompts_of, score_prompts
from memit.evaluation.generations import ANSWER_TOKENS
from memit.generation import generate_texts
from memit.language_model import LanguageModel
from memit.model_directory import EditStatus, edit_status
from memit.redaction import one_line
from memit.requests import Record, read_counterfact
from memit.weight_delta import WeightDelta
from tasks.engine.git import commit_of
from tasks.engine.results import PastRun, last_runs
from tasks.requests import locate_records, read_source

MOVED = 5
"""Neighbours that are shown of those that moved."""
LARGEST_LOSS = 0.2
"""Share of a list's facts that may be withdrawn at once without being asked."""

Answers = Mapping[str, str]
"""What a model says to prompts."""


def show_changes(parameters: Parameters, open_model: Callable[[], LanguageModel]) -> None:
    """Print what the list would change, or else what the last run has changed.

    Raises:
        InputError: nothing was run yet.
        ConflictError: facts of the list contradict each other.
    """
    runs, console = last_runs(), Console()
    pending = pending_changes(parameters.requests, runs)
    if pending:
        console.print(f"The list against the last run: {pending.summary}.")
        console.print(described(pending), soft_wrap=True)
        console.print("`memit run` makes the model say so.")
        return
    if not runs:
        raise InputError("there is no finished run to compare: use `memit run` first.")
    done = changes_between(records_of(runs[:-1]), records_of(runs[-1:]))
    console.print(f"The last run against the one before: {done.summary}.")
    console.print(described(done), soft_wrap=True)
    if done:
        console.print(changed_answers(open_model(), done, runs))


def pending_changes(section: RequestsSection, runs: Sequence[PastRun]) -> Changes | None:
    """What the list would change against the last run; None if the source is no list of the user's
    or only some of it is edited.

    Raises:
        ConflictError: facts of the list contradict each other.
    """
    if section.source != "facts" or section.wanted is not None or section.only_known:
        return None
    file = locate_records(section.path, section.url, section.sha256)
    return changes_between(records_of(runs[-1:]), read_source("facts", file)[0])


def records_of(runs: Sequence[PastRun]) -> list[Record]:
    """The facts of a run; none of no run."""
    return read_counterfact(runs[0].records.checked()) if runs else []


def described(changes: Changes) -> Text:
    """A line for each fact that comes, goes or changes."""
    lines = [f"+ {_named(record)}" for record in changes.added]
    lines += [f"- {_named(record)}" for record in changes.withdrawn]
    for before, after in changes.changed:
        lines.append(f"~ {_named(after)}, instead of: {_named(before)}")
    return Text("\n".join(lines))


def _named(record: Record) -> str:
    request, origin = record.request, record.origin.given
    known = f"  ({', '.join(f'{name}: {value}' for name, value in origin.items())})"
    return one_line(f"{request.text} → {request.target_new}{known if origin else ''}")


def changed_answers(lm: LanguageModel, changes: Changes, runs: Sequence[PastRun]) -> Table:
    """What the model said before the last run and says after it, to each changed fact and its
    paraphrases, and to those of its neighbours whose preference moved most."""
    records = [*changes.added, *changes.withdrawn, *(after for _, after in changes.changed)]
    asked = {p for r in records for p in (r.request.text, *r.paraphrase_prompts)}
    asked |= {prompt for record in records for prompt in record.neighborhood_prompts}
    prompts, neighbors = sorted(asked), [p for p in prompts_of(records) if p.kind == "neighborhood"]
    budget = auto_token_budget(lm.shape, lm.dtype.itemsize, str(lm.device))
    said: list[Answers] = []
    margins = []
    for run in (runs[-2] if len(runs) > 1 else None, runs[-1]):
        delta = run and WeightDelta.load(run.delta.checked())
        if delta:
            delta.apply(lm)
        texts = generate_texts(
            lm, prompts, new_tokens=ANSWER_TOKENS, top_k=1, seed=0, token_budget=budget, whole=False
        )
        said.append(dict(zip(prompts, map(one_line, texts), strict=True)))
        scores = score_prompts(lm, neighbors, token_budget=budget).to_pylist() if neighbors else []
        margins.append([row["nll_new"] - (row["nll_true"] or 0.0) for row in scores])
        if delta:
            delta.revert(lm)
    moves = {p.prompt: b - a for p, a, b in zip(neighbors, *margins, strict=True)}
    return _answers_table(records, said, moves)


def _answers_table(
    records: Sequence[Record], said: Sequence[Answers], moves: Mapping[str, float]
) -> Table:
    table = Table(box=SIMPLE, title="What the model said and says now", title_justify="left")
    for name in ("", "prompt", "said", "says now"):
        table.add_column(name, overflow="fold")

    def add(kind: str, prompt: str) -> None:
        table.add_row(kind, *map(Text, (one_line(prompt), said[0][prompt], said[1][prompt])))

    for record in records:
        add("fact", record.request.text)
        for prompt in record.paraphrase_prompts:
            add("in other words", prompt)
    table.add_section()
    for prompt in sorted(moves, key=lambda prompt: -abs(moves[prompt]))[:MOVED]:
        add(f"neighbour {moves[prompt]:+.1f}", prompt)
    return table


def show_status(directory: Path) -> None:
    """Print which facts are in a model directory, of which list and commit."""
    found = edit_status(directory)
    Console().print(Group(*map(_status, found)) if found else f"{directory} carries no edit.")


def _status(status: EditStatus) -> Text:
    provenance, origin = status.provenance, status.origin
    facts = provenance.get("facts", [])
    head = (
        f"{status.folder.name}: {status.state}. {provenance.get('count', '?')} facts by "
        f"{provenance.get('method', '?')}, made for {provenance.get('model', '?')}"
    )
    if origin:
        head += f"; list {origin.get('list')}, commit {origin.get('commit') or 'unknown'}"
    lines = [
        one_line(f"  {fact['prompt']} → {fact['target']}")
        + "".join(f", {key}: {fact[key]}" for key in fact if key not in ("prompt", "target"))
        for fact in facts
    ]
    return Text("\n".join([head, *lines]))


def list_origin(section: RequestsSection) -> dict[str, str]:
    """The file of the list and the commit that changed it last, for a model directory's record."""
    path = section.path or section.url or section.source
    return {"list": path, "commit": commit_of(path) if section.path else ""}


def check_losses(section: RequestsSection) -> None:
    """Check that the list has most of the last run's facts, since files get truncated.

    Raises:
        InputError: it has lost more than `LARGEST_LOSS`.
    """
    changes = pending_changes(section, last_runs())
    if changes is None:
        return
    lost, before = len(changes.withdrawn), len(changes.withdrawn) + changes.kept
    if lost > LARGEST_LOSS * (before + len(changes.changed)):
        raise InputError(
            f"{section.path} has lost {lost} facts since the last run and has {changes.kept} left: "
            "restore them, or use `memit run --yes` if they are to be withdrawn (`memit diff` "
            "lists them)."
        )
