"""Linears read int8 weights; routers, small linears and what is named stay, and say why."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.errors import OptionError, PipelineError, WeightError
from graphopt.flops import flops
from graphopt.lowering.fold import fold
from graphopt.observe import Matched
from graphopt.ops.quantized import dequantized
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.merge import Merge
from graphopt.passes.quantize import LINEAR, Quantize, named
from graphopt.passes.recognise import Recognise
from graphopt.pipeline import Context, Pipeline
from graphopt.weights import Prepared, WeightStore
from tests.graphs import Builder, calls, values
from tests.listening import Listener
from tests.tolerances import close

aten = torch.ops.aten
INT8, PACK, SCALES = ops.linear_int8.overload, ops.pack_int8.overload, ops.scales_int8.overload


def linears(*sizes: tuple[int, int], bias: bool = False, path: str = "layers.{i}.mlp.up") -> fx.GraphModule:
    """neg(linear(x_i, w_i, b_i)) for each [N, K]."""
    build = Builder()
    outs = []
    for i, (n, k) in enumerate(sizes):
        x, at = build.input(f"x{i}", 2, 3, k), path.format(i=i)
        w = build.weight(f"{at}.weight", n, k)
        b = build.weight(f"{at}.bias", n) if bias else None
        outs.append(build.call(aten.neg.default, build.call(LINEAR, x, w, b, path=at)))
    return build.done(*outs)


def quantized(
    gm: fx.GraphModule, options: Quantize | None = None, **context: object
) -> tuple[fx.GraphModule, Listener]:
    """Run the pass; abstract values must be what they were."""
    listener = Listener()
    before = [(g.shape(n), g.dtype(n)) for n in g.flat_arguments(g.output_node(gm.graph))]  # type: ignore[arg-type]  # nodes
    (options or Quantize()).run(gm, Context(observers=(listener,), **context))  # type: ignore[arg-type]  # fields of Context
    gm.graph.lint()
    after = [(g.shape(n), g.dtype(n)) for n in g.flat_arguments(g.output_node(gm.graph))]  # type: ignore[arg-type]  # nodes
    assert before == after
    return gm, listener


def kept(weight: torch.Tensor, group: int = 64) -> torch.Tensor:
    scales = ops.scales_int8(weight, group)
    return dequantized(ops.pack_int8(weight, scales), scales).to(weight.dtype)


# ---------------------------------------------------------------------------------------------- what happens


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("size", "group"), [((64, 64), 64), ((65, 192), 64), ((70, 123), 3), ((1, 4096), 4096)]
)
def test_a_linear_reads_int8(size: tuple[int, int], group: int, bias: bool) -> None:
    gm, listener = quantized(linears(size, bias=bias), Quantize(group=group))
    (linear,), (pack,), (scales,) = calls(gm, INT8), calls(gm, PACK), calls(gm, SCALES)
    assert linear.args[1:3] == (pack, scales) and g.shape(scales) == (size[0], size[1] // group)
    assert not calls(gm, LINEAR) and not listener.reasons
    (event,) = listener.events
    assert isinstance(event, Matched)
    match = event.match
    assert match.id.startswith("int8_linear@layers.0.mlp.up#") and match.module_path == "layers.0.mlp.up"
    assert set(match.new_nodes) == {n.name for n in (linear, pack, scales)}
    origin = g.origin(linear)
    assert origin is not None and origin.match == match.id and origin.replaced == match.nodes
    x, w, *b = values(gm)
    y = torch.nn.functional.linear(x, kept(w, group), b[0] if b else None)
    close(gm(x, w, *b)[0], -y, torch.float32)


def test_int8_weights_are_prepared_once_and_are_small() -> None:
    gm, _ = quantized(linears((64, 128), (96, 64), bias=True))
    store, inputs = WeightStore(), values(gm)
    expected = gm(*inputs)
    fold(gm, store)
    gm.recompile()
    for _ in range(2):
        for one, two in zip(gm(*inputs), expected, strict=True):
            assert torch.equal(one, two)
    assert store.prepared == 4 and not calls(gm, PACK, SCALES)
    assert [flops(n) for n in calls(gm, INT8)] == [2 * 6 * 64 * 128, 2 * 6 * 96 * 64]
    assert store.bytes <= 0.28 * 4 * (64 * 128 + 96 * 64)


def test_merged_linears_pack_their_parts() -> None:
    build = Builder()
    x = build.input("x", 2, 128)
    outs = [
        build.call(LINEAR, x, build.weight(f"a.{name}.weight", n, 128), None, path=f"a.{name}")
        for name, n in (("q", 128), ("k", 64), ("v", 64))
    ]
    gm = build.done(*outs)
    Merge().run(gm, Context())
    gm, _ = quantized(gm)
    (linear,) = calls(gm, INT8)
    assert g.shape(linear) == (2, 256) and len(calls(gm, PACK)) == 3
    assert all(g.is_weight(n.args[0]) for n in calls(gm, PACK)), "no concatenation in fp32"
    x_value, *weights = values(gm)
    expected = [x_value @ kept(w).T for w in weights]
    store = WeightStore()
    for _ in range(2):
        for one, two in zip(gm(x_value, *weights), expected, strict=True):
            close(one, two, torch.float32)
        if not store.prepared:
            fold(gm, store)
            gm.recompile()
    assert store.prepared == 2


def test_slices_transposes_and_casts_of_weights_are_quantized() -> None:
    build = Builder()
    x = build.input("x", 2, 64)
    w, conv = build.weight("w", 128, 128), build.weight("conv", 64, 96)
    half = build.weight("half", 64, 64, dtype=torch.bfloat16)
    part = build.call(aten.slice.Tensor, build.call(aten.slice.Tensor, w, 0, 64, 128, 1), 1, 0, 64, 1)
    turned = build.call(aten.permute.default, conv, [1, 0])
    widened = cast(build, half, torch.float32)
    gm, listener = quantized(build.done(*(build.call(LINEAR, x, v, None) for v in (part, turned, widened))))
    assert len(calls(gm, INT8)) == 3 and len(listener.ids) == 3
    v = values(gm)
    for out, weight in zip(gm(*v), (v[1][64:, :64], v[2].T, v[3]), strict=True):
        scales = ops.scales_int8(weight, 64)
        close(out, v[0] @ dequantized(ops.pack_int8(weight, scales), scales).T, torch.float32)
    assert [g.dtype(n) for n in calls(gm, SCALES)] == [torch.float32, torch.float32, torch.bfloat16]


def cast(build: Builder, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    return build.call(aten.to.dtype, x, dtype, False, False, None)


def prepared_plans(cast_to: torch.dtype | None, merged: bool) -> list[str]:
    """Hashes of what two linears prepare, as they are and as autocast traces them."""
    build = Builder()
    dtype = cast_to or torch.float32
    x = build.input("x", 2, 64, dtype=dtype)
    weights = [build.weight(f"{name}.weight", 64, 64) for name in "qk"]
    if cast_to is not None:
        weights = [cast(build, w, cast_to) for w in weights]
    gm = build.done(*(build.call(LINEAR, x, w, None) for w in weights))
    if merged:
        Merge().run(gm, Context())
    gm, _ = quantized(gm)
    assert len(calls(gm, INT8)) == 2 - merged
    fold(gm, WeightStore())
    (prepared,) = (m for m in gm.modules() if isinstance(m, Prepared))
    return sorted(plan.hash for plan in prepared.plans)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_form_serves_a_weight_and_its_casts(dtype: torch.dtype, merged: bool) -> None:
    assert prepared_plans(dtype, merged) == prepared_plans(None, merged)


def test_what_is_packed_stands_under_the_casts() -> None:
    build = Builder()
    x = build.input("x", 2, 64, dtype=torch.bfloat16)
    w, wide = build.weight("w", 64, 96), build.weight("wide", 64, 64, dtype=torch.float64)
    turned = build.call(aten.permute.default, cast(build, w, torch.bfloat16), [1, 0])
    part = build.call(aten.slice.Tensor, turned, 0, 0, 64, 1)
    beside = build.call(aten.cat.default, [part, cast(build, wide, torch.bfloat16)], 0)
    twice = cast(build, cast(build, wide, torch.float32), torch.bfloat16)
    gm, _ = quantized(build.done(*(build.call(LINEAR, x, v, None) for v in (part, beside, twice))))
    gm.graph.eliminate_dead_code()
    assert not calls(gm, aten.to.dtype)
    x_value, *v = values(gm)
    w64 = v[1].double()
    for out, weight in zip(gm(x_value, *v), (v[0].T[:64], torch.cat([v[0].T[:64], w64]), w64), strict=True):
        close(out, x_value.double() @ kept(weight.double()).T, torch.bfloat16)


def test_casts_of_what_has_no_int8_form_stay() -> None:
    build = Builder()
    x = build.input("x", 2, 64)
    sources = [
        build.weight("fp8", 64, 64, dtype=torch.float8_e4m3fn),
        build.weight("whole", 64, 64, dtype=torch.int32),
    ]
    gm, _ = quantized(
        build.done(*(build.call(LINEAR, x, cast(build, w, torch.float32), None) for w in sources))
    )
    assert len(calls(gm, INT8)) == len(calls(gm, aten.to.dtype)) == 2
    v = values(gm)
    for out, weight in zip(gm(*v), v[1:], strict=True):
        close(out, v[0] @ kept(weight.float()).T, torch.float32)


def test_a_tied_head_is_quantized_and_the_table_stays() -> None:
    build = Builder()
    table = build.weight("embed.weight", 128, 64, tied=("lm_head.weight",))
    rows = build.call(aten.embedding.default, table, build.input("ids", 2, dtype=torch.int64))
    gm, _ = quantized(build.done(build.call(LINEAR, rows, table, None, path="lm_head")))
    (embedding,) = calls(gm, aten.embedding.default)
    assert embedding.args[0] is table and calls(gm, PACK)[0].args[0] is table


def test_a_weight_that_two_linears_read_is_packed_once() -> None:
    build = Builder()
    x, w = build.input("x", 2, 64), build.weight("w", 64, 64)
    once = build.call(LINEAR, x, w, None)
    gm, listener = quantized(build.done(build.call(LINEAR, once, w, None)))
    assert len(calls(gm, PACK)) == 1 and len(calls(gm, INT8)) == 2 and len(set(listener.ids)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    build = Builder()
    x, w = build.input("x", 2, 64, dtype=dtype), build.weight("w", 64, 64, dtype=dtype)
    gm, _ = quantized(build.done(build.call(LINEAR, x, w, None)))
    assert g.dtype(calls(gm, SCALES)[0]) == g.dtype(calls(gm, INT8)[0]) == dtype
    x_value, w_value = values(gm)
    scales = ops.scales_int8(w_value, 64)
    expected = x_value.double() @ dequantized(ops.pack_int8(w_value, scales), scales).double().T
    close(gm(x_value, w_value)[0], expected, dtype)


def test_symbolic_sizes_of_x() -> None:
    build = Builder()
    s = build.size("s", 5)
    gm, _ = quantized(
        build.done(build.call(LINEAR, build.input("x", 2, s, 64), build.weight("w", 64, 64), None))
    )
    x, w = torch.randn(2, 7, 64), torch.randn(64, 64)
    close(gm(7, x, w)[0], x @ kept(w).T, torch.float32)


# -------------------------------------------------------------------------------------------- what is kept


def test_linears_of_few_weights_are_kept() -> None:
    gm, listener = quantized(linears((63, 64), (64, 64)))
    assert len(calls(gm, INT8)) == 1 and listener.reasons == ["4032 weights < 4096"]
    gm, _ = quantized(linears((63, 64), (1, 64)), Quantize(least=1))
    assert len(calls(gm, INT8)) == 2


def test_weights_that_are_computed_or_no_numbers_are_refused() -> None:
    build = Builder()
    x, y = build.input("x", 2, 64), build.input("y", 64, 64)
    gm, listener = quantized(build.done(build.call(LINEAR, x, build.call(aten.neg.default, y), None)))
    assert listener.reasons == ["weight neg_default does not depend on weights alone"]
    assert not calls(gm, INT8)


def test_what_depends_on_weights_alone_is_left_to_fold() -> None:
    build = Builder()
    w, v = build.weight("w", 64, 64), build.weight("v", 64, 64)
    gm, listener = quantized(build.done(build.call(LINEAR, w, v, None)))
    assert not calls(gm, INT8) and not listener.events


def test_a_graph_without_linears_is_left_alone() -> None:
    build = Builder()
    gm = build.done(build.call(aten.neg.default, build.input("x", 2)))
    before = g.fingerprint(gm.graph)
    gm, listener = quantized(gm, Quantize(exclude=("lm_head",)))
    assert g.fingerprint(gm.graph) == before and not listener.events


# ------------------------------------------------------------------------------------------------- names

PATH = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("pattern", "means"),
    [
        ("model.layers.0.mlp.down_proj.weight", True),
        ("model.layers.0.mlp.down_proj", True),
        ("down_proj", True),
        ("mlp.down_proj", True),
        ("*.down_proj", True),
        ("layers.0", True),
        ("layers.*.mlp", True),
        ("*down*", True),
        ("layers.[12]", False),
        ("layers.00", False),
        ("own_proj", False),
        ("down", False),
        ("layers.0.attn", False),
        ("DOWN_PROJ", False),
        ("", False),
    ],
)
def test_a_pattern_means_names_from_any_dot_on(pattern: str, means: bool) -> None:
    assert named(PATH, pattern) is means
    relative = PATH.removeprefix("model.layers.0.")  # a layer that is compiled for itself
    assert named(relative, pattern) is (means and not pattern.startswith(("model", "layers")))


def test_excluded_linears_are_kept_and_say_by_what() -> None:
    gm, listener = quantized(linears((64, 64), (64, 64)), Quantize(exclude=("layers.1",)))
    assert len(calls(gm, INT8)) == 1
    assert listener.reasons == ["layers.1.mlp.up.weight is excluded by 'layers.1'"]
    assert not listener.warnings


def test_a_tied_weight_goes_by_all_its_names_and_a_merged_one_by_its_parts() -> None:
    build = Builder()
    x = build.input("x", 2, 64)
    tied = build.weight("embed.weight", 64, 64, tied=("head.weight",))
    parts = build.call(
        aten.cat.default, [build.weight("q.weight", 64, 64), build.weight("k.weight", 64, 64)], 0
    )
    gm = build.done(build.call(LINEAR, x, tied, None), build.call(LINEAR, x, parts, None))
    _, listener = quantized(gm, Quantize(exclude=("head", "k")))
    assert listener.reasons == ["head.weight is excluded by 'head'", "k.weight is excluded by 'k'"]


def test_a_pattern_that_means_nothing_warns() -> None:
    _, listener = quantized(linears((64, 64)), Quantize(exclude=("lm_heat",)))
    assert listener.warnings == [
        "quantize: 'lm_heat' excludes no linear of this graph; its names are "
        "layers.0.mlp.up, layers.0.mlp.up.weight"
    ]


# ------------------------------------------------------------------------------------------------ bad input


def test_a_group_that_does_not_divide_is_an_error_before_anything_is_changed() -> None:
    gm = linears((64, 128), (64, 96), (64, 80))
    before = g.fingerprint(gm.graph)
    with pytest.raises(OptionError) as caught:
        Quantize().run(gm, Context())
    assert str(caught.value) == (
        "quantize: group 64 does not divide the inputs of layers.1.mlp.up with 96 inputs (and 1 more); "
        "group 16 divides all of them; or exclude them: quantize_exclude=('layers.1.mlp.up', ...)"
    )
    assert g.fingerprint(gm.graph) == before
    Quantize(exclude=("layers.1", "layers.2")).run(gm, Context())
    assert len(calls(gm, INT8)) == 1
    with pytest.raises(
        OptionError, match=r"up with 123 inputs; exclude it: quantize_exclude=\('layers.0.mlp.up',\)$"
    ):
        Quantize().run(linears((64, 123)), Context())


def test_nan_is_an_error_that_names_the_weight() -> None:
    gm, _ = quantized(linears((64, 64), (64, 64)))
    fold(gm, WeightStore())
    gm.recompile()
    inputs = values(gm)
    inputs[-1][3, 3] = torch.nan
    with pytest.raises(
        WeightError, match=r"layers.1.mlp.up.weight \(64, 64\): .* row 3 of the weight has NaN"
    ):
        gm(*inputs)


def test_wrong_options_are_errors() -> None:
    with pytest.raises(OptionError, match="no kind 'int4'; known are 'int8'"):
        Quantize("int4")
    with pytest.raises(OptionError, match="group 0; it takes a whole number"):
        Quantize(group=0)
    with pytest.raises(OptionError, match=r"group 64\.0; it takes a whole number"):
        Quantize(group=64.0)  # type: ignore[arg-type]  # that is what is tested
    with pytest.raises(OptionError, match=r"'lm_head'; it takes a tuple of names, as \('lm_head',\)"):
        Quantize(exclude="lm_head")  # type: ignore[arg-type]  # that is what is tested


def test_the_contract() -> None:
    with pytest.raises(PipelineError, match=r"\(quantize\) needs recognised"):
        Pipeline((Quantize(),))
    pipeline = Pipeline((Canonicalize(), Recognise(), Merge(), Quantize("int8", group=64)))
    with pytest.raises(PipelineError, match="pass quantize is lossy, but the result has to be reordered"):
        pipeline.require("reordered")
    assert Quantize() == Quantize("int8", 64, ()) and hash(Quantize()) != hash(Quantize(group=32))


# ------------------------------------------------------------------------------------------- ids, deny, fuel


def test_denied_matches_and_fuel() -> None:
    _, listener = quantized(linears((64, 64), (64, 64)))
    first, second = listener.ids
    gm, denied = quantized(linears((64, 64), (64, 64)), deny=frozenset({first}))
    assert denied.ids == [second] and denied.reasons == ["denied"] and len(calls(gm, LINEAR)) == 1
    gm, listener = quantized(linears((64, 64), (64, 64)), fuel=1)
    assert listener.ids == [first] and listener.reasons == ["no fuel left"]
    context = Context(fuel=3)
    Quantize().run(linears((64, 64)), context)
    assert context.fuel == 2


def test_ids_are_stable_and_distinct() -> None:
    def shared() -> fx.GraphModule:
        """Two linears of one module, as where it is called twice."""
        build = Builder()
        x, w = build.input("x", 2, 64), build.weight("w", 64, 64)
        return build.done(*(build.call(LINEAR, x, w, None, path="layers.x") for _ in range(2)))

    def ids(**options: object) -> list[str]:
        return quantized(shared(), Quantize(**options))[1].ids  # type: ignore[arg-type]  # fields

    assert ids() == ids() and len(set(ids())) == 2
    assert set(ids()).isdisjoint(ids(group=32))
