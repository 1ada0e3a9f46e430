"""What cannot be shared, plans that are given, and the hash by which ranks agree."""

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
from tests.sharding.drawing import check, gathers, reductions, shared
from tests.sharding.drawn import LINEAR, NORM, attention_of, grouped, heads, linear, mlp, weights_of

aten = torch.ops.aten


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
    gm = grouped(12, 3, 2)
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
