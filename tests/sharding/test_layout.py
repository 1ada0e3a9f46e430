"""What each rank has of an axis: pieces, copies, padding; and where several segments lie."""

from __future__ import annotations

import pytest

from graphopt.sharding.layout import Axis, Segment, local_size, one_segment, ranges, same_sizes, total


@pytest.mark.parametrize(
    ("units", "world", "shares"),
    [
        (8, 2, [(0, 4), (4, 8)]),
        (2, 2, [(0, 1), (1, 2)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),  # fewer pieces than ranks: copies
        (1, 3, [(0, 1)] * 3),
        (5, 1, [(0, 5)]),
    ],
)
def test_shares(units: int, world: int, shares: list[tuple[int, int]]) -> None:
    axis = Axis(units)
    assert axis.even(world)
    assert [axis.share(world, rank) for rank in range(world)] == shares
    assert axis.copies(world) == max(world // units, 1)


def test_what_does_not_divide_is_uneven_and_may_be_padded() -> None:
    axis = Axis(7)
    assert not axis.even(2) and not Axis(3).even(2) and not Axis(3).even(4)
    assert [axis.share(4, rank) for rank in range(4)] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert ranges(one_segment(axis, 7), 4, 3) == ((6, 7, 1),)
    assert ranges(one_segment(Axis(5), 5), 4, 3) == ((5, 5, 2),)  # a rank beyond the end has zeros alone


def test_pieces_only_get_larger() -> None:
    axis = Axis(24)
    axis.refine(4)
    assert axis.root().units == 4
    axis.refine(6)
    assert axis.root().units == 2


def test_axes_that_meet_are_one() -> None:
    one, two, three = Axis(8), Axis(12), Axis(4)
    one.unite(two)
    two.unite(three)
    three.refine(2)
    assert one.root() is two.root() is three.root()
    assert one.root().units == 2
    one.unite(three)  # again: nothing
    assert one.root().above is None


def test_segments_lie_side_by_side() -> None:
    segments = (Segment(Axis(4), 8), Segment(Axis(2), 4))
    assert (total(segments), local_size(segments, 2)) == (12, 6)
    assert ranges(segments, 2, 1) == ((4, 8, 0), (10, 12, 0))
    assert ranges(segments, 4, 3) == ((6, 8, 0), (10, 12, 0))  # the second piece is copied to ranks 2 and 3
    assert same_sizes(segments, (Segment(Axis(8), 8), Segment(Axis(1), 4)))
    assert not same_sizes(segments, segments[:1])
