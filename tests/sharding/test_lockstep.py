"""Ranks in one process: they exchange at collectives, and a rank that does not come is an error."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from graphopt import ops
from graphopt.errors import ShardError
from graphopt.sharding.lockstep import lockstep
from tests.graphs import Builder

aten = torch.ops.aten


def one_call(*calls: object, x: tuple[int, ...] = (2, 4)) -> fx.GraphModule:
    """A graph of calls in a row on its input."""
    build = Builder()
    node = build.input("x", *x)
    for call in calls:
        op, *args = call if isinstance(call, tuple) else (call,)
        node = build.call(op, node, *args)
    return build.done(node)


def test_a_graph_without_collectives_runs_alone() -> None:
    x, y = torch.ones(2, 4), torch.zeros(2, 4)
    graphs = [one_call(aten.neg.default)] * 2
    (a,), (b,) = lockstep(graphs, [[x], [y]])  # type: ignore[misc]  # tuples
    assert torch.equal(a, -x) and torch.equal(b, -y)  # type: ignore[has-type]


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 6.0), ("avg", 2.0), ("max", 3.0), ("min", 1.0)])
def test_reductions(reduction: str, expected: float) -> None:
    graphs = [one_call((ops.all_reduce.overload, "tp", reduction))] * 3
    for (found,) in lockstep(graphs, [[torch.full((2, 4), float(i))] for i in (1, 2, 3)]):  # type: ignore[misc]
        assert torch.equal(found, torch.full((2, 4), expected))  # type: ignore[has-type]


def test_gathers_and_scatters_are_in_the_order_of_ranks() -> None:
    parts = [torch.full((2, 1), float(i)) for i in range(3)]
    graphs = [one_call((ops.all_gather.overload, "tp", -1), x=(2, 1))] * 3
    for (found,) in lockstep(graphs, [[p] for p in parts]):  # type: ignore[misc]  # tuples
        assert torch.equal(found, torch.tensor([[0.0, 1, 2]] * 2))  # type: ignore[has-type]
    graphs = [one_call((ops.reduce_scatter.overload, "tp", 1))] * 2
    x = torch.arange(8.0).reshape(2, 4)
    (first,), (second,) = lockstep(graphs, [[x], [x]])  # type: ignore[misc]  # tuples
    assert torch.equal(first, 2 * x[:, :2]) and torch.equal(second, 2 * x[:, 2:])  # type: ignore[has-type]


def test_ranks_that_do_not_meet() -> None:
    x = torch.ones(2, 4)
    reduces, gathers = (ops.all_reduce.overload, "tp"), (ops.all_gather.overload, "tp", 0)
    with pytest.raises(ShardError, match=r"rank 0: all_reduce, rank 1: all_gather\); their graphs differ"):
        lockstep([one_call(reduces), one_call(gathers)], [[x], [x]])
    with pytest.raises(ShardError, match="rank 0: all_reduce, rank 1: done"):
        lockstep([one_call(reduces), one_call(aten.neg.default)], [[x], [x]])
    with pytest.raises(ShardError, match="do not meet"):
        lockstep(
            [one_call((ops.all_reduce.overload, "tp")), one_call((ops.all_reduce.overload, "dp"))], [[x], [x]]
        )
