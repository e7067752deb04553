"""Two lists of facts: what comes, goes and changes."""

from hypothesis import given
from hypothesis import strategies as st

from memit.changes import changes_between
from memit.requests import EditRequest, Record


def fact(subject: str, target: str = "Rome", prompt: str = "{} is in", **origin: str) -> Record:
    return Record(0, EditRequest(subject, prompt, target), origin=origin)


def test_facts_are_added_withdrawn_and_changed() -> None:
    before = [fact("Ann"), fact("Bo"), fact("Cy", id="3"), fact("Di", id="4")]
    after = [
        fact("Di", id="4", note="another note changes nothing"),
        fact("Eve"),
        fact("Bo", "Oslo"),
        fact("Cy", prompt="{} lives in", id="3"),
    ]
    changes = changes_between(before, after)
    assert changes.added == [after[1]]
    assert changes.withdrawn == [before[0]]
    assert changes.changed == [(before[1], after[2]), (before[2], after[3])]
    assert changes.summary == "1 added, 1 withdrawn, 2 changed, 1 kept"


@given(st.permutations([fact(name, id=name) for name in "abcd"]))
def test_the_order_changes_nothing(order: list[Record]) -> None:
    assert not changes_between(order, order[::-1])
    assert changes_between([], order).added == order
    assert changes_between(order, []).withdrawn == order
