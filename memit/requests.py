"""Edit requests: what they are, the files they come in, and how they are checked and sampled.

Three kinds of file are read: CounterFact in its published schema, the same without target ids,
attribute prompts and generation prompts, and a user's own facts as JSON lines or CSV with the
columns of `FACT_COLUMNS`, or in the form of EasyEdit and QAEdit (`memit.facts.easyedit`).
"""

import csv
import hashlib
import io
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count as counter
from pathlib import Path
from typing import Any, TypeVar

from memit.errors import ConflictError, InputError
from memit.facts.easyedit import as_fact, is_easyedit
from memit.files.atomic import write_whole
from memit.files.reading import parse_json, read_text
from memit.joining import ending

ORIGIN_COLUMNS = ("id", "source", "date", "note")
"""Columns that say where a fact comes from."""
FACT_COLUMNS = ("subject", "prompt", "target", "target_true", "paraphrases", "neighbors", "joined")
FACT_COLUMNS += ORIGIN_COLUMNS
"""Columns of a user's own file; the first three are required.

`prompt` holds one `{}` where the subject goes. `paraphrases` and `neighbors` are lists of complete
prompts (in CSV separated by `|`); a `{}` in a paraphrase is replaced by the subject, and a
neighbour, which is about something else and whose answer must stay, has none. Line breaks at a
prompt's end are kept, spaces are not. `joined`: true puts nothing between prompts and objects,
false a space; see `EditRequest.between`. No result depends on `id` (which stands once in a list),
`source`, `date` and `note`.
"""
_BETWEEN = {"none": None, "true": "", "false": " "}
_PROMPTS = ("paraphrase_prompts", "neighborhood_prompts", "generation_prompts", "attribute_prompts")
_KEPT = "kept_prompts"
"""The key of these prompts, which no published file has."""
Placed = tuple[str, Any]
"""Where a row stands in its file, and the row."""
Read = TypeVar("Read")
_ADVICE = {
    "requested_rewrite": " (which CounterFact's records have: set requests.source to counterfact "
    "for these, to facts for your own, and name zsRE's questions in compare.zsre)",
    "src": " (zsRE's: name the file in compare.zsre, or read it with read_zsre)",
    "target_new": " (here 'target')",
    "ground_truth": " (here 'target_true')",
    "rephrase_prompt": " (here 'paraphrases')",
    "locality": " (here 'neighbors')",
}
"""The fix for keys of other kinds of file."""


@dataclass(frozen=True)
class EditRequest:
    """One fact to write; its objects are stripped.

    Raises:
        InputError: it lacks a part, or its prompt has not exactly one `{}`.
    """

    subject: str
    prompt: str
    """Template with exactly one `{}`, where the subject goes."""
    target_new: str
    """The new object, without the space that precedes it in running text."""
    target_true: str | None = None
    relation_id: str | None = None
    between: str | None = None
    """The separator of any prompt and object, in data sets " "; None: the white space that the new
    object begins with, or else a space where running text has one (`memit.joining`)."""

    def __post_init__(self) -> None:
        begins_with = self.target_new[: -len(self.target_new.lstrip()) or None]
        if self.between is None and begins_with:
            object.__setattr__(self, "between", begins_with)
        object.__setattr__(self, "target_new", self.target_new.strip())
        if self.target_true is not None:
            object.__setattr__(self, "target_true", self.target_true.strip())
        slots = self.prompt.count("{}")
        if slots != 1:
            raise InputError(
                f"the prompt {self.prompt!r} has {slots} '{{}}' where it needs exactly one: "
                "write '{}' where the subject goes."
            )
        if not self.subject.strip():
            raise InputError("the subject is empty: name what the fact is about.")
        if not self.target_new:
            raise InputError("the new object is empty: say what the model should answer.")
        if self.target_true == "":
            raise InputError("the true object is empty: give it or leave it out.")

    @property
    def content(self) -> tuple[str, str, str, str]:
        """What an edit depends on, as texts that have an order."""
        return self.subject, self.prompt, self.target_new, str(self.between)

    @property
    def digest(self) -> str:
        """SHA-256 of the content."""
        canonical = json.dumps(self.content, ensure_ascii=False)
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return fill(self.prompt, self.subject)

    @property
    def fact(self) -> tuple[str, str]:
        """Subject and relation; without an identifier of the relation, subject and prompt."""
        return self.subject, self.relation_id or self.prompt

    def ending(self, prompt: str | None = None, target: str | None = None) -> str:
        """What follows a prompt (the request's own): the separator and an object (the new one)."""
        return ending(prompt or self.text, target or self.target_new, self.between)


