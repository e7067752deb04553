"""zsRE: questions answered token by token under teacher forcing (paper, section 5.2).

Records are in the schema of MEND's split. Each metric is the share of an answer's tokens that the
model would choose, a mean within a record and then over records.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from memit.errors import InputError
from memit.evaluation.continuations import Question, score_continuations
from memit.evaluation.counterfact import SCORE_OF, means_by_record
from memit.facts.easyedit import slot_at_first_mention
from memit.files.reading import parse_json, read_text
from memit.language_model import LanguageModel
from memit.requests import EditRequest, Record, check_text, numbered, read_rows

KINDS = ("efficacy", "paraphrase", "specificity")

SCHEMA = pa.schema(
    [
        pa.field("case_id", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("nll", pa.float64(), nullable=False),
        pa.field("right", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
    ]
)
"""Columns of the table of answered questions: `right` of the answer's `tokens` are argmax."""


@dataclass(frozen=True)
class ZsreRecord:
    """A question with its new answer, its paraphrase, and a question about something else."""

    case_id: int
    request: EditRequest
    paraphrase: str
    locality_prompt: str
    locality_answer: str


def read_zsre(path: str | Path) -> list[ZsreRecord]:
    """Read zsRE questions; the object is the first of `answers`.

    Raises:
        InputError: something in it cannot be used; names file and record.
    """
    rows = parse_json(read_text(path, "the questions"), path)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} holds no questions: zsRE is one JSON list of records.")
    return list(read_rows(numbered(rows), _record, path))


def as_records(questions: Iterable[ZsreRecord]) -> list[Record]:
    """The same as records that an editor takes."""
    return [Record(q.case_id, q.request, paraphrase_prompts=(q.paraphrase,)) for q in questions]


def score_zsre(
    lm: LanguageModel,
    records: Sequence[ZsreRecord],
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> pa.Table:
    """Answer all questions under teacher forcing; a table of `SCHEMA`, three rows a record.

    `progress` is called with the number of newly answered questions.
    """
    rows = [row for record in records for row in questions_of(record)]
    scores = score_continuations(
        lm,
        [Question(row["prompt"], (f" {row['answer'].strip()}",)) for row in rows],
        token_budget=token_budget,
        progress=progress,
    )
    for row, (score,) in zip(rows, scores, strict=True):
        row |= {"nll": score.nll, "right": score.right, "tokens": score.tokens}
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def zsre_record_means(table: pa.Table, failed: Collection[int] = ()) -> dict[str, np.ndarray]:
    """Efficacy, paraphrase and, as `neighborhood`, specificity of each record (0–100), in the order
    of the case ids; 0 where the edit has `failed`."""
    kinds = np.array(table["kind"].to_pylist())
    shares = 100.0 * table["right"].to_numpy() / table["tokens"].to_numpy()
    shares[np.isin(table["case_id"].to_numpy(), list(failed))] = 0.0
    return {
        name: means_by_record(table, np.where(kinds == kind, shares, np.nan))
        for name, kind in zip(SCORE_OF, KINDS, strict=True)
    }


def questions_of(record: ZsreRecord) -> list[dict[str, Any]]:
    """The first columns of its three rows in the table."""
    prompts = (
        (record.request.text, record.request.target_new),
        (record.paraphrase, record.request.target_new),
        (record.locality_prompt, record.locality_answer),
    )
    return [
        {"case_id": record.case_id, "kind": kind, "prompt": prompt, "answer": answer}
        for kind, (prompt, answer) in zip(KINDS, prompts, strict=True)
    ]


def _record(row: Any, index: int) -> ZsreRecord:
    if not isinstance(row, dict):
        raise InputError("it is no JSON object: a question is one.")
    subject, question = _text(row, "subject"), _text(row, "src")
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers or not isinstance(answers[0], str):
        raise InputError("'answers' is no list of texts: its first is the answer to write.")
    answer = check_text(answers[0], "answers")
    if subject not in question:
        raise InputError(f"the question {question!r} does not name its subject {subject!r}.")
    return ZsreRecord(
        index,
        EditRequest(subject, slot_at_first_mention(question, subject), answer, between=" "),
        _text(row, "rephrase"),
        _text(row, "loc") + "?",
        _text(row, "loc_ans"),
    )


def _text(row: Mapping[str, Any], key: str) -> str:
    value = check_text(row.get(key, ""), key)
    if not value.strip():
        raise InputError(f"the key {key!r} is missing or empty: add it.")
    return value
