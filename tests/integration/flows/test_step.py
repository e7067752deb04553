"""Pieces that change little when items come and go."""

from hypothesis import given
from hypothesis import strategies as st

from flows.service.step import STEADY_PIECES, steady_chunks


@given(st.sets(st.integers()).map(sorted), st.integers(), st.integers(1, 40))
def test_an_item_more_changes_the_piece_that_it_is_in(
    items: list[int], more: int, most: int
) -> None:
    pieces = steady_chunks(items, most)
    assert [item for piece in pieces for item in piece] == items
    assert all(1 <= len(piece) <= most for piece in pieces)
    added = steady_chunks(sorted({*items, more}), most)
    assert all(1 <= len(piece) <= most for piece in added)


def test_most_pieces_of_many_items_stay() -> None:
    items = list(range(1_000, 1_600))
    pieces = steady_chunks(items, 512)
    assert STEADY_PIECES / 2 < len(pieces) < STEADY_PIECES * 2
    for more in range(20):
        added = steady_chunks([*items[: 30 * more], more, *items[30 * more :]], 512)
        new = [piece for piece in added if piece not in pieces]
        assert len(new) == 1 + (len(added) - len(pieces))
        assert any(more in piece for piece in new)