@dataclass(frozen=True)
class Record:
    """An edit request with the prompts that measure it."""

    case_id: int
    request: EditRequest
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    attribute_prompts: tuple[str, ...] = ()
    target_new_id: str | None = None
    """Identifier of the new object where the data set has one; reference texts may go by it."""
    kept_prompts: tuple[str, ...] = ()
    """Prompts about other things, to which the model's own answers must stay."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """Where a user's fact comes from, in the user's own words: some of `ORIGIN_COLUMNS`."""


def fill(template: str, subject: str) -> str:
    """Replace the template's `{}` by the subject; other braces are kept."""
    return template.replace("{}", subject, 1)


def read_records(path: str | Path) -> list[Record]:
    """Read CounterFact or a user's own facts, whichever the file holds.

    Raises:
        InputError: something in it cannot be used; names file and record.
    """
    text = read_text(path, "the records").lstrip()
    rows = parse_json(text, path) if text.startswith("[") else []
    is_counterfact = any(isinstance(row, dict) and "requested_rewrite" in row for row in rows[:1])
    return read_counterfact(path) if is_counterfact else read_facts(path)


def read_counterfact(path: str | Path) -> list[Record]:
    """Read records in the CounterFact schema, whole or reduced; unknown keys are ignored.

    Raises:
        InputError: something in it cannot be used; names file and record.
    """
    rows = parse_json(read_text(path, "the records"), path)
    if not isinstance(rows, list):
        raise InputError(f"{path} holds no list of records: CounterFact is one JSON list.")
    return _checked(numbered(rows), _counterfact_record, path)


def read_facts(path: str | Path) -> list[Record]:
    """Read a user's own facts, JSON lines or CSV with the columns of `FACT_COLUMNS`.

    Raises:
        InputError: something in it cannot be used, or stands in it twice; names file and record.
        ConflictError: two of its records ask for different objects.
    """
    placed = _fact_rows(Path(path))
    records = _checked(placed, _fact_record, path)
    places = [
        f"{place} (source: {source})" if (source := record.origin.get("source")) else place
        for (place, _), record in zip(placed, records, strict=True)
    ]
    try:
        check_conflicts(records, places)
        _check_once(places, [record.request.digest for record in records], "hold the same fact")
        _check_once(places, [record.origin.get("id") for record in records], "have the same id")
    except InputError as error:
        raise type(error)(f"{path}: {error}") from None
    return records


def in_content_order(records: Iterable[Record]) -> list[Record]:
    """A user's facts in an order and with case ids that depend on their contents alone, so that
    neither their order in the file nor facts that come and go change a result of another."""
    numbered = (replace(r, case_id=int(r.request.digest[:12], 16)) for r in records)
    return sorted(numbered, key=lambda record: record.request.content)


def write_records(records: Iterable[Record], path: str | Path) -> None:
    """Write records in the CounterFact schema; equal records give equal bytes."""
    rows = [_counterfact_row(record) for record in records]
    text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    write_whole(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))


