"""CounterFact: success, magnitude and accuracy of the new fact, its paraphrases and its neighbours.

Prompts are scored into a table with one row each, and every summary is computed from the table.
Each metric is a mean over records of a mean over prompts (paper, section 5.2).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from memit.errors import InputError
from memit.evaluation.continuations import Question, Score, score_continuations
from memit.joining import ending
from memit.language_model import LanguageModel
from memit.requests import Record

Kind = Literal["rewrite", "paraphrase", "neighborhood", "neighborhood_plus", "specificity"]
"""What a prompt asks about; the last one is zsRE's question about something else."""

METRICS: Mapping[Kind, str] = {
    "rewrite": "efficacy",
    "paraphrase": "paraphrase",
    "neighborhood": "neighborhood",
    "neighborhood_plus": "neighborhood_plus",
}
"""What the prompts of each kind measure."""

SCORE_OF = ("efficacy", "paraphrase", "neighborhood")
"""The metrics whose harmonic mean is the score S."""

SCHEMA = pa.schema(
    [
        pa.field("case_id", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("target_new", pa.string(), nullable=False),
        pa.field("target_true", pa.string()),
        pa.field("nll_new", pa.float64(), nullable=False),
        pa.field("nll_true", pa.float64()),
        pa.field("hit_new", pa.bool_(), nullable=False),
        pa.field("hit_true", pa.bool_()),
        pa.field("share_new", pa.float64(), nullable=False),
    ]
)
"""Columns of the table of scored prompts: nll is the mean over tokens in nats, hit is whether the
model would have given the whole object (argmax, teacher-forced), and share is that of its tokens
that it would have given."""

_QUESTION = ("case_id", "kind", "prompt", "target_new", "target_true")
_MEASURED = ("nll_new", "nll_true", "hit_new", "hit_true")


@dataclass(frozen=True)
class ScoredPrompt:
    """One prompt to be scored against both objects of a record."""

    case_id: int
    kind: Kind
    prompt: str
    target_new: str
    target_true: str | None
    between: str | None = None
    """The separator before an object; see `EditRequest`."""


def prompts_of(records: Iterable[Record]) -> list[ScoredPrompt]:
    """The rewrite prompt, paraphrases and neighbourhood prompts of each record, in that order."""
    prompts: list[ScoredPrompt] = []
    for record in records:
        prompts.append(_prompt(record, "rewrite", record.request.text))
        prompts += [_prompt(record, "paraphrase", text) for text in record.paraphrase_prompts]
        prompts += [_prompt(record, "neighborhood", text) for text in record.neighborhood_prompts]
    return prompts


def plus_prompts_of(records: Iterable[Record]) -> list[ScoredPrompt]:
    """CounterFact+: each neighbourhood prompt with the edited fact in front of it."""
    return [
        _prompt(record, "neighborhood_plus", f"{request.text}{request.ending()}. {prompt}")
        for record in records
        for request in (record.request,)
        for prompt in record.neighborhood_prompts
    ]


def score_prompts(
    lm: LanguageModel,
    prompts: Sequence[ScoredPrompt],
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> pa.Table:
    """Score prompts into a table of `SCHEMA`, one row each, in the order given.

    `token_budget` bounds the padded tokens on the device at a time; `progress` is called with the
    number of newly finished prompts.
    """
    questions = [Question(prompt.prompt, objects_of(prompt)) for prompt in prompts]
    scores = score_continuations(lm, questions, token_budget=token_budget, progress=progress)
    rows = [_row(prompt, score) for prompt, score in zip(prompts, scores, strict=True)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def record_means(table: pa.Table, failed: Collection[int] = ()) -> dict[str, np.ndarray]:
    """Each metric's mean over the prompts of each record (0–100), NaN where a record has none.

    Records are in the order of their case ids. Metrics that no record has are left out. Records
    whose edit has `failed` get 0 in each metric, whatever the model says.
    """
    is_failed = np.isin(np.unique(table["case_id"].to_numpy()), list(failed))
    columns = {name: table[name].cast(pa.float64()).to_numpy() for name in _MEASURED}  # null: NaN
    columns["is_known"] = table["nll_true"].is_valid().to_numpy()
    kinds = np.array(table["kind"].to_pylist())
    means: dict[str, np.ndarray] = {}
    for kind, name in METRICS.items():
        for suffix, values in _values(kind, columns).items():
            mean = means_by_record(table, np.where(kinds == kind, values, np.nan))
            mean[is_failed & ~np.isnan(mean)] = 0.0
            if not np.isnan(mean).all():
                means[name + suffix] = mean
    return means


def summarise(table: pa.Table, failed: Collection[int] = ()) -> dict[str, float]:
    """Every metric that the table supports (0–100), S as `score`, and the number of records.

    Success bears the plain name; ties fail. `_magnitude` is the difference of exp(−nll) in the
    direction of success, `_accuracy` the share of prompts whose object the model would give.
    `failed` is as in `record_means`.
    """
    return overall(record_means(table, failed), table)


def overall(means: Mapping[str, np.ndarray], table: pa.Table) -> dict[str, float]:
    """The mean of each metric over the records that have it, S as `score` if its parts are there,
    and the number of records in the table."""
    summary = {name: float(np.nanmean(values)) for name, values in means.items()}
    if all(name in summary for name in SCORE_OF):
        summary = {"score": harmonic_mean([summary[name] for name in SCORE_OF]), **summary}
    return summary | {"records": len(set(table["case_id"].to_pylist()))}


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of numbers ≥ 0; 0 if one of them is."""
    return len(values) / sum(1 / value for value in values) if min(values) > 0 else 0.0


def before_and_after(before: pa.Table, after: pa.Table) -> pa.Table:
    """One row for each prompt, or generated text, with its columns before and after the edit.

    Raises:
        InputError: the two tables have different prompts.
    """
    shared = [name for name in before.column_names if name in _QUESTION]
    joined = before.select(shared)
    if not joined.equals(after.select(shared)):
        raise InputError("the two tables hold different prompts: use the same prompts in both.")
    for state, table in (("before", before), ("after", after)):
        for field in table.schema:
            if field.name not in shared:
                new = field.with_name(f"{field.name}_{state}")
                joined = joined.append_column(new, table[field.name])
    return joined


def facts_table(
    before: pa.Table,
    after: pa.Table,
    kept: Sequence[Mapping] = (),
    origins: Mapping[int, Mapping[str, str]] | None = None,
) -> pa.Table:
    """The outcome of each fact, one row for each record in the order of the tables.

    `took` and `generalised`: the new object is preferred after the edit on all rewrite prompts or
    paraphrases (where no true object is known: the model gives it). `hurt` counts the neighbourhood
    prompts that were right before and are no longer, and `hurt_prompts` lists them, separated by
    ` | `. Unknown values are null. The neighbours of a user's own facts are the rows of `kept`
    (`memit.evaluation.kept`): all were right, and those with another next token are hurt. What the
    `origins` of some cases give is in columns of its own.
    """
    cases: dict[int, list[tuple[dict, dict]]] = {}
    for was, now in zip(before.to_pylist(), after.to_pylist(), strict=True):
        cases.setdefault(was["case_id"], []).append((was, now))
    stays: dict[int, list[Mapping]] = {}
    for row in kept:
        stays.setdefault(row["case_id"], []).append(row)
    facts = [_fact(pairs, stays.get(case, ())) for case, pairs in cases.items()]
    table = pa.Table.from_pylist(facts, schema=FACTS)
    given = [(origins or {}).get(case, {}) for case in cases]
    for name in sorted({name for origin in given for name in origin}):
        table = table.append_column(name, pa.array([origin.get(name) for origin in given]))
    return table


FACTS = pa.schema(
    [
        ("case_id", pa.int64()),
        ("prompt", pa.string()),
        ("target_new", pa.string()),
        ("target_true", pa.string()),
        ("took", pa.bool_()),
        ("answered", pa.bool_()),
        ("paraphrases", pa.int64()),
        ("paraphrases_right", pa.int64()),
        ("generalised", pa.bool_()),
        ("neighbors", pa.int64()),
        ("neighbors_right_before", pa.int64()),
        ("neighbors_right_after", pa.int64()),
        ("hurt", pa.int64()),
        ("hurt_prompts", pa.string()),
    ]
)
"""Columns of `facts_table`; what the user's facts carry follows as text."""


def _fact(pairs: Sequence[tuple[dict, dict]], kept: Sequence[Mapping]) -> dict[str, object]:
    def of(kind: Kind) -> list[tuple[dict, dict]]:
        return [(was, now) for was, now in pairs if was["kind"] == kind]

    rewrites = [_is_right(now) for _, now in of("rewrite")]
    paraphrases = [_is_right(now) for _, now in of("paraphrase")]
    neighbors = [(was, now) for was, now in of("neighborhood") if was["target_true"] is not None]
    hurt = [now["prompt"] for was, now in neighbors if _is_right(was) and not _is_right(now)]
    hurt += [row["prompt"] for row in kept if not row["same_token"]]
    right_before = sum(_is_right(was) for was, _ in neighbors) + len(kept)
    right_after = sum(_is_right(now) for _, now in neighbors) + sum(r["same_token"] for r in kept)
    first = pairs[0][1]
    return {name: first[name] for name in ("case_id", "prompt", "target_new", "target_true")} | {
        "took": all(rewrites),
        "answered": all(now["hit_new"] for _, now in of("rewrite")),
        "paraphrases": len(paraphrases),
        "paraphrases_right": sum(paraphrases),
        "generalised": all(paraphrases) if paraphrases else None,
        "neighbors": len(neighbors) + len(kept),
        "neighbors_right_before": right_before,
        "neighbors_right_after": right_after,
        "hurt": len(hurt) if neighbors or kept else None,
        "hurt_prompts": " | ".join(hurt) if neighbors or kept else None,
    }


def _is_right(row: Mapping) -> bool:
    """Whether the object that is wanted at this prompt is preferred."""
    if row["kind"].startswith("neighborhood"):
        return row["nll_true"] < row["nll_new"]
    return row["hit_new"] if row["nll_true"] is None else row["nll_new"] < row["nll_true"]


def _prompt(record: Record, kind: Kind, prompt: str) -> ScoredPrompt:
    request = record.request
    objects = request.target_new, request.target_true
    return ScoredPrompt(record.case_id, kind, prompt, *objects, request.between)


def objects_of(prompt: ScoredPrompt) -> tuple[str, ...]:
    """The exact texts that may follow it: the new object, and the true one if it is known."""
    objects = (prompt.target_new, prompt.target_true)
    return tuple(ending(prompt.prompt, o, prompt.between) for o in objects if o is not None)


def _row(prompt: ScoredPrompt, scores: Sequence[Score]) -> dict[str, Any]:
    new, true = scores[0], scores[1] if len(scores) > 1 else None
    measured = (new.nll, true and true.nll, new.hit, true and true.hit)
    asked = {name: getattr(prompt, name) for name in _QUESTION}
    share = {"share_new": new.right / new.tokens}
    return asked | dict(zip(_MEASURED, measured, strict=True)) | share


def _values(kind: Kind, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Success, accuracy and magnitude of every row, as if all were of one kind (0–100)."""
    wanted, other = ("true", "new") if kind.startswith("neighborhood") else ("new", "true")
    nll, rival = columns[f"nll_{wanted}"], columns[f"nll_{other}"]
    return {
        "": np.where(columns["is_known"], 100.0 * (nll < rival), np.nan),  # an nll of NaN fails
        "_accuracy": 100.0 * columns[f"hit_{wanted}"],
        "_magnitude": 100.0 * (np.exp(-nll) - np.exp(-rival)),
    }


def means_by_record(table: pa.Table, values: np.ndarray) -> np.ndarray:
    """Mean of the values that are not NaN over each record's rows, in the order of case ids."""
    _, owner = np.unique(table["case_id"].to_numpy(), return_inverse=True)
    valid = ~np.isnan(values)
    count = int(owner.max(initial=-1)) + 1
    sums = np.bincount(owner[valid], values[valid], count)
    counts = np.bincount(owner[valid], minlength=count)
    return np.divide(sums, counts, out=np.full(count, np.nan), where=counts > 0)
