"""What is shared, what stays whole and why, on drawn graphs: each is run in lockstep beside the whole one."""

from __future__ import annotations

import pytest
import torch

from graphopt import graph as g
from graphopt import ops
from tests.graphs import Builder, calls
from tests.sharding.drawing import Refusals, check, gathers, reductions
from tests.sharding.drawn import LINEAR, NORM, linear, mlp, weights_of

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------------ linears


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_after_another_shares_its_inputs_and_is_summed_once(world: int, bias: bool) -> None:
    build = Builder()
    x = build.input("x", 3, 7, 6)
    gm = build.done(build.call(aten.add.Tensor, x, mlp(build, x, "mlp", 12, bias=bias)))
    for rank in check(gm, world):
        assert weights_of(rank) == [(12 // world, 6), (6, 12 // world)]
        assert reductions(rank) == (world > 1)


def test_a_row_linears_bias_is_added_once() -> None:
    build = Builder()
    gm = build.done(mlp(build, build.input("x", 2, 6), "mlp", 8, bias=True))
    first, second = check(gm, 2)
    assert [n.args[2] is None for n in calls(first, LINEAR)] == [False, False]
    assert [n.args[2] is None for n in calls(second, LINEAR)] == [False, True]


def test_a_shared_expert_and_the_routed_sum_need_one_reduction() -> None:
    build = Builder()
    x = build.input("x", 3, 7, 6)
    gate = build.input("gate", 3, 7, 1)
    routed = build.call(aten.mul.Tensor, mlp(build, x, "one", 8), gate)
    other = build.call(aten.mul.Tensor, mlp(build, x, "two", 12), 0.5)
    total = build.call(
        aten.add.Tensor, build.call(aten.add.Tensor, routed, other), mlp(build, x, "shared", 4)
    )
    moved = build.call(
        aten.permute.default, build.call(aten.reshape.default, total, [3, 7, 2, 3]), [0, 2, 1, 3]
    )
    gm = build.done(build.call(aten.tanh.default, moved))
    assert [reductions(rank) for rank in check(gm, 4)] == [1] * 4


def test_a_sum_of_experts_that_begins_with_zero_is_one_reduction() -> None:
    build = Builder()
    x = build.input("x", 3, 6)
    total = build.call(aten.add.Tensor, mlp(build, x, "one", 8), 0)
    total = build.call(aten.add.Tensor, total, mlp(build, x, "two", 12))
    gm = build.done(build.call(aten.tanh.default, total))
    assert [reductions(rank) for rank in check(gm, 2)] == [1, 1]


def test_a_term_that_is_read_twice_is_summed_where_it_is_made() -> None:
    build = Builder()
    y = mlp(build, build.input("x", 3, 6), "mlp", 8)
    gm = build.done(build.call(aten.mul.Tensor, y, 2.0), build.call(aten.tanh.default, y))
    assert [reductions(rank) for rank in check(gm, 2)] == [1, 1]


def test_terms_are_no_factors_and_no_summands_of_wholes() -> None:
    build = Builder()
    x = build.input("x", 3, 6)
    y = mlp(build, x, "mlp", 8)
    gm = build.done(
        build.call(aten.mul.Tensor, y, y),
        build.call(aten.add.Tensor, y, 1.0),
        build.call(aten.div.Tensor, x, y),
    )
    assert [reductions(rank) for rank in check(gm, 2)] == [1, 1]


def test_a_norm_over_shared_features_leaves_its_linear_whole() -> None:
    build, heard = Builder(), Refusals()
    x = build.input("x", 3, 6)
    h = linear(build, x, "pre", 8, 6)
    normed = build.call(NORM, h, build.weight("norm.weight", 8), 1e-6)
    gm = build.done(linear(build, normed, "post", 6, 8))
    for rank in check(gm, 2, heard):
        assert weights_of(rank) == [(8, 6), (6, 8)]
    assert "rms_norm needs all of a row" in heard.reasons[calls(gm, LINEAR)[0].name]


def test_an_operator_without_a_rule_gets_all_of_it() -> None:
    build, heard = Builder(), Refusals()
    h = linear(build, build.input("x", 3, 6), "pre", 8, 6)
    gm = build.done(linear(build, build.call(aten.cumsum.default, h, -1), "post", 6, 8))
    check(gm, 2, heard)
    assert "no sharding rule for aten.cumsum" in heard.reasons[calls(gm, LINEAR)[0].name]


def test_a_narrow_output_stays_whole_and_a_wide_one_is_gathered() -> None:
    build, heard = Builder(), Refusals()
    x = build.input("x", 3, 6)
    gm = build.done(linear(build, x, "pooler", 6, 6), linear(build, x, "head", 13, 6, True))
    for rank in check(gm, 4, heard):
        assert weights_of(rank) == [(6, 6), (4, 6)]  # 13 rows in fours: the last rank has 1 and 3 of zeros
        assert gathers(rank) == 1
    assert heard.reasons[calls(gm, LINEAR)[0].name] == "left whole: it is returned"


def test_a_router_stays_whole() -> None:
    build = Builder()
    scores = linear(build, build.input("x", 3, 6), "router", 8, 6)
    gm = build.done(build.call(aten.softmax.int, scores, -1))
    assert [weights_of(rank) for rank in check(gm, 2)] == [[(8, 6)]] * 2


def test_a_linear_whose_weight_is_computed_from_an_input_stays_whole() -> None:
    build = Builder()
    x, w = build.input("x", 3, 6), build.input("w", 8, 6)
    gm = build.done(build.call(ops.activation.overload, build.call(LINEAR, x, w, None), "silu"))
    assert [reductions(rank) for rank in check(gm, 2)] == [0, 0]


def test_an_empty_batch() -> None:
    build = Builder()
    gm = build.done(mlp(build, build.input("x", 0, 6), "mlp", 8))
    check(gm, 2)


# ------------------------------------------------------------------------------------------------ vocabulary


@pytest.mark.parametrize("rows", [12, 13, 7])
@pytest.mark.parametrize("world", [2, 4])
def test_a_tied_vocabulary_is_one_slice(rows: int, world: int) -> None:
    build = Builder()
    ids = build.input("ids", 3, 5, dtype=torch.int64)
    table = build.weight("embed.weight", rows, 6, tied=("head.weight",))
    h = build.call(aten.embedding.default, table, ids, 1)
    positions = build.call(aten.embedding.default, build.weight("positions.weight", 5, 6), ids)
    normed = build.call(NORM, build.call(aten.add.Tensor, h, positions), None, 1e-6)
    gm = build.done(build.call(aten.tanh.default, build.call(LINEAR, normed, table, None)))
    for rank in check(gm, world):
        embedding, head = calls(rank, aten.embedding.default)[0], calls(rank, LINEAR)[0]
        assert embedding.args[0] is head.args[1]
        assert tuple(g.shape(head.args[1])) == (-(-rows // world), 6)  # type: ignore[arg-type]  # a node
        assert (reductions(rank), gathers(rank)) == (1, 1)


def test_logits_that_are_normalised_leave_the_head_whole() -> None:
    build = Builder()
    x = build.input("x", 3, 6)
    gm = build.done(build.call(aten.log_softmax.int, linear(build, x, "head", 12, 6), -1))
    assert [weights_of(rank) for rank in check(gm, 2)] == [[(12, 6)]] * 2
