"""Reference score RS: how similar generated texts are to texts about things that really have the
new attribute (paper, section 5.2)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from memit.errors import InputError
from memit.files.reading import parse_json, read_text
from memit.requests import Record

References = Mapping[tuple[str, str], Sequence[str]]
"""Texts about things of which a fact is true, by its relation and object (identifier or name)."""
MOST = 25
"""Texts of a relation and object that are taken from a corpus."""


def read_snippets(path: str | Path) -> dict[tuple[str, str], list[str]]:
    """Read CounterFact's published attribute snippets; raises `InputError` for anything else."""
    texts: dict[tuple[str, str], list[str]] = {}
    entries = parse_json(read_text(path, "the snippets"), path)
    try:
        for entry in entries:
            found = texts.setdefault((entry["relation_id"], entry["target_id"]), [])
            found += [str(sample["text"]) for sample in entry["samples"]]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not hold attribute snippets ({type(error).__name__}: {error}): "
            "each entry needs relation_id, target_id and samples with a text."
        ) from None
    return texts


def references_from_corpus(
    records: Iterable[Record], documents: Iterable[str]
) -> dict[tuple[str, str], list[str]]:
    """Reference texts out of a corpus, at most `MOST` for each relation and object.

    A document is about an object if it names it and a subject whose true object it is, according
    to the records (give all of the data set, not only those that are edited).
    """
    subjects: dict[str, list[tuple[str, str, str]]] = {}  # facts by the subject's first word
    for request in (record.request for record in records):
        first = re.search(r"\w+", request.subject)
        if first and request.relation_id and request.target_true:
            fact = (request.subject, request.relation_id, request.target_true)
            subjects.setdefault(first[0], []).append(fact)
    texts: dict[tuple[str, str], list[str]] = {}
    for document in documents:
        words = dict.fromkeys(re.findall(r"\w+", document))
        keys = dict.fromkeys(
            (relation, target)
            for word in words
            for subject, relation, target in subjects.get(word, ())
            if subject in document and target in document
        )
        for key in keys:
            found = texts.setdefault(key, [])
            if len(found) < MOST:
                found.append(document)
    return texts


def reference_scores(
    records: Sequence[Record], generated: Sequence[Sequence[str]], references: References
) -> list[float]:
    """RS of each record (0–100), NaN where it has no generated or no reference texts.

    `generated` holds each record's texts; its cosine with the reference texts of the record's
    relation and new object is taken between TF-IDF vectors of both sides' texts joined, with
    frequencies from all reference texts.
    """
    own = [references_of(record, references) for record in records]
    scores = [float("nan")] * len(records)
    scored = [i for i, texts in enumerate(own) if texts and generated[i]]
    if not scored:
        return scores
    from sklearn.feature_extraction.text import TfidfVectorizer  # it takes a second

    vectorizer = TfidfVectorizer().fit(text for texts in references.values() for text in texts)
    written = vectorizer.transform([" ".join(generated[i]) for i in scored])
    wanted = vectorizer.transform([" ".join(own[i]) for i in scored])
    cosines = np.asarray(written.multiply(wanted).sum(axis=1)).ravel()  # rows have unit length
    for index, cosine in zip(scored, cosines, strict=True):
        scores[index] = 100.0 * float(cosine)
    return scores


def references_of(record: Record, references: References) -> Sequence[str]:
    """Reference texts of a record's relation and new object, by its identifier or its name."""
    relation = record.request.relation_id
    if relation is None:
        return ()
    by_id = references.get((relation, record.target_new_id or ""), ())
    return by_id or references.get((relation, record.request.target_new), ())
