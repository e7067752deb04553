"""The method as a library: edit a model with one call, and ask it."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from memit.batches import auto_token_budget
from memit.corpus import read_documents, reading_parquet
from memit.editors.base import Resources
from memit.editors.joint import editor_for
from memit.errors import InputError
from memit.evaluation.counterfact import prompts_of, score_prompts
from memit.facts.subjects import default_share, subjects_to_keep
from memit.files.atomic import write_whole
from memit.files.tensors import tensor_digest
from memit.hyperparameters import Hyperparameters, preset, settings_note
from memit.language_model import LanguageModel
from memit.positions import open_ids
from memit.prefixes import sample_prefixes
from memit.requests import Record, check_conflicts
from memit.sampled_corpus import sample_texts, texts_table, wanted_tokens
from memit.second_moment import (
    check_rank,
    collect_second_moments,
    collect_subject_moments,
    with_subjects,
)
from memit.targets import edit_rows
from memit.weight_delta import WeightDelta

logger = logging.getLogger(__name__)


def edit(
    lm: LanguageModel,
    records: Sequence[Record],
    corpus: str | Path | Iterable[str] | None = None,
    *,
    documents: int = 100_000,
    tokens: int | Literal["auto"] = "auto",
    sampled: str | Path | None = None,
    hyperparameters: Hyperparameters | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> WeightDelta:
    """Edit the records' facts into the model and return the change of its weights.

    `corpus` is a text, JSONL or Parquet file, the name of a data set on the hub, or texts; the
    first `documents` of it give the second moments. Without one the model writes texts with
    `tokens` tokens, see `memit.sampled_corpus`, which the Parquet file `sampled` keeps: they are
    read from it if it is there. Without `hyperparameters` the preset of the model is used, and
    without `progress` bars are shown in a terminal. `delta.revert(lm)` undoes the edit, and
    `delta.provenance["outcome"]` says how many of the facts the edited model says (argmax).

    Raises:
        ConflictError: records contradict each other.
        InputError: layers or texts do not fit the model.
    """
    settings = hyperparameters or _preset(lm)
    if not records:
        raise InputError("there is nothing to edit: give at least one record.")
    lm.check_layers(settings.layers)
    editor = editor_for(settings)
    editor.check(lm)
    check_conflicts(records)
    prefixes = sample_prefixes(lm, seed)
    edit_rows(lm, [record.request for record in records], prefixes)
    budget = partial(auto_token_budget, lm.shape, lm.dtype.itemsize, str(lm.device))
    if corpus is None:
        wanted = wanted_tokens(tokens, lm.inner_width)
        documents_used = _sampled(lm, wanted, seed, Path(sampled) if sampled else None)
    else:
        texts = read_documents(corpus) if isinstance(corpus, str | Path) else corpus
        documents_used = list(islice(texts, documents))
    with _bar("statistics", len(documents_used), "documents") as advance:
        moments = collect_second_moments(
            lm, documents_used, settings.layers, token_budget=budget(), progress=advance
        )
    for layer, moment in moments.items():
        check_rank(moment, f"layer {layer}")
    if share := default_share(lm.shape):
        kept = subjects_to_keep([record.request.subject for record in records])
        asked = [record.request for record in kept]
        at = collect_subject_moments(lm, asked, settings.layers, token_budget=budget())
        moments = {n: with_subjects(moment, at[n], share) for n, moment in moments.items()}
    with _bar("editing", len(records), "facts") as advance:
        resources = Resources(
            token_budget=budget(trained_blocks=settings.trained_blocks(lm.depth)),
            prefixes=prefixes,
            moments=moments,
            seed=seed,
            progress=progress or advance,
        )
        delta = editor.edit(lm, [record.request for record in records], resources)
    delta = delta.naming(records)
    delta.apply(lm)
    try:
        outcome = {"facts": len(records), "said": _said(lm, records, budget())}
    except BaseException:
        delta.revert(lm)
        raise
    return replace(delta, provenance={**delta.provenance, "outcome": outcome})


def _said(lm: LanguageModel, records: Sequence[Record], token_budget: int) -> int:
    """How many of the facts the model says (argmax)."""
    asked = [prompt for prompt in prompts_of(records) if prompt.kind == "rewrite"]
    prompts = [replace(prompt, target_true=None) for prompt in asked]
    return sum(score_prompts(lm, prompts, token_budget=token_budget)["hit_new"].to_pylist())


@contextmanager
def _bar(name: str, total: int, unit: str) -> Iterator[Callable[[int], Any]]:
    """A bar on standard error if that is a terminal."""
    with tqdm(desc=name, total=total, unit=f" {unit}", disable=None) as bar:
        yield bar.update


def _preset(lm: LanguageModel) -> Hyperparameters:
    settings = preset(lm.name, lm.shape)
    if note := settings_note(lm.name, lm.shape, settings):
        logger.warning(note)
    return settings


def _sampled(lm: LanguageModel, tokens: int, seed: int, path: Path | None) -> list[list[int]]:
    """Texts that the model writes, or that it has written for the same question, told from those of
    other weights by its last block, which edits of facts leave alone."""
    asked = f"{tokens} tokens of {lm.name} by seed {seed}, written with its present weights"
    if path is None:
        return _write_texts(lm, tokens, seed)
    digest = tensor_digest(lm.weight(lm.editable_layers[-1]))
    origin = {b"sampled": asked.encode(), b"weights": digest.encode()}
    if path.exists():
        with reading_parquet(path):
            table = pq.read_table(path)
        if table.schema.metadata != origin:
            raise InputError(f"{path} does not hold {asked}: name another.")
        return table["ids"].to_pylist()
    rows = _write_texts(lm, tokens, seed)
    table = texts_table(lm, rows).replace_schema_metadata(origin)
    write_whole(path, lambda partial: pq.write_table(table, partial))
    return rows


def _write_texts(lm: LanguageModel, tokens: int, seed: int) -> list[list[int]]:
    with _bar("sampling", tokens, "tokens") as advance:
        return sample_texts(lm, tokens, seed, advance)


@dataclass(frozen=True)
class Answer:
    """A next token and its probability."""

    text: str
    """The token's text."""
    probability: float
    """From 0 to 1."""

    def __repr__(self) -> str:
        return f"{self.text!r} {self.probability:.1%}"


@torch.inference_mode()
def ask(lm: LanguageModel, prompt: str, top: int = 5) -> list[Answer]:
    """The most likely next tokens after a prompt, most likely first; those of the model that a
    memory lets answer it, where it does.

    Raises:
        InputError: the prompt is empty or longer than the model's context.
    """
    for introduction in lm.routed([prompt]).values():
        assert lm.router is not None
        return ask(lm.router.substitute, f"{introduction} {prompt}", top)
    ids = torch.tensor(open_ids(lm.tokenizer, [prompt]), device=lm.device)
    if not 0 < ids.shape[1] <= lm.context_length:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens where the model has room for 1 to "
            f"{lm.context_length}."
        )
    logits = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()
    best = logits.softmax(-1).topk(min(top, len(logits)))
    last = ids[0, -1:].tolist()  # some tokenizers drop a space in front of what they decode
    before = str(lm.tokenizer.decode(last))
    return [
        Answer(str(lm.tokenizer.decode([*last, token])).removeprefix(before), probability)
        for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
