"""What depends on weights alone is cut out, once and whole; what must be new at each call stays."""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.lowering.fold import cuts, fold, shift_norm_weights
from graphopt.weights import PreparePlan, WeightStore, prepared_weights
from tests.graphs import Builder, calls

aten = torch.ops.aten
RMS = ops.rms_norm.overload
LINEAR = ops.linear.overload


def merged(store: WeightStore, layers: int = 1) -> fx.GraphModule:
    """linear(x, cat([w1, w2])), once a layer."""
    build = Builder()
    x = build.input("x", 3, 8)
    for i in range(layers):
        w1, w2 = build.weight(f"layers.{i}.a", 4, 8), build.weight(f"layers.{i}.b", 4, 8)
        x = build.call(LINEAR, x, build.call(aten.cat.default, [w1, w2], 0), None)
    gm = build.done(x)
    fold(gm, store)
    gm.recompile()
    return gm


def plans(gm: fx.GraphModule) -> list[PreparePlan]:
    return [n.meta["prepared"] for n in gm.graph.nodes if "prepared" in n.meta]


def test_a_merged_weight_is_prepared_once() -> None:
    store = WeightStore()
    gm = merged(store)
    x, w1, w2 = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4, 8)
    for _ in range(3):
        torch.testing.assert_close(gm(x, w1, w2)[0], x @ torch.cat([w1, w2]).T)
    assert store.prepared == 1 and not calls(gm, aten.cat.default)
    (plan,) = plans(gm)
    assert plan.sources == (1, 2) and plan.names == ("layers.0.a", "layers.0.b")
    w1.zero_()
    torch.testing.assert_close(gm(x, w1, w2)[0], x @ torch.cat([w1, w2]).T)
    assert store.prepared == 2


def test_equal_layers_share_a_plan_and_not_a_weight() -> None:
    store = WeightStore()
    gm = merged(store, layers=3)
    found = plans(gm)
    assert len({p.hash for p in found}) == 1 and len({p.gm for p in found}) == 1
    assert [p.sources for p in found] == [(1, 2), (3, 4), (5, 6)]
    assert len(calls(gm, prepared_weights)) == 1
    tensors = [torch.randn(4, 8) for _ in range(6)]
    gm(torch.randn(3, 8), *tensors)
    assert store.prepared == 3


def test_prefill_and_decode_share_prepared_weights() -> None:
    store = WeightStore()
    one, two = merged(store), merged(store)
    tensors = torch.randn(4, 8), torch.randn(4, 8)
    one(torch.randn(3, 8), *tensors)
    two(torch.randn(3, 8), *tensors)
    assert store.prepared == 1


def test_bare_weights_are_read_directly() -> None:
    build = Builder()
    gm = build.done(build.call(LINEAR, build.input("x", 3, 8), build.weight("w", 4, 8), None))
    assert fold(gm, WeightStore()) == () and not calls(gm, prepared_weights)


def test_the_largest_value_is_cut_and_views_are_kept_as_views() -> None:
    build = Builder()
    x, w = build.input("x", 3, 8), build.weight("w", 8, 4)
    half = build.call(aten.to.dtype, w, torch.float64, False, False, None)
    turned = build.call(aten.permute.default, half, [1, 0])
    view = build.call(aten.permute.default, w, [1, 0])
    gm = build.done(
        build.call(LINEAR, x, view, None),
        build.call(aten.mul.Tensor, turned, build.call(aten.sum.default, x)),
    )
    assert cuts(gm.graph) == [turned, view]
    store = WeightStore()
    fold(gm, store)
    gm.recompile()
    a, b = torch.randn(3, 8), torch.randn(8, 4)
    first, second = gm(a, b)
    torch.testing.assert_close(first, a @ b)
    torch.testing.assert_close(second, b.double().T * a.sum())
    assert store.prepared == 2 and store.bytes == 8 * 4 * 8, "the permuted weight is a view and costs nothing"


def test_constants_are_part_of_a_plan_and_of_its_hash() -> None:
    hashes = []
    for value in (1.0, 2.0):
        build = Builder()
        x, w = build.input("x", 4), build.weight("w", 4)
        constant = build.constant("constant", torch.full((4,), value))
        gm = build.done(build.call(aten.mul.Tensor, x, build.call(aten.add.Tensor, w, constant)))
        (plan,) = fold(gm, WeightStore())
        gm.recompile()
        torch.testing.assert_close(gm(torch.ones(4), torch.ones(4))[0], torch.full((4,), 1 + value))
        hashes.append(plan.hash)
    assert hashes[0] != hashes[1]


def test_literals_are_part_of_the_hash() -> None:
    hashes = set()
    for literal in (1.0, 2.0):
        build = Builder()
        x, w = build.input("x", 4), build.weight("w", 4)
        (plan,) = fold(
            build.done(build.call(aten.mul.Tensor, x, build.call(aten.add.Tensor, w, literal))), WeightStore()
        )
        hashes.add(plan.hash)
    assert len(hashes) == 2


def test_what_is_returned_or_written_stays_in_the_graph() -> None:
    build = Builder()
    x, w = build.input("x", 4), build.weight("w", 4)
    doubled = build.call(aten.mul.Tensor, w, 2.0)
    view = build.call(aten.reshape.default, doubled, [2, 2])
    written = build.call(aten.mul.Tensor, w, 3.0)
    build.call(aten.add_.Tensor, written, x)
    gm = build.done(build.call(aten.add.Tensor, x, doubled), view, build.call(aten.neg.default, written))
    assert cuts(gm.graph) == []


def test_sizes_of_weights_and_random_values_stay() -> None:
    build = Builder()
    x, w = build.input("x", 4), build.weight("w", 4)
    noise = build.call(aten.rand_like.default, w)
    size = build.call(aten.sym_size.int, w, 0)
    gm = build.done(build.call(aten.mul.Tensor, x, noise), build.call(aten.mul.Tensor, x, size))
    assert cuts(gm.graph) == []


def test_a_shifted_norm_weight_is_prepared() -> None:
    for cast_before, dtype in ((False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float32)):
        build = Builder()
        x, w = build.input("x", 3, 8, dtype=dtype), build.weight("w", 8, dtype=dtype)
        gm = build.done(build.call(RMS, x, w, 1e-6, 1.0, cast_before))
        values = torch.randn(3, 8).to(dtype), torch.randn(8).to(dtype)
        (expected,) = gm(*values)
        assert shift_norm_weights(gm.graph) == 1
        gm.recompile()
        assert torch.equal(gm(*values)[0], expected)
        store = WeightStore()
        fold(gm, store)
        gm.recompile()
        assert torch.equal(gm(*values)[0], expected) and store.prepared == 1
        (node,) = calls(gm, RMS)
        assert g.arg(node, "weight_offset") == 0.0 and node.args[1].target is operator.getitem  # type: ignore[union-attr]  # a node


def test_a_norm_weight_that_is_no_weight_is_left_alone() -> None:
    build = Builder()
    x, w = build.input("x", 3, 8), build.input("w", 8)
    gm = build.done(build.call(RMS, x, w, 1e-6, 1.0, False))
    assert shift_norm_weights(gm.graph) == 0
