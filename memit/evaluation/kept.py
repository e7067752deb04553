"""Prompts of a user's own facts whose answers an edit must leave as they were.

Nobody says what is true of them: the measure is the unedited model's answer. An edit *keeps* a
prompt if the most probable next token is the same, and strictly if the whole brief answer is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from memit.batches import run_in_batches
from memit.evaluation.counterfact import means_by_record
from memit.files.tensors import load_tensors, save_tensors
from memit.forward.passes import final_states, logits_of, pad
from memit.generation import ANSWER_TOKENS, generate_texts
from memit.language_model import LanguageModel
from memit.positions import open_ids
from memit.requests import Record

SCHEMA = pa.schema(
    [
        pa.field("case_id", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer_before", pa.string(), nullable=False),
        pa.field("answer_after", pa.string(), nullable=False),
        pa.field("same_token", pa.bool_(), nullable=False),
        pa.field("same_answer", pa.bool_(), nullable=False),
        pa.field("divergence", pa.float64()),
    ]
)
"""Columns of the table of kept prompts. `divergence` is KL(before ‖ after) of the next token, in
nats; null where an editor lets another model answer."""
METRICS = {"kept": "same_token", "kept_accuracy": "same_answer", "kept_divergence": "divergence"}
"""Each metric and the column that it is the mean of."""


@dataclass(frozen=True)
class Answers:
    """What a model says to prompts."""

    log_probabilities: Tensor
    """Of the next token (prompts × vocabulary), on the CPU."""
    texts: list[str]
    """Greedy continuations of `ANSWER_TOKENS` tokens."""
    is_routed: list[bool]
    """Whether another model has written the text, see `LanguageModel.routed`."""


@dataclass(frozen=True)
class Unedited:
    """The unedited model's answers, in a form that is small enough to be kept."""

    texts: list[str]
    """Its greedy continuations."""
    states: Tensor
    """What leaves its last block at the last token of each prompt (prompts × d)."""

    @staticmethod
    def concatenate(parts: Sequence[Unedited]) -> Unedited:
        """The answers to consecutive prompts as one."""
        texts = [text for part in parts for text in part.texts]
        return Unedited(texts, torch.cat([part.states for part in parts]))

    def answers(self, lm: LanguageModel) -> Answers:
        """The answers of the unedited model `lm`, without a pass through its blocks."""
        with torch.no_grad():
            found = logits_of(lm, self.states).log_softmax(-1).cpu()
        return Answers(found, self.texts, [False] * len(self.texts))

    def save(self, path: Path) -> None:
        """Write them to a safetensors file."""
        save_tensors({"states": self.states}, path, {"texts": json.dumps(self.texts)})

    @staticmethod
    def load(path: Path) -> Unedited:
        """What `save` wrote.

        Raises:
            IntegrityError: the file is damaged.
        """
        tensors, metadata = load_tensors(path)
        return Unedited(json.loads(metadata["texts"]), tensors["states"])


def unedited_answers(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> Unedited:
    """What the unedited model says to prompts, in order."""
    texts = generate_texts(
        lm, prompts, new_tokens=ANSWER_TOKENS, token_budget=token_budget, progress=progress
    )
    ids = open_ids(lm.tokenizer, prompts)
    states = torch.empty(len(ids), lm.width, dtype=lm.dtype)
    for batch, found in run_in_batches(
        range(len(ids)),
        lambda index: (1, len(ids[index])),
        token_budget,
        lambda indices: _last_states(lm, [ids[index] for index in indices]),
    ):
        states[torch.tensor(batch)] = found
    return Unedited(texts, states)


@torch.no_grad()
def _last_states(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """What leaves the last block at the end of each row (rows × d), on the CPU."""
    last = torch.tensor([len(row) - 1 for row in rows])
    return final_states(lm, pad(rows, lm.device), torch.arange(len(rows)), last).cpu()


def answers_to(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> Answers:
    """What the model says to prompts, in order."""
    following: dict[int, Tensor] = {}

    def keep(indices: Sequence[int], logits: Tensor) -> None:
        following.update(zip(indices, logits.log_softmax(-1).cpu(), strict=True))

    texts = generate_texts(
        lm,
        prompts,
        new_tokens=ANSWER_TOKENS,
        token_budget=token_budget,
        first=keep,
        progress=progress,
    )
    routed = lm.routed(prompts)
    return Answers(
        log_probabilities=torch.stack([following[index] for index in range(len(prompts))]),
        texts=texts,
        is_routed=[index in routed for index in range(len(prompts))],
    )


def kept_table(prompts: Sequence[str], before: Answers, after: Answers) -> pa.Table:
    """What became of each prompt, in order: a table of `SCHEMA` without cases."""
    log_p, log_q = before.log_probabilities, after.log_probabilities
    divergence = torch.sum(log_p.exp() * (log_p - log_q), 1, dtype=torch.float64)
    same_token = log_p.argmax(-1) == log_q.argmax(-1)
    rows = [
        {
            "prompt": prompt,
            "answer_before": was,
            "answer_after": now,
            "same_token": was == now if is_routed else bool(same_token[index]),
            "same_answer": was == now,
            "divergence": None if is_routed else float(divergence[index]),
        }
        for index, (prompt, was, now, is_routed) in enumerate(
            zip(prompts, before.texts, after.texts, after.is_routed, strict=True)
        )
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA.remove(0))


def kept_by_record(records: Iterable[Record], found: pa.Table) -> pa.Table:
    """The rows of `kept_table` for each kept prompt of the records, in order: a table of
    `SCHEMA`."""
    rows = {row["prompt"]: row for row in found.to_pylist()}
    asked = [{"case_id": r.case_id, **rows[p]} for r in records for p in r.kept_prompts]
    return pa.Table.from_pylist(asked, schema=SCHEMA)


def kept_record_means(table: pa.Table, records: Sequence[Record]) -> dict[str, np.ndarray]:
    """`kept` and `kept_accuracy` (0–100) and `kept_divergence` (nats) of each record, NaN where it
    has no such prompts; empty if none has. Records are in the order of their case ids."""
    having = np.unique(table["case_id"].to_numpy())
    places = np.searchsorted([record.case_id for record in records], having)
    means: dict[str, np.ndarray] = {}
    for metric, column in METRICS.items() if len(table) else ():
        scale = 1.0 if column == "divergence" else 100.0
        means[metric] = np.full(len(records), np.nan)
        values = table[column].cast(pa.float64()).to_numpy()  # null: NaN
        means[metric][places] = scale * means_by_record(table, values)
    return {name: values for name, values in means.items() if not np.isnan(values).all()}