def drop_conflicts(records: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """The first record of each subject and relation and those that agree with it, and the others,
    which contradict it; in their order."""
    first: dict[tuple[str, str], str] = {}
    kept: list[Record] = []
    dropped: list[Record] = []
    for record in records:
        new = record.request.target_new
        agrees = first.setdefault(record.request.fact, new) == new
        (kept if agrees else dropped).append(record)
    return kept, dropped


def check_conflicts(records: Iterable[Record], places: Sequence[str] = ()) -> None:
    """Raise `ConflictError` naming both if two records differ in nothing but the new object.

    `places` are where they stand; by default they are numbered.
    """
    first: dict[tuple[str, str], tuple[int, str]] = {}
    for number, request in enumerate(record.request for record in records):
        key = request.subject, request.prompt
        other, target = first.setdefault(key, (number, request.target_new))
        if target != request.target_new:
            one, two = (places[n] if places else f"record {n + 1}" for n in (other, number))
            raise ConflictError(
                f"{one} and {two} contradict each other: {request.text!r} should be {target!r} and "
                f"{request.target_new!r}; remove one of them."
            )


def _check_once(places: Sequence[str], keys: Sequence[str | None], what: str) -> None:
    first: dict[str, str] = {}
    for place, key in zip(places, keys, strict=True):
        if key is not None and first.setdefault(key, place) != place:
            raise InputError(f"{first[key]} and {place} {what}: keep one of them.")


def sample_records(records: Sequence[Record], count: int | None, seed: int) -> list[Record]:
    """Draw `count` records without replacement, in the order in which they were given; None takes
    all.

    With one seed a smaller sample is part of a larger one.

    Raises:
        InputError: there are fewer records.
    """
    if count is None:
        return list(records)
    if not 1 <= count <= len(records):
        raise InputError(
            f"the count is {count}, but {len(records)} records are available: choose 1 to "
            f"{len(records)}."
        )
    return [records[index] for index in sorted(drawn_order(records, seed)[:count])]


def drawn_order(records: Sequence[Record], seed: int) -> list[int]:
    """The indices of all records, in the order in which they are drawn.

    No subject is drawn twice as long as there are others: edits of one subject share their keys
    where prompts begin with it, and most data sets have few of them.
    """
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    turns: defaultdict[str, Iterator[int]] = defaultdict(counter)
    # Stable: among the first records of all subjects, and so on, the drawn order is kept.
    return sorted(order, key=lambda index: next(turns[records[index].request.subject]))


def requests_digest(requests: Iterable[EditRequest]) -> str:
    """SHA-256 of the canonical JSON of edit requests, in their order."""
    rows = [asdict(request) for request in requests]
    for row in rows:
        if row["between"] == " ":  # digests of data sets are older than the key
            del row["between"]
    canonical = json.dumps(rows, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def read_rows(
    placed: Iterable[Placed], read: Callable[[Any, int], Read], path: str | Path
) -> Iterator[Read]:
    """Read rows with their indices; an `InputError` names the file and the place."""
    for index, (place, row) in enumerate(placed):
        try:
            yield read(row, index)
        except InputError as error:
            case = row.get("case_id") if isinstance(row, Mapping) else None
            where = f"{path}, {place}" + ("" if case is None else f" (case_id {case})")
            raise InputError(f"{where}: {error}") from None


def numbered(rows: Iterable[Any]) -> list[Placed]:
    """Rows whose places are their numbers."""
    return [(f"record {number}", row) for number, row in enumerate(rows, start=1)]


def _fact_rows(path: Path) -> list[Placed]:
    """The rows of a user's file."""
    text = read_text(path, "the records")
    if text.lstrip().startswith("["):
        return numbered(parse_json(text, path))
    if text.lstrip().startswith("{"):
        return _json_lines(path, text)
    return _csv_rows(path, text) if text.strip() else []


def _json_lines(path: Path, text: str) -> list[Placed]:
    rows, line = [], 1
    for part in re.split(r"\n(?=\s*{)", text):  # a record may take several lines
        if part.strip():
            rows.append((f"line {line}", parse_json(part, f"{path}, line {line}")))
        line += part.count("\n") + 1
    return rows


def _csv_rows(path: Path, text: str) -> list[Placed]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    rows = []
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        for name in names:
            if name not in FACT_COLUMNS or names.count(name) > 1:
                raise InputError(
                    f"{path} has the column {name!r}, which is unknown or a duplicate: the first "
                    f"line must name columns out of {', '.join(FACT_COLUMNS)}, separated by commas."
                )
        reader.fieldnames = names
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}, line {reader.line_num} has another number of fields than the header: "
                    "put quotes around fields that hold a comma."
                )
            cells: dict[str, Any] = {name: value for name, value in row.items() if value.strip()}
            for name in cells.keys() & {"paraphrases", "neighbors"}:
                cells[name] = [part for part in cells[name].split("|") if part.strip()]
            rows.append((f"line {reader.line_num}", cells))
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num} is not CSV ({error}): close its quotes."
        ) from None
    return rows


def _counterfact_record(row: Any, index: int) -> Record:
    _require_object(row, "the record")
    rewrite = _require_object(_required(row, "requested_rewrite"), "'requested_rewrite'")
    case_id = row.get("case_id", index)
    if type(case_id) is not int or not 0 <= case_id < 2**63:  # Parquet's largest
        raise InputError(f"'case_id' is {case_id!r} where a whole number from 0 on is needed.")
    request = EditRequest(
        subject=check_text(_required(rewrite, "subject"), "subject"),
        prompt=check_text(_required(rewrite, "prompt"), "prompt"),
        target_new=_object_text(_required(rewrite, "target_new"), "target_new"),
        target_true=_optional(rewrite, "target_true", _object_text),
        relation_id=_optional(rewrite, "relation_id", check_text),
        between=_optional({"between": " ", **rewrite}, "between", check_text),
    )
    target_new_id = _optional(rewrite["target_new"], "id", check_text)
    prompts = {key: _texts(row, key) for key in (*_PROMPTS, _KEPT)}
    origin = _origin(_require_object(row.get("origin", {}), "'origin'"))
    return Record(case_id, request, **prompts, target_new_id=target_new_id, origin=origin)


