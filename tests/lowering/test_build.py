"""graphopt.lowering.build: one call more, with the value, the place and the rewrite of what it stands for."""

from __future__ import annotations

import torch

from graphopt import graph as g
from graphopt.lowering.build import insert_call
from tests.graphs import Builder

aten = torch.ops.aten


def test_an_inserted_call_has_its_value_place_and_origin() -> None:
    build = Builder()
    x = build.input("x", 3, 5, dtype=torch.bfloat16)
    origin = g.Origin("a_rule", "match-1", ("x",))
    like = build.call(aten.neg.default, x, path="layers.0", source="model.py:7", origin=origin)
    new = insert_call(build.graph, like, aten.sum.dim_IntList, like, [-1], keepdim=True, dtype=torch.float32)
    gm = build.done(new)
    assert g.shape(new) == (3, 1) and g.dtype(new) == torch.float32
    assert (g.module_path(new), g.source(new), g.origin(new)) == ("layers.0", "model.py:7", origin)
    value = torch.randn(3, 5).bfloat16()
    torch.testing.assert_close(gm(value)[0], -value.float().sum(-1, keepdim=True))


def test_without_an_origin_none_is_made() -> None:
    build = Builder()
    x = build.input("x", 2)
    assert g.origin(insert_call(build.graph, x, aten.neg.default, x)) is None


def test_symbolic_sizes_get_no_guard() -> None:
    build = Builder()
    n = build.size("n", 7)
    x = build.input("x", n, 4)
    new = insert_call(build.graph, x, aten.reshape.default, x, [n, 2, 2])
    assert g.shape(new)[0] == g.val(n) and g.shape(new)[1:] == (2, 2)
    assert not isinstance(g.shape(new)[0], int)
