"""Texts that the model writes about edited subjects, and the texts that they are compared with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from memit.requests import Record
from tasks.corpus import Corpus, read_texts
from tasks.engine.artifacts import Artifact, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.cost import Cost, Meter
from tasks.engine.loaded_model import ModelReference, with_edit
from tasks.engine.progress import piece_progress
from tasks.engine.workers import map_in_pieces
from tasks.evaluation import TablePiece, kept_table, read_table
from tasks.requests import Source, read_source

if TYPE_CHECKING:
    import pyarrow

    from memit.evaluation.reference import References

RECORDS_PER_PIECE = 16
"""A text takes a hundred steps, so that a few records are work enough for a piece."""


@cached_task("generation")
def write_piece(
    records: Sequence[Record],
    model: ModelReference,
    edit: Artifact | None,
    seed: int,
    token_budget: int,
) -> TablePiece:
    """Continue the generation prompts of some records."""
    from memit.evaluation.generations import TOTAL_TOKENS, write_about

    with with_edit(model, edit) as lm, Meter() as meter, piece_progress("generation") as progress:
        table = write_about(
            lm,
            records,
            seed=seed,
            token_budget=token_budget,
            total_tokens=min(TOTAL_TOKENS, lm.context_length),
            progress=progress,
        )
    return kept_table("generation", table, meter.cost)


def having_prompts(records: Sequence[Record], most: int | None) -> list[Record]:
    """The first ``most`` records that have generation prompts; None takes all of them."""
    return [record for record in records if record.generation_prompts][:most]


def write_texts(
    records: Sequence[Record],
    model: ModelReference,
    edit: Artifact | None,
    seed: int,
    token_budget: int,
) -> tuple[pyarrow.Table, list[Cost]]:
    """The texts about all of some records, in order, and what each piece cost."""
    from memit.evaluation.generations import SCHEMA

    if not records:
        return SCHEMA.empty_table(), []
    written: list[TablePiece] = map_in_pieces(
        "generation",
        "texts",
        write_piece,
        records,
        RECORDS_PER_PIECE,
        lambda piece: sum(len(record.generation_prompts) for record in piece),
        model=model,
        edit=edit,
        seed=seed,
        token_budget=token_budget,
    )
    return read_table(written), [piece.cost for piece in written]


@cached_task("references")
def collect_references(source: Source, file: Artifact, corpus: Corpus) -> Artifact:
    """Texts of a corpus about each relation and object, as the records in ``file`` know it (JSON).

    Give all records of a data set, not only those that are edited.
    """
    from memit.evaluation.reference import references_from_corpus

    known, _ = read_source(source, file.checked())
    documents = (text for part in corpus.ranges for text in read_texts(part.texts.checked()))
    found = references_from_corpus(known, documents)
    rows = json.dumps([[*key, list(texts)] for key, texts in found.items()])
    return store_piece("references", ".json", lambda path: path.write_text(rows))


def read_references(file: Artifact) -> References:
    """What `collect_references` found."""
    rows = json.loads(file.checked().read_text(encoding="utf-8"))
    return {(relation, target): texts for relation, target, texts in rows}
