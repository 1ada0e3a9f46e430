"""What is shared, what stays whole and why, on drawn graphs: each is run in lockstep beside the whole one."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.errors import ShardError
from graphopt.passes.shard import PLAN_HASH, Shard
from graphopt.pipeline import Context
from tests.graphs import Builder, calls
from tests.sharding.drawing import Refusals, check, gathers, reductions, shared

aten = torch.ops.aten
LINEAR = ops.linear.overload
NORM = ops.rms_norm.overload


def linear(
    build: Builder,
    x: fx.Node,
    name: str,
    rows: int,
    columns: int,
    bias: bool = False,
    path: str | None = None,
) -> fx.Node:
    w = build.weight(f"{name}.weight", rows, columns)
    b = build.weight(f"{name}.bias", rows) if bias else None
    return build.call(LINEAR, x, w, b, path=name if path is None else path)


def mlp(build: Builder, x: fx.Node, name: str, wide: int, width: int = 6, bias: bool = False) -> fx.Node:
    up = linear(build, x, f"{name}.up", wide, width, bias)
    return linear(build, build.call(ops.activation.overload, up, "silu"), f"{name}.down", width, wide, bias)


def weights_of(gm: fx.GraphModule) -> list[tuple[int, ...]]:
    """The shapes of the linears' weights."""
    return [tuple(map(int, g.shape(n.args[1]))) for n in calls(gm, LINEAR)]  # type: ignore[arg-type]  # nodes


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


# -------------------------------------------------------------------------------------------- packed weights


def attention_of(build: Builder, q: fx.Node, k: fx.Node, v: fx.Node, width: int) -> fx.Node:
    out = build.call(ops.attention.overload, q, k, v, 0.3, True, path="block.attn")
    b, h, s, d = map(int, g.shape(out))
    laid = build.call(aten.permute.default, out, [0, 2, 1, 3])
    return linear(build, build.call(aten.reshape.default, laid, [b, s, h * d]), "block.o", width, h * d, True)


def heads(build: Builder, x: fx.Node, count: int, dim: int) -> fx.Node:
    b, s, _ = g.shape(x)
    split = build.call(aten.reshape.default, x, [b, s, count, dim])
    return build.call(aten.permute.default, split, [0, 2, 1, 3])


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
    build = Builder()
    x = build.input("x", 2, 5, 6)
    q, k, v = (linear(build, x, f"block.{n}", h * 3, 6) for n, h in (("q", 8), ("k", 2), ("v", 2)))
    gm = build.done(
        attention_of(build, heads(build, q, 8, 3), heads(build, k, 2, 3), heads(build, v, 2, 3), 6)
    )
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


# ------------------------------------------------------------------------------------------------ errors


def test_heads_that_do_not_divide() -> None:
    build = Builder()
    x = build.input("x", 2, 5, 6)
    q, k, v = (heads(build, linear(build, x, f"block.{n}", 15, 6), 5, 3) for n in "qkv")
    gm = build.done(attention_of(build, q, k, v, 6))
    before = g.fingerprint(gm.graph)
    with pytest.raises(
        ShardError, match=r"block\.attn: attention has 5 query heads, which 2 ranks cannot share"
    ):
        Shard(2).run(gm, Context())
    assert g.fingerprint(gm.graph) == before


def test_kv_heads_that_neither_divide_nor_are_divided() -> None:
    build = Builder()
    x = build.input("x", 2, 5, 6)
    q, k, v = (linear(build, x, f"block.{n}", h * 2, 6) for n, h in (("q", 12), ("k", 3), ("v", 3)))
    gm = build.done(
        attention_of(build, heads(build, q, 12, 2), heads(build, k, 3, 2), heads(build, v, 3, 2), 6)
    )
    with pytest.raises(ShardError, match=r"block\.attn: attention has 3 key and value heads, which 2 ranks"):
        Shard(2).run(gm, Context())


def test_a_width_that_does_not_divide() -> None:
    build = Builder()
    gm = build.done(mlp(build, build.input("x", 2, 6), "layers.0.mlp", 9))
    with pytest.raises(ShardError, match=r"layers\.0\.mlp\.down: linear has 9 input features, which 2 ranks"):
        Shard(2).run(gm, Context())


@pytest.mark.parametrize(("world", "rank"), [(0, 0), (2, 2), (2, -1), (-1, 0)])
def test_a_rank_that_cannot_be(world: int, rank: int) -> None:
    with pytest.raises(ShardError, match=rf"rank {rank} of {world}: give 0 <= rank < world"):
        Shard(world, rank)


def test_a_pass_hashes_and_compares() -> None:
    one, two = Shard(2, 1, plan={"up": "colwise"}), Shard(2, 1, plan=[("up", "colwise")])
    assert one == two != Shard(2, 0) and hash(one) == hash(two)


def test_an_axis_that_is_no_name() -> None:
    with pytest.raises(ShardError, match=r"rank 0 of 2\.0: give 0 <= rank < world"):
        Shard(2.0, 0)  # type: ignore[arg-type]  # that is what is tested
    with pytest.raises(ShardError, match="axis 't p' is no name"):
        Shard(2, 0, "t p")


# ------------------------------------------------------------------------------------------------ plans


def block(build: Builder) -> fx.GraphModule:
    x = build.input("x", 2, 5, 6)
    return build.done(build.call(aten.add.Tensor, x, mlp(build, x, "layers.0.mlp", 8, bias=True)))


def test_a_plan_leaves_out_what_it_names() -> None:
    plan = {"layers.*.mlp.up": "replicated", "layers.*.mlp.down": "replicated"}
    assert [weights_of(r) for r in check(block(Builder()), 2, plan=plan)] == [[(8, 6), (6, 8)]] * 2


