"""zsRE: questions answered token by token under teacher forcing (paper, section 5.2).

Records are in the schema of MEND's split. Each metric is the share of an answer's tokens that the
model would choose, a mean within a record and then over records.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from memit.errors import InputError
from memit.evaluation.counterfact import Kind, ScoredPrompt, means_by_record
from memit.facts.easyedit import slot_at_first_mention
from memit.files.reading import parse_json, read_text
from memit.requests import EditRequest, Record, check_text, numbered, read_rows

METRICS: Mapping[Kind, str] = {
    "rewrite": "efficacy",
    "paraphrase": "paraphrase",
    "specificity": "neighborhood",
}
"""What the questions of each kind measure, under the names that it has in all tables."""


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


def questions_of(records: Iterable[ZsreRecord]) -> list[ScoredPrompt]:
    """The three questions of each record, to be scored with their answers as new objects."""
    questions: list[ScoredPrompt] = []
    for record in records:
        new, unchanged = record.request.target_new, record.locality_answer.strip()
        questions.append(_question(record, "rewrite", record.request.text, new))
        questions.append(_question(record, "paraphrase", record.paraphrase, new))
        questions.append(_question(record, "specificity", record.locality_prompt, unchanged))
    return questions


def zsre_record_means(table: pa.Table, failed: Collection[int] = ()) -> dict[str, np.ndarray]:
    """Efficacy, paraphrase and, as `neighborhood`, specificity of each record (0–100), in the order
    of the case ids; 0 where the edit has `failed`. The table is that of the scored questions."""
    kinds = np.array(table["kind"].to_pylist())
    shares = 100.0 * table["share_new"].to_numpy()
    shares[np.isin(table["case_id"].to_numpy(), list(failed))] = 0.0
    return {
        name: means_by_record(table, np.where(kinds == kind, shares, np.nan))
        for kind, name in METRICS.items()
    }


def _question(record: ZsreRecord, kind: Kind, prompt: str, answer: str) -> ScoredPrompt:
    return ScoredPrompt(record.case_id, kind, prompt, answer, None, between=" ")


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
