"""Attention shared by heads: packed projections, few kv heads, norms over all heads."""

from __future__ import annotations

import pytest
import torch

from graphopt import ops
from tests.graphs import Builder
from tests.sharding.drawing import check, reductions
from tests.sharding.drawn import NORM, attention_of, grouped, heads, linear, mlp, weights_of

aten = torch.ops.aten


@pytest.mark.parametrize("world", [2, 4])
def test_a_packed_projection_is_shared_part_by_part(world: int) -> None:
    build = Builder()
    y = linear(build, build.input("x", 2, 5, 6), "block.qkv", 48, 6, True)
    q, k, v = (build.call(aten.slice.Tensor, y, -1, a, b, 1) for a, b in ((0, 24), (24, 36), (36, 48)))
    gm = build.done(
        attention_of(build, heads(build, q, 8, 3), heads(build, k, 4, 3), heads(build, v, 4, 3), 6)
    )
    for rank in check(gm, world):
        assert weights_of(rank) == [(48 // world, 6), (6, 24 // world)]
        assert reductions(rank) == 1


def test_a_projection_packed_as_three_by_heads() -> None:
    build = Builder()
    y = linear(build, build.input("x", 2, 5, 6), "block.qkv", 36, 6, True)
    y = build.call(
        aten.permute.default, build.call(aten.reshape.default, y, [2, 5, 3, 4, 3]), [2, 0, 3, 1, 4]
    )
    q, k, v = (build.call(aten.select.int, y, 0, i) for i in range(3))
    for rank in check(build.done(attention_of(build, q, k, v, 6)), 2):
        assert weights_of(rank) == [(18, 6), (6, 6)]


def test_a_projection_packed_by_head() -> None:
    build = Builder()
    y = linear(build, build.input("x", 2, 5, 6), "block.qkv", 36, 6)
    y = build.call(aten.permute.default, build.call(aten.reshape.default, y, [2, 5, 4, 9]), [0, 2, 1, 3])
    q, k, v = (build.call(aten.slice.Tensor, y, -1, 3 * i, 3 * i + 3, 1) for i in range(3))
    for rank in check(build.done(attention_of(build, q, k, v, 6)), 4):
        assert weights_of(rank) == [(9, 6), (6, 3)]


def test_few_kv_heads_are_copied_to_the_ranks_that_read_them() -> None:
    gm = grouped(8, 2, 3)
    for rank in check(gm, 4):
        assert weights_of(rank) == [(6, 6), (3, 6), (3, 6), (6, 6)]


@pytest.mark.parametrize("reader", ["linear", "matmul"])
def test_copied_kv_heads_are_no_terms_of_a_sum_that_is_drawn_before_attention(reader: str) -> None:
    """Only attention tells that keys are two heads: of four ranks two have each, and both would add it."""
    build = Builder()
    x = build.input("x", 2, 5, 6)
    q, k, v = (linear(build, x, f"block.{n}", h * 4, 6) for n, h in (("q", 8), ("k", 2), ("v", 2)))
    if reader == "linear":
        early = linear(build, k, "block.extra", 6, 8)
    else:
        turned = build.call(aten.permute.default, v, [0, 2, 1])
        early = build.call(aten.matmul.default, build.call(aten.matmul.default, k, turned), x)
    y = attention_of(build, heads(build, q, 8, 4), heads(build, k, 2, 4), heads(build, v, 2, 4), 6)
    gm = build.done(build.call(aten.add.Tensor, y, early))
    for world in (2, 4):
        check(gm, world)


def test_a_norm_over_all_heads_leaves_q_whole_and_attention_shared() -> None:
    build = Builder()
    x = build.input("x", 2, 5, 6)
    q, k, v = (linear(build, x, f"block.{n}", 12, 6) for n in "qkv")
    q = build.call(NORM, q, build.weight("block.q_norm.weight", 12), 1e-6)
    q, k, v = (heads(build, y, 4, 3) for y in (q, k, v))
    for rank in check(build.done(attention_of(build, q, k, v, 6)), 2):
        assert weights_of(rank) == [(12, 6), (6, 6), (6, 6), (6, 6)]


def test_one_kv_head_in_a_packed_projection_is_copied() -> None:
    """Multi-query attention: the query rows are shared, the others are everybody's."""
    build = Builder()
    y = linear(build, build.input("x", 2, 5, 6), "block.qkv", 18, 6, True)
    q, k, v = (build.call(aten.slice.Tensor, y, -1, a, b, 1) for a, b in ((0, 12), (12, 15), (15, 18)))
    k, v = (build.call(aten.reshape.default, part, [2, 1, 5, 3]) for part in (k, v))
    for rank in check(build.done(attention_of(build, heads(build, q, 4, 3), k, v, 6)), 2):
        assert weights_of(rank) == [(12, 6), (6, 6)]


def test_a_norm_over_all_heads_leaves_its_part_of_a_packed_projection_whole() -> None:
    build = Builder()
    y = linear(build, build.input("x", 2, 5, 6), "block.qkv", 36, 6)
    q, k, v = (build.call(aten.slice.Tensor, y, -1, a, a + 12, 1) for a in (0, 12, 24))
    q = build.call(NORM, q, build.weight("block.q_norm.weight", 12), 1e-6)
    q, k, v = (heads(build, part, 4, 3) for part in (q, k, v))
    for rank in check(build.done(attention_of(build, q, k, v, 6)), 2):
        assert weights_of(rank) == [(24, 6), (6, 6)]


def test_attention_and_mlp_side_by_side_need_one_reduction() -> None:
    build = Builder()
    x = build.input("x", 2, 5, 6)
    y = linear(build, x, "block.qkv", 36, 6)
    q, k, v = (heads(build, build.call(aten.slice.Tensor, y, -1, a, a + 12, 1), 4, 3) for a in (0, 12, 24))
    q = build.call(aten.cumsum.default, q, 1)  # needs all heads: found in a later sweep than the sum
    both = build.call(aten.add.Tensor, attention_of(build, q, k, v, 6), mlp(build, x, "mlp", 8))
    assert [reductions(rank) for rank in check(build.done(build.call(aten.add.Tensor, both, x)), 2)] == [1, 1]


def test_bias_and_sinks_follow_the_heads() -> None:
    build = Builder()
    x = build.input("x", 2, 5, 6)
    q, k, v = (heads(build, linear(build, x, f"block.{n}", 12, 6), 4, 3) for n in "qkv")
    bias, sinks = build.input("bias", 1, 4, 5, 5), build.weight("block.sinks", 4)
    out = build.call(ops.attention.overload, q, k, v, 0.3, bias=bias, sinks=sinks)
    laid = build.call(aten.reshape.default, build.call(aten.permute.default, out, [0, 2, 1, 3]), [2, 5, 12])
    gm = build.done(linear(build, laid, "block.o", 6, 12))
    assert [reductions(rank) for rank in check(gm, 4)] == [1] * 4


def test_attention_spelled_out_is_shared_by_heads() -> None:
    build = Builder()
    x = build.input("x", 2, 5, 6)
    q, k, v = (heads(build, linear(build, x, f"block.{n}", 12, 6), 4, 3) for n in "qkv")
    scores = build.call(aten.matmul.default, q, build.call(aten.permute.default, k, [0, 1, 3, 2]))
    out = build.call(aten.matmul.default, build.call(aten.softmax.int, scores, -1), v)
    laid = build.call(aten.reshape.default, build.call(aten.permute.default, out, [0, 2, 1, 3]), [2, 5, 12])
    for rank in check(build.done(linear(build, laid, "block.o", 6, 12)), 2):
        assert weights_of(rank) == [(6, 6)] * 4
