"""The method as a library: edit a model with one call, and ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from memit.batches import auto_token_budget
from memit.corpus import read_documents
from memit.editors.base import Resources
from memit.editors.memit import Memit
from memit.errors import InputError
from memit.files.atomic import write_whole
from memit.files.digests import content_digest
from memit.hyperparameters import Hyperparameters, preset
from memit.language_model import LanguageModel
from memit.positions import open_ids
from memit.prefixes import sample_prefixes
from memit.requests import Record, check_conflicts
from memit.sampled_corpus import sample_texts, texts_table, wanted_tokens
from memit.second_moment import (
    SecondMoment,
    check_rank,
    collect_second_moments,
    read_moment,
    write_moment,
)
from memit.targets import edit_rows
from memit.weight_delta import WeightDelta, base_digests


def edit(
    lm: LanguageModel,
    records: Sequence[Record],
    corpus: str | Path | Iterable[str] | None = None,
    *,
    documents: int = 100_000,
    tokens: int | None = None,
    statistics: str | Path | None = None,
    hyperparameters: Hyperparameters | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> WeightDelta:
    """Edit the records' facts into the model and return the change of its weights.

    `corpus` is a text, JSONL or Parquet file, the name of a data set on the hub, or texts; the
    first `documents` of it give the second moments. Without one the model writes its own texts, of
    `tokens` in all (None: `memit.sampled_corpus`'s rule). `statistics` names a folder that keeps
    the second moments and the sampled texts; those of the same weights and texts are read from it
    next time. Without `hyperparameters` the preset of the model is used. `delta.revert(lm)` undoes
    the edit.

    Raises:
        ConflictError: records contradict each other.
        InputError: layers or texts do not fit the model.
    """
    settings = hyperparameters or preset(lm.name, lm.depth)
    if not records:
        raise InputError("there is nothing to edit: give at least one record.")
    lm.check_layers(settings.layers)
    check_conflicts(records)
    prefixes = sample_prefixes(lm, seed)
    edit_rows(lm, [record.request for record in records], prefixes)
    texts = read_documents(corpus) if isinstance(corpus, str | Path) else corpus
    budget = partial(auto_token_budget, lm.shape, lm.dtype.itemsize, str(lm.device))
    moments = _moments(
        lm,
        settings.layers,
        None if texts is None else list(islice(texts, documents)),
        wanted_tokens(tokens, lm.inner_width),
        seed,
        Path(statistics) if statistics else None,
        budget(),
    )
    resources = Resources(
        token_budget=budget(trained_blocks=lm.depth - 1 - settings.layers[-1]),
        prefixes=prefixes,
        moments=moments,
        seed=seed,
        progress=progress,
    )
    delta = Memit(settings).edit(lm, [record.request for record in records], resources)
    delta.apply(lm)
    return delta


def _moments(
    lm: LanguageModel,
    layers: Sequence[int],
    texts: Sequence[str] | None,
    tokens: int,
    seed: int,
    folder: Path | None,
    token_budget: int,
) -> dict[int, SecondMoment]:
    """The second moments of these weights and texts, out of the folder if it has them all."""
    origin: dict[str, Any] = {"sampled": tokens, "seed": seed}
    if texts is not None:
        origin = {"corpus": content_digest(texts) if folder else None}
    origin |= {"model": lm.name, "base": base_digests(lm, map(lm.weight_name, layers))}
    wanted = {n: origin | {"layer": n} for n in layers}
    paths = {n: folder / f"layer-{n:02}.parquet" for n in layers} if folder else {}
    kept = {n: read_moment(path) for n, path in paths.items() if path.exists()}
    if {n: provenance for n, (_, provenance) in kept.items()} == wanted:
        return {n: moment for n, (moment, _) in kept.items()}
    read = _sampled(lm, tokens, seed, folder) if texts is None else texts
    moments = collect_second_moments(lm, read, layers, token_budget=token_budget)
    for layer, moment in moments.items():
        check_rank(moment, f"layer {layer}")
    for layer, path in paths.items():
        write_moment(moments[layer], path, wanted[layer])
    return {n: read_moment(paths[n])[0] if paths else moment for n, moment in moments.items()}


def _sampled(lm: LanguageModel, tokens: int, seed: int, folder: Path | None) -> list[list[int]]:
    """Texts that the model writes, also kept in the folder."""
    with tqdm(desc="sampling", total=tokens, unit=" tokens", disable=None) as bar:
        rows = sample_texts(lm, tokens, seed, bar.update)
    if folder is not None:
        table = texts_table(lm, rows)
        write_whole(folder / "texts.parquet", lambda path: pq.write_table(table, path))
    return rows


@dataclass(frozen=True)
class Answer:
    """A next token and its probability."""

    text: str
    """The token's text."""
    probability: float
    """From 0 to 1."""


@torch.inference_mode()
def ask(lm: LanguageModel, prompt: str, top: int = 5) -> list[Answer]:
    """The most likely next tokens after a prompt, most likely first.

    Raises:
        InputError: the prompt is empty or longer than the model's context.
    """
    ids = torch.tensor(open_ids(lm.tokenizer, [prompt]), device=lm.device)
    if not 0 < ids.shape[1] <= lm.context_length:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens where the model has room for 1 to "
            f"{lm.context_length}."
        )
    logits = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()
    best = logits.softmax(-1).topk(min(top, len(logits)))
    return [
        Answer(str(lm.tokenizer.decode([token])), probability)
        for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
