"""The whole pass on a small decoder: results, calls, weights, caches, strides, and code that can be read."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence

import pytest
import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.accuracy import judge
from graphopt.kernels import attention, cache, layer_norm, linear, mlp, rms_norm, rope
from graphopt.lowering.module import Lower, Lowered, keep_output_strides, with_layout
from graphopt.observe import KernelChosen
from graphopt.passes.merge import Merge
from graphopt.pipeline import Context, Pipeline
from graphopt.weights import WeightStore
from tests.graphs import Builder, calls
from tests.listening import Listener
from tests.tolerances import close

aten = torch.ops.aten
ROOM = (rms_norm, layer_norm, rope, attention, linear, mlp, cache)
KERNELS = tuple(kernel for file in ROOM for kernel in file.KERNELS)
HEADS, KV_HEADS, DIM, WIDTH, LENGTH = 4, 2, 8, 24, 12


def layers(count: int = 2, dtype: torch.dtype = torch.float32, queries: int = 1) -> fx.GraphModule:
    """A decoder with a static cache: norm, QKV, rope, cache, attention, norm, gated MLP."""
    build = Builder()
    x = build.input("x", 2, queries, WIDTH, dtype=dtype)
    cos, sin = (build.input(n, 1, queries, DIM, dtype=dtype) for n in ("cos", "sin"))
    position = build.input("position", queries, dtype=torch.int64)
    past = build.input("past", dtype=torch.int64)
    padding = build.input("padding", 2, LENGTH, dtype=torch.int64)
    written = []
    for i in range(count):

        def weight(name: str, *shape: int, i: int = i) -> fx.Node:
            return build.weight(f"layers.{i}.{name}", *shape, dtype=dtype)

        attn, ffn = f"layers.{i}.attn", f"layers.{i}.mlp"
        h = build.call(
            ops.rms_norm.overload, x, weight("norm1", WIDTH), 1e-6, 1.0, False, path=f"layers.{i}.norm1"
        )
        heads = []
        for name, n in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            y = build.call(ops.linear.overload, h, weight(name, n * DIM, WIDTH), None, path=f"{attn}.{name}")
            y = build.call(aten.reshape.default, y, [2, queries, n, DIM], path=attn)
            heads.append(build.call(aten.permute.default, y, [0, 2, 1, 3], path=attn))
        turned = build.call(ops.rope.overload, heads[0], heads[1], cos, sin, DIM, False, path=attn)
        q, k = (build.call(operator.getitem, turned, j) for j in (0, 1))
        updated = []
        for name, new in (("keys", k), ("values", heads[2])):
            buffer = build.input(f"{name}{i}", 2, KV_HEADS, LENGTH, DIM, dtype=dtype)
            updated.append(build.call(ops.cache_update.overload, buffer, new, position, path=attn))
            written.append((buffer, updated[-1]))
        mask = (True, 0, past, None, padding)
        y = build.call(ops.attention.overload, q, *updated, DIM**-0.5, *mask, path=attn)
        y = build.call(
            aten.reshape.default, build.call(aten.permute.default, y, [0, 2, 1, 3]), [2, queries, HEADS * DIM]
        )
        y = build.call(ops.linear.overload, y, weight("o", WIDTH, HEADS * DIM), None, path=f"{attn}.o")
        pair = build.call(
            ops.add_rms_norm.overload,
            y,
            x,
            weight("norm2", WIDTH),
            1e-6,
            1.0,
            False,
            path=f"layers.{i}.norm2",
        )
        h, x = (build.call(operator.getitem, pair, j) for j in (0, 1))
        gate, up = (
            build.call(ops.linear.overload, h, weight(name, 40, WIDTH), None, path=f"{ffn}.{name}")
            for name in ("gate", "up")
        )
        y = build.call(ops.gated_activation.overload, gate, up, "silu", path=ffn)
        y = build.call(ops.linear.overload, y, weight("down", WIDTH, 40), None, path=f"{ffn}.down")
        x = build.call(aten.add.Tensor, x, y, alpha=1)
    for buffer, value in written:
        build.call(aten.copy_.default, buffer, value, False)
    gm = build.done(x)
    gm.meta["output_strides"] = ((0, 1, 2),)
    return gm


def values(gm: fx.GraphModule, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    made = []
    for node in g.placeholders(gm.graph):
        shape, dtype = g.shape(node), g.dtype(node)
        if node.name == "past":
            made.append(torch.tensor(3))
        elif node.name == "position":
            made.append(torch.arange(3, 3 + shape[0]))  # type: ignore[arg-type]  # an int
        elif node.name == "padding":
            made.append(torch.tensor([[0, 0] + [1] * (LENGTH - 2), [1] * LENGTH]))
        else:
            made.append((torch.randn(shape) * (0.3 if g.is_weight(node) else 1.0)).to(dtype))  # type: ignore[arg-type]  # ints
    return made


def raised(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x.double() if x.is_floating_point() else x for x in outputs]


def lowered(gm: fx.GraphModule, merge: bool = True, **context: object) -> tuple[Lowered, Context]:
    ctx = Context(kernels=KERNELS, **context)  # type: ignore[arg-type]  # fields of Context
    if merge:
        Merge().run(gm, ctx)
    Lower().run(gm, ctx)
    gm.graph.lint()
    assert isinstance(ctx.run, Lowered)
    return ctx.run, ctx


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_and_caches_are_those_of_the_graph_before(queries: int, dtype: torch.dtype) -> None:
    inputs = values(layers(dtype=dtype, queries=queries))
    before, ours = [x.clone() for x in inputs], [x.clone() for x in inputs]
    expected = layers(dtype=dtype, queries=queries)(*before)
    run, _ = lowered(layers(dtype=dtype, queries=queries))
    found = run(*ours)
    exact = [x.double() if x.is_floating_point() else x.clone() for x in inputs]
    oracle = layers(dtype=torch.float64, queries=queries)(*exact)
    for name, one, two, three in (("output", oracle, expected, found), ("inputs", exact, before, ours)):
        verdict = judge(raised(one), two, three, dtype)
        assert verdict.ok, f"{name} {verdict.reason}"
    assert torch.equal(run.gm(*(x.clone() for x in inputs))[0], run(*(x.clone() for x in inputs))[0])  # type: ignore[index]


def test_what_a_decode_layer_calls() -> None:
    one, _ = lowered(layers(1))
    two, _ = lowered(layers(2))
    assert two.calls() - one.calls() == 25, two.code
    assert len(calls(one.gm, torch.where)) == len(calls(two.gm, torch.where)) == 1, "one mask for all layers"
    assert len(calls(two.gm, torch.Tensor.index_copy_)) == 4 and not calls(two.gm, torch.Tensor.copy_)
    assert not any(isinstance(n.target, torch._ops.OpOverload) for n in two.gm.graph.nodes), (
        "all through bindings"
    )


def test_merging_saves_calls() -> None:
    merged, _ = lowered(layers(1))
    plain, _ = lowered(layers(1), merge=False)
    assert len(calls(plain.gm, linear.KERNELS[0].launch)) == 7
    assert len(calls(merged.gm, linear.KERNELS[0].launch)) == 4


def test_weights_are_prepared_once_and_changes_show() -> None:
    gm = layers(1)
    inputs = values(gm)
    names = [n.name for n in g.placeholders(gm.graph)]
    plain = layers(1)
    run, ctx = lowered(gm)

    def check() -> None:
        given = zip(inputs, g.placeholders(gm.graph), strict=True)
        found = run(*(x if g.is_weight(n) else x.clone() for x, n in given))
        for ours, theirs in zip(found, plain(*(x.clone() for x in inputs)), strict=True):
            close(ours, theirs, torch.float32)

    check()
    check()
    assert ctx.store.prepared == 4, "Q K V, gate and up, and two shifted norm weights"
    inputs[names.index("layers_0_k")].mul_(2)
    check()
    inputs[names.index("layers_0_norm1")] = torch.zeros(WIDTH)
    check()
    assert ctx.store.prepared == 6


def test_two_graphs_of_a_model_share_a_store() -> None:
    store = WeightStore()
    inputs = values(layers(1))
    decode, prefill = (lowered(layers(1, queries=n), store=store)[0] for n in (1, 5))
    more = values(layers(1, queries=5))
    weights = [g.is_weight(n) for n in g.placeholders(layers(1).graph)]
    decode(*(x if w else x.clone() for x, w in zip(inputs, weights, strict=True)))
    prefill(*(x if w else y for x, y, w in zip(inputs, more, weights, strict=True)))
    assert store.prepared == 4


def test_every_choice_is_told_and_no_reference_is_left() -> None:
    listener = Listener()
    lowered(layers(1), observers=(listener,))
    chosen = [e for e in listener.events if isinstance(e, KernelChosen)]
    assert len(chosen) == 9, (
        "two norms, four linears, rope, attention, activation; the caches are written in place"
    )
    assert all(e.kernel != "reference" for e in chosen)


def test_code_reads_and_names_where_each_line_comes_from() -> None:
    run, _ = lowered(layers(1))
    code = run.code
    assert "merge_siblings" in code and "layers.0.mlp.down" in code and "index_copy_" in code
    assert sum("prepared_weights" in line for line in code.splitlines()) == 1
    assert repr(run) == f"Lowered({run.calls()} calls)"


def test_a_graph_with_nothing_to_do() -> None:
    build = Builder()
    x = build.input("x", 2, 3)
    gm = build.done(x, build.call(aten.neg.default, x))
    run, _ = lowered(gm)
    value = torch.randn(2, 3)
    same, negative = run(value)  # type: ignore[misc]  # a tuple
    assert same is value and torch.equal(negative, -value) and run.calls() == 1


def test_a_lowered_graph_can_be_copied() -> None:
    run, _ = lowered(layers(1))
    inputs = values(layers(1))
    twin = copy.deepcopy(run.gm)
    close(twin(*(x.clone() for x in inputs))[0], run(*(x.clone() for x in inputs))[0], torch.float32)  # type: ignore[index]


def test_the_pass_in_a_pipeline() -> None:
    assert Lower() == Lower() and hash(Lower("cpu")) != hash(Lower())
    assert Pipeline.__dataclass_fields__ and Lower.exactness == "reordered"


# ------------------------------------------------------------------------------------------------ strides


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)])
def test_with_layout_stores_dimensions_in_the_order_asked_for(order: tuple[int, ...]) -> None:
    for x in (
        torch.randn(2, 3, 4),
        torch.randn(4, 3, 2).permute(2, 1, 0),
        torch.randn(2, 1, 4),
        torch.randn(2, 0, 4),
    ):
        y = with_layout(x, order)
        assert torch.equal(x, y) and y.permute(order).is_contiguous()
        assert with_layout(y, order) is y


def test_outputs_get_eagers_strides() -> None:
    build = Builder()
    x = build.input("x", 2, 3, 4)
    turned = build.call(aten.permute.default, x, [0, 2, 1])
    y = build.call(aten.neg.default, turned)
    row = build.call(aten.sum.dim_IntList, x, [-1, -2])
    gm = build.done(x, y, y, turned, row)
    gm.meta["output_strides"] = ((0, 1, 2), (0, 1, 2), None, (0, 2, 1), (0,))
    assert keep_output_strides(gm) == 2
    gm.recompile()
    value = torch.randn(2, 3, 4)
    same, one, _, view, _ = gm(value)
    assert same is value and one.is_contiguous() and view.data_ptr() == value.data_ptr()


def test_without_recorded_strides_outputs_stay() -> None:
    build = Builder()
    gm = build.done(build.call(aten.neg.default, build.input("x", 2, 3)))
    assert keep_output_strides(gm) == 0
