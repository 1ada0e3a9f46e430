"""Where a shared dimension is after a view; sizes may be symbols."""

from __future__ import annotations

import pytest
import torch

from graphopt import graph as g
from graphopt import ops, torch_private
from graphopt.sharding.layout import Axis, Split, one_segment
from graphopt.sharding.views import bounds, groups, moved_split
from tests.graphs import Builder, calls
from tests.sharding.drawing import shared

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("old", "new", "dim", "found", "units"),
    [
        ((3, 7, 12), (3, 7, 4, 3), 2, 2, 4),
        ((3, 7, 4, 3), (3, 7, 12), 2, 2, 4),
        ((3, 7, 12), (21, 12), 2, 1, 12),
        ((3, 7, 12), (3, 1, 7, 12, 1), 2, 3, 12),
        ((12,), (2, 2, 3), 0, 0, 2),
        ((4, 6), (24,), 0, 0, 4),
        ((4, 6), (8, 3), 0, 0, 4),  # a row of 6 is two of 3
        ((4, 6), (2, 12), 0, 0, 2),  # pieces of two rows
        ((4, 6), (24,), 1, None, 6),  # columns of many rows are no block
        ((3, 4, 5), (12, 5), 1, None, 4),
        ((1, 4, 5), (4, 5), 1, 0, 4),
    ],
)
def test_a_reshape_moves_the_shared_dimension(
    old: tuple[int, ...], new: tuple[int, ...], dim: int, found: int | None, units: int
) -> None:
    axis = Axis(old[dim])
    moved = moved_split(old, new, Split(dim, one_segment(axis, old[dim])))
    if found is None:
        assert moved is None
        return
    assert moved is not None
    assert (moved.dim, moved.segments[0].size, axis.root().units) == (found, new[found], units)


def test_groups_of_symbolic_sizes() -> None:
    mode = torch_private.new_fake_mode(symbolic=True)
    b, s = (torch_private.symbolic_int(mode, n, h) for n, h in (("b", 3), ("s", 7)))
    assert groups((b, s, 12), (b, s, 4, 3)) == [([0], [0]), ([1], [1]), ([2], [2, 3])]
    assert groups((b, s, 12), (b * s, 12)) == [([0, 1], [0]), ([2], [1])]
    assert groups((b * s, 12), (b, s, 12)) == [([0], [0, 1]), ([1], [2])]


@pytest.mark.parametrize(
    ("start", "end", "found"),
    [(None, None, (0, 9)), (2, 1 << 62, (2, 9)), (-3, None, (6, 9)), (5, 2, (5, 2))],
)
def test_a_slices_bounds(start: int | None, end: int | None, found: tuple[int, int]) -> None:
    assert bounds(start, end, 9) == found


def test_sizes_of_a_symbolic_graph() -> None:
    """Batch and length stay symbols; the heads' literal becomes the rank's."""
    build = Builder()
    s = build.size("s", 7)
    x = build.input("x", 2, s, 6)
    w = build.weight("q.weight", 12, 6)
    y = build.call(ops.linear.overload, x, w, None)
    split = build.call(aten.reshape.default, y, [2, s, 4, 3])
    flat = build.call(aten.reshape.default, split, [2, s, 12])
    gm = build.done(build.call(ops.linear.overload, flat, build.weight("o.weight", 6, 12), None))
    (rank, _) = shared(gm, 2)
    size = g.placeholders(rank.graph)[0]
    assert [n.args[1] for n in calls(rank, aten.reshape.default)] == [[2, size, 2, 3], [2, size, 6]]
    assert isinstance(g.shape(calls(rank, aten.reshape.default)[0])[1], torch.SymInt)