def _fact_record(row: Any, index: int) -> Record:
    _require_object(row, "the record")
    if is_easyedit(row):
        row = as_fact(row)
    unknown = [f"{key!r}{_ADVICE.get(key, '')}" for key in row if key not in FACT_COLUMNS]
    if unknown:
        raise InputError(
            f"the key {', '.join(unknown)} is not known: the keys are {', '.join(FACT_COLUMNS)}."
        )
    joined = str(row.get("joined")).lower()
    if joined not in _BETWEEN:
        raise InputError("'joined' is neither true nor false: write one of them.")
    subject = check_text(_required(row, "subject"), "subject").strip()
    request = EditRequest(
        subject=subject,
        prompt=_with_slot(_trimmed(check_text(_required(row, "prompt"), "prompt")), subject),
        target_new=check_text(_required(row, "target"), "target"),
        target_true=_optional(row, "target_true", check_text),
        between=_BETWEEN[joined],
    )
    paraphrases = map(_trimmed, _texts(row, "paraphrases"))
    neighbors = tuple(map(_trimmed, _texts(row, "neighbors")))
    if any("{}" in text for text in neighbors):
        raise InputError("'neighbors' has a '{}': replace it by the name of something else.")
    filled = tuple(text.replace("{}", request.subject) for text in paraphrases)
    return Record(index, request, filled, kept_prompts=neighbors, origin=_origin(row))


def _origin(row: Mapping[str, Any]) -> dict[str, str]:
    """What a row says of its origin; an id may be a number."""
    number = row.get("id")
    named = {**row, "id": str(number)} if type(number) is int else row
    given = (name for name in ORIGIN_COLUMNS if named.get(name) is not None)
    return {name: check_text(named[name], name) for name in given}


def _with_slot(prompt: str, subject: str) -> str:
    """A prompt with its `{}`; one that lacks it but names the subject once, in whole words, has it
    there."""
    slotted, mentions = re.subn(rf"(?<!\w){re.escape(subject)}(?!\w)", "{}", prompt)
    return slotted if mentions == 1 and "{}" not in prompt else prompt


def _trimmed(prompt: str) -> str:
    """A prompt without surrounding spaces; those after a line break, as in chats, are kept."""
    return re.sub(r"^ +|(?<=\S) +\Z", "", prompt)


def _counterfact_row(record: Record) -> dict[str, Any]:
    request = record.request
    rewrite: dict[str, Any] = {"prompt": request.prompt, "relation_id": request.relation_id}
    rewrite["target_new"] = {"str": request.target_new}
    if record.target_new_id is not None:
        rewrite["target_new"]["id"] = record.target_new_id
    if request.target_true is not None:
        rewrite["target_true"] = {"str": request.target_true}
    rewrite["subject"] = request.subject
    if request.between != " ":
        rewrite["between"] = request.between
    return {
        "case_id": record.case_id,
        "requested_rewrite": rewrite,
        **{key: list(getattr(record, key)) for key in _PROMPTS},
        **({_KEPT: list(record.kept_prompts)} if record.kept_prompts else {}),
        **({"origin": dict(record.origin)} if record.origin else {}),
    }


def _checked(
    placed: Sequence[Placed], read: Callable[[Any, int], Record], path: str | Path
) -> list[Record]:
    if not placed:
        raise InputError(f"{path} holds no records: give at least one.")
    records = list(read_rows(placed, read, path))
    first: dict[int, str] = {}
    for (place, _), record in zip(placed, records, strict=True):
        request = record.request
        if request.target_new == request.target_true:
            raise InputError(
                f"{path}, {place}: the new object {request.target_new!r} is the true one, "
                "so nothing would change: give another, or leave the record out."
            )
        earlier = first.setdefault(record.case_id, place)
        if earlier != place:
            raise InputError(
                f"{path}, {earlier} and {place} share the case_id {record.case_id}: "
                "number the records differently."
            )
    return records


def _required(row: Mapping[str, Any], key: str) -> Any:
    if row.get(key) is None:
        raise InputError(f"the key {key!r}{_ADVICE.get(key, '')} is missing: add it.")
    return row[key]


def _optional(row: Mapping[str, Any], key: str, read: Any) -> str | None:
    return None if row.get(key) is None else read(row[key], key)


def _require_object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name} is {value!r:.60} where a JSON object is needed.")
    return value


def _object_text(value: Any, key: str) -> str:
    return check_text(_required(_require_object(value, f"{key!r}"), "str"), f"{key}.str")


def check_text(value: Any, key: str) -> str:
    """A text without control characters; raises `InputError` naming `key` for anything else."""
    if not isinstance(value, str):
        raise InputError(f"{key!r} is {value!r:.60} where a text is needed.")
    # Halves of surrogate pairs, which JSON can spell, cannot be written as UTF-8.
    control = re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", value)
    if control:
        raise InputError(f"{key!r} holds the control character {control[0]!a}: remove it.")
    return value


def _texts(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = row.get(key) or ()
    if not isinstance(values, list | tuple):
        raise InputError(f"{key!r} is {values!r:.60} where a list of texts is needed.")
    texts = tuple(check_text(value, key) for value in values)
    if not all(text.strip() for text in texts):
        raise InputError(f"{key!r} holds an empty prompt: fill it in or remove it.")
    return texts
