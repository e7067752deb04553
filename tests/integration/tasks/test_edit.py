"""Edits that cannot be written: named one at a time, and left out where that is wanted."""

from collections.abc import Sequence

import pytest

from memit.errors import EditError
from tasks.edit import write_what_can_be


def failing(bad: set[int]):
    """Writes any edits but the bad ones, of which it names one at a time."""

    def write(kept: Sequence[int]) -> list[int]:
        for place, edit in enumerate(kept):
            if edit in bad:
                raise EditError(f"{edit} is bad.", [place])
        return list(kept)

    return write


def test_edits_are_dropped_only_where_that_is_wanted() -> None:
    kept, dropped = write_what_can_be(failing({1, 3}), 5, "drop")
    assert kept == [0, 2, 4]
    assert dropped == {1: "1 is bad.", 3: "3 is bad."}
    assert write_what_can_be(failing(set()), 2, "stop") == ([0, 1], {})
    with pytest.raises(EditError, match="1 is bad"):
        write_what_can_be(failing({1, 3}), 5, "stop")
    with pytest.raises(EditError, match="1 is bad"):
        write_what_can_be(failing({0, 1}), 2, "drop")