def test_a_row_after_a_whole_takes_a_part_of_it() -> None:
    plan = {"mlp.up": "replicated", "mlp.down": "rowwise"}
    for rank in check(block(Builder()), 2, plan=plan):
        assert weights_of(rank) == [(8, 6), (6, 4)]
        assert reductions(rank) == 1


def test_a_column_that_something_needs_whole_is_gathered() -> None:
    build = Builder()
    h = linear(build, build.input("x", 3, 6), "pre", 8, 6)
    gm = build.done(build.call(NORM, h, build.weight("norm.weight", 8), 1e-6))
    for rank in check(gm, 2, plan={"pre": "colwise"}):
        assert weights_of(rank) == [(4, 6)]
        assert gathers(rank) == 1


def test_the_plan_of_a_library_is_what_data_flow_finds() -> None:
    plan = {"layers.*.mlp.up": "colwise", "layers.*.mlp.down": "rowwise", "norm": "sequence_parallel"}
    for rank in check(block(Builder()), 2, plan=plan):
        assert weights_of(rank) == [(4, 6), (6, 4)]


def test_a_plan_that_contradicts_itself() -> None:
    gm = block(Builder())
    before = g.fingerprint(gm.graph)
    plan = {"layers.*.mlp.down": "rowwise", "layers.0.mlp.down": "colwise"}
    with pytest.raises(
        ShardError, match=r"layers\.0\.mlp\.down: the plan contradicts itself: 'layers\.\*\.mlp"
    ):
        Shard(2, plan=plan).run(gm, Context())
    assert g.fingerprint(gm.graph) == before


def test_a_plan_for_tied_weights_that_contradicts_itself() -> None:
    build = Builder()
    table = build.weight("embed.weight", 12, 6, tied=("head.weight",))
    h = build.call(aten.embedding.default, table, build.input("ids", 3, dtype=torch.int64), path="embed")
    gm = build.done(build.call(LINEAR, h, table, None, path="head"))
    with pytest.raises(
        ShardError, match=r"the plan contradicts itself: 'embed' wants embed.weight replicated"
    ):
        Shard(2, plan={"embed": "replicated", "head": "colwise"}).run(gm, Context())


def test_a_plan_that_names_nothing_is_told() -> None:
    from graphopt.observe import Warned

    heard: list[object] = []

    class Listener:
        def on_event(self, event: object) -> None:
            heard.append(event)

    Shard(2, plan={"layers.*.attention": "colwise"}).run(block(Builder()), Context(observers=(Listener(),)))
    assert [e.message for e in heard if isinstance(e, Warned)] == [
        "shard: the plan's 'layers.*.attention' is the name of no weight of this graph"
    ]


def test_a_style_that_does_not_exist() -> None:
    with pytest.raises(ShardError, match=r"plan: 'q_proj' is 'columnwise'; known are colwise, "):
        Shard(2, plan={"q_proj": "columnwise"})


# ------------------------------------------------------------------------------------------------ the hash


def test_ranks_have_one_plan_hash_and_other_plans_another() -> None:
    hashes = [rank.meta[PLAN_HASH] for rank in shared(block(Builder()), 4)]
    assert len(set(hashes)) == 1
    others = [
        shared(block(Builder()), 2)[0].meta[PLAN_HASH],
        shared(block(Builder()), 4, plan={"mlp.up": "replicated", "mlp.down": "replicated"})[0].meta[
            PLAN_HASH
        ],
        shared(block(Builder()), 4, axis="model")[0].meta[PLAN_HASH],
    ]
    assert len({*hashes, *others}) == 4


def test_a_denied_linear_stays_whole() -> None:
    from graphopt.passes.shard import identify

    gm = block(Builder())
    up = calls(gm, LINEAR)[0]
    Shard(2).run(gm, Context(deny=frozenset({identify(up)})))
    assert weights_of(gm) == [(8, 6), (6, 8)]


def test_one_rank_changes_nothing() -> None:
    gm = block(Builder())
    before = g.fingerprint(gm.graph)
    Shard().run(gm, Context())
    assert g.fingerprint(gm.graph) == before


def test_uneven_pieces_are_named_with_their_number() -> None:
    """48 features divide by 3; 4 heads of 12 do not, and it is heads that ranks share."""
    build = Builder()
    x = build.input("x", 2, 48)
    y = build.call(ops.linear.overload, x, build.weight("up.weight", 48, 48), None)
    heads = build.call(aten.reshape.default, y, [2, 4, 12])
    normed = build.call(ops.rms_norm.overload, heads, build.weight("norm.weight", 12), 1e-6)
    flat = build.call(aten.reshape.default, normed, [2, 48])
    gm = build.done(build.call(ops.linear.overload, flat, build.weight("down.weight", 48, 48), None))
    with pytest.raises(ShardError, match=r"has 4 pieces .*48 input features, which 3 ranks .* divides 4"):
        shared(gm, 3)


def test_the_hash_is_that_of_the_graph_not_of_its_names() -> None:
    """Names count up in a process: the second trace of a program has others."""

    def drawn(rows: int) -> fx.GraphModule:
        build = Builder()
        x = build.input("x", 2, 6)
        up = build.call(ops.linear.overload, x, build.weight("up.weight", rows, 6), None)
        act = build.call(aten.relu.default, up)
        return build.done(build.call(ops.linear.overload, act, build.weight("down.weight", 6, rows), None))

    def digest(gm: fx.GraphModule) -> object:
        return shared(gm, 2)[0].meta[PLAN_HASH]

    one, two = drawn(8), drawn(8)
    for node in two.graph.nodes:
        if node.op == "call_function":
            node._rename(f"{node.name}_a_much_longer_name_{17}")
    assert digest(one) == digest(two) != digest(drawn(12))
