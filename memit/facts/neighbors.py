"""Neighbours that are edited themselves, which say nothing about what an edit spares."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from memit.requests import Record


def without_edited_neighbors(records: Sequence[Record]) -> tuple[list[Record], int]:
    """Records that are edited together, without neighbours that one of them edits, and the number
    of those.

    A neighbourhood prompt is edited if it is the prompt or a paraphrase of any of the records, or
    names the subject of one with the same relation (without an identifier, with the same prompt).
    """
    texts: set[str] = set()
    subjects: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        texts.update((record.request.text, *record.paraphrase_prompts))
        subjects[record.request.fact[1]].add(record.request.subject)

    def spared(record: Record) -> tuple[str, ...]:
        names = subjects[record.request.fact[1]]
        prompts = [prompt for prompt in record.neighborhood_prompts if prompt not in texts]
        return tuple(prompt for prompt in prompts if names.isdisjoint(_phrases(prompt)))

    kept = [replace(record, neighborhood_prompts=spared(record)) for record in records]
    before, after = (sum(len(r.neighborhood_prompts) for r in part) for part in (records, kept))
    return kept, before - after


def _phrases(text: str) -> Iterator[str]:
    """Everything in a text that begins and ends with whole words."""
    cuts = [cut.start() for cut in re.finditer(r"(?<![\w-])|(?![\w-])", text)]
    return (text[start:end] for start, end in combinations(cuts, 2))
