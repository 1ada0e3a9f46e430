"""graphopt.passes.speller: arguments by schema, equal calls once, no-ops gone, one node for each size."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from graphopt import graph as g
from graphopt.errors import CaptureRefused
from graphopt.passes.speller import Speller
from tests.graphs import Builder

aten = torch.ops.aten


def spelled(*shape: object) -> tuple[Speller, Builder, fx.Node, fx.Node]:
    """A speller that has visited one input x: it, the old graph, old x and new x."""
    build = Builder()
    old = build.input("x", *shape)
    speller = Speller()
    for node in list(build.graph.nodes):
        speller.visit(node)
    new = speller.env[old]
    assert isinstance(new, fx.Node)
    return speller, build, old, new


def test_defaults_are_filled_in_and_keywords_placed_by_the_schema() -> None:
    speller, build, old, new = spelled(2, 3)
    call = build.call(aten.sum.dim_IntList, old, dim=[1], dtype=torch.float64)
    args, kwargs = speller.arguments(call)
    assert args == (new, [1], False) and kwargs == {"dtype": torch.float64}


def test_equal_pure_calls_become_one_and_literals_of_other_types_do_not() -> None:
    speller, build, old, _ = spelled(2, 3)
    same = [build.call(aten.mul.Tensor, old, 2), build.call(aten.mul.Tensor, old, 2)]
    other = build.call(aten.mul.Tensor, old, 2.0)
    for node in (*same, other):
        speller.visit(node)
    assert speller.env[same[0]] is speller.env[same[1]]
    assert speller.env[other] is not speller.env[same[0]]


def test_random_calls_are_never_merged() -> None:
    speller, build, old, _ = spelled(2, 3)
    draws = [build.call(aten.rand_like.default, old) for _ in range(2)]
    for node in draws:
        speller.visit(node)
    assert speller.env[draws[0]] is not speller.env[draws[1]]


def test_a_dim_is_counted_from_the_end() -> None:
    speller, build, old, _ = spelled(2, 3)
    node = build.call(aten.cumsum.default, old, 0)
    speller.visit(node)
    new = speller.env[node]
    assert isinstance(new, fx.Node) and new.args[1] == -2


def test_permutations_compose_and_no_ops_go() -> None:
    speller, _, old, x = spelled(2, 3, 5)
    value, like = g.val(old), old
    once = speller.permute(x, [2, 0, 1], torch.empty(5, 2, 3), like)
    assert speller.permute(once, [1, 2, 0], value, like) is x
    twice = speller.permute(once, [2, 0, 1], torch.empty(3, 5, 2), like)
    assert twice.args == (x, [1, 2, 0])
    assert speller.reshape(x, value, like) is x and speller.cast(x, torch.float32, like) is x
    assert speller.slice(x, 1, 0, 3, 1, value, like) is x
    assert speller.slice(x, 1, -2, 99, 1, torch.empty(2, 2, 5), like).args == (x, -2, 1, 3, 1)


def test_a_symbolic_size_has_one_node() -> None:
    build = Builder()
    n = build.size("n", 7)
    x = build.input("x", n, 4)
    speller = Speller()
    for node in list(build.graph.nodes):
        speller.visit(node)
    size = speller.env[n]
    assert speller.sizes(g.shape(x)) == [size, 4]
    doubled = speller.sizes([g.val(n) * 2])  # type: ignore[operator]  # a size
    assert isinstance(doubled[0], fx.Node) and speller.sizes([g.val(n) * 2]) == doubled  # type: ignore[operator]


def test_a_size_of_unknown_arithmetic_is_refused() -> None:
    speller, *_ = spelled(2)
    with pytest.raises(CaptureRefused, match=r"the size odd has no node and no known arithmetic \(Unknown\)"):
        speller.arithmetic(type("Unknown", (), {"__str__": lambda self: "odd"})(), None)
