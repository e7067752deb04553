"""What distinguishes two lists of facts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memit.requests import Record


@dataclass(frozen=True)
class Changes:
    """The facts by which a list differs from an earlier one."""

    added: Sequence[Record]
    withdrawn: Sequence[Record]
    changed: Sequence[tuple[Record, Record]]
    """Before and after: a fact with the same id or the same prompt, and another content."""
    kept: int
    """The number of facts that are in both."""

    def __bool__(self) -> bool:
        return bool(self.added or self.withdrawn or self.changed)

    @property
    def summary(self) -> str:
        """How many there are of each kind."""
        counts = {"added": self.added, "withdrawn": self.withdrawn, "changed": self.changed}
        return ", ".join(f"{len(of)} {kind}" for kind, of in counts.items()) + f", {self.kept} kept"


def changes_between(before: Iterable[Record], after: Iterable[Record]) -> Changes:
    """Compare two lists, whatever the order of their facts; origins alone change nothing."""
    old = {record.request.digest: record for record in before}
    new = {record.request.digest: record for record in after}
    withdrawn = {digest: record for digest, record in old.items() if digest not in new}
    added = {digest: record for digest, record in new.items() if digest not in old}
    former: dict[object, str] = {}
    for digest, record in withdrawn.items():
        former |= dict.fromkeys(_names(record), digest)
    changed = []
    for digest, record in list(added.items()):
        same = [former[name] for name in _names(record) if former.get(name) in withdrawn]
        if same:
            changed.append((withdrawn.pop(same[0]), added.pop(digest)))
    kept = len(new.keys() & old.keys())
    return Changes(list(added.values()), list(withdrawn.values()), changed, kept)


def _names(record: Record) -> list[object]:
    """By what a fact whose object was changed is recognised: its id, or else its prompt."""
    names: list[object] = [(record.request.subject, record.request.prompt)]
    return [record.origin["id"], *names] if record.origin.get("id") else names
