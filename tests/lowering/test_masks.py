"""Every combination of mask arguments against the attention reference; masks are built once."""

from __future__ import annotations

import itertools
import operator

import pytest
import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.kernels import attention as kernels
from graphopt.lowering.masks import ATTENTION, lower_masks
from graphopt.lowering.select import select
from tests.graphs import Builder, calls
from tests.tolerances import FLOAT_BIAS, TOLERANCE, close

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM = 2, 4, 2, 5, 9, 8
SHAPES = {
    "q": (BATCH, HEADS, QUERIES, DIM),
    "k": (BATCH, KV_HEADS, KEYS, DIM),
    "v": (BATCH, KV_HEADS, KEYS, DIM),
}
EXTRA: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "offset_tensor": ((), torch.int64),
    "offset_vector": ((1,), torch.int32),
    "padding": ((BATCH, KEYS), torch.bool),
    "padding_int": ((BATCH, KEYS), torch.int64),
    "float_bias": ((1, HEADS, QUERIES, KEYS), torch.float32),
    "bool_bias": ((BATCH, 1, QUERIES, KEYS), torch.bool),
}
NAMES = g.argument_names(ATTENTION)


def attention_graph(dtype: torch.dtype = torch.float32, layers: int = 1, **mask: object) -> fx.GraphModule:
    """`layers` attentions on the same inputs; strings in `mask` name inputs."""
    build = Builder()
    q, k, v = (build.input(name, *shape, dtype=dtype) for name, shape in SHAPES.items())
    used = [x for x in EXTRA if x in mask.values()]
    extra: dict[object, fx.Node] = {x: build.input(x, *EXTRA[x][0], dtype=EXTRA[x][1]) for x in used}
    full = {k: extra[x] if isinstance(x, str) else x for k, x in mask.items()}
    defaults = {"causal": False, "offset": 0, "empty_rows_mean": False, **full}
    rest = [defaults.get(name) for name in NAMES[4:]]
    outs = [build.call(ATTENTION, q, k, v, 0.3, *rest, path=f"layers.{i}") for i in range(layers)]
    return build.done(*outs)


def example(gm: fx.GraphModule, seed: int = 0) -> list[torch.Tensor]:
    """Values for the placeholders; the first query of batch 0 sees no key under padding and causal."""
    torch.manual_seed(seed)
    values = []
    for node in g.placeholders(gm.graph):
        shape, dtype = g.shape(node), g.dtype(node)
        if node.name.startswith("offset"):
            values.append(torch.full(shape, 2, dtype=dtype))  # type: ignore[arg-type]  # ints
        elif node.name.startswith("padding"):
            keep = torch.ones(shape, dtype=torch.bool)  # type: ignore[arg-type]  # ints
            keep[0, :4] = False
            values.append(keep.to(dtype))
        elif dtype == torch.bool:
            keep = torch.rand(shape) < 0.6  # type: ignore[arg-type]  # ints
            keep[1, :, 2] = False
            values.append(keep)
        else:
            values.append(torch.randn(shape).to(dtype) * 2)  # type: ignore[arg-type]  # ints
    return values


COMBINATIONS = [
    dict(
        zip(
            ("causal", "offset", "offset_tensor", "window", "key_padding", "bias", "empty_rows_mean"),
            values,
            strict=True,
        )
    )
    for values in itertools.product(
        (False, True),
        (0, 3, KEYS - QUERIES),
        (None, "offset_tensor"),
        (None, 3, 20),
        (None, "padding"),
        (None, "float_bias", "bool_bias"),
        (False, True),
    )
]


def same_as_before(gm: fx.GraphModule, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """Lower the masks, compare, choose kernels, compare again; returns the graph with lowered masks."""
    values = example(gm)
    expected = gm(*values)
    lower_masks(gm.graph)
    g.eliminate_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    lowered = gm(*values)
    chosen = fx.GraphModule(gm, fx.Graph())
    chosen.graph = fx.Graph()
    chosen.graph.output(chosen.graph.graph_copy(gm.graph, {}))
    select(chosen.graph, kernels.KERNELS, "cpu")
    chosen.recompile()
    for one, two, three in zip(expected, lowered, chosen(*values), strict=True):
        close(two, one, dtype)
        close(three, one, dtype)
    return gm


def test_every_combination_of_arguments() -> None:
    for mask in COMBINATIONS:
        gm = same_as_before(attention_graph(**mask))
        (node,) = calls(gm, ATTENTION)
        for name in ("offset_tensor", "window", "key_padding"):
            assert g.arg(node, name) is None, mask
        bias = g.arg(node, "bias")
        assert bias is None or (not g.arg(node, "causal") and g.dtype(bias) == torch.float32), mask  # type: ignore[arg-type]  # a node


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("bias", [None, "float_bias", "bool_bias"])
def test_other_dtypes(dtype: torch.dtype, mean: bool, bias: str | None) -> None:
    gm = attention_graph(dtype, causal=True, offset=1, key_padding="padding", bias=bias, empty_rows_mean=mean)
    values = example(gm)
    oracle = attention_graph(
        torch.float64, causal=True, offset=1, key_padding="padding", bias=bias, empty_rows_mean=mean
    )
    (expected,) = oracle(*(x.double() if x.is_floating_point() and x.dtype == dtype else x for x in values))
    lower_masks(gm.graph)
    select(gm.graph, kernels.KERNELS, "cpu")
    gm.recompile()
    (found,) = gm(*values)
    rtol, atol = TOLERANCE[dtype]
    spread = FLOAT_BIAS if bias == "float_bias" else 1
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=spread * atol)


@pytest.mark.parametrize(
    "extra", [{"softcap": 4.0}, {"sinks": True}, {"softcap": 4.0, "sinks": True}], ids=str
)
@pytest.mark.parametrize("mean", [False, True])
def test_softcap_and_sinks(extra: dict[str, object], mean: bool) -> None:
    build = Builder()
    q, k, v = (build.input(name, *shape) for name, shape in SHAPES.items())
    padding = build.input("padding", BATCH, KEYS, dtype=torch.bool)
    sinks = build.input("sinks", HEADS) if "sinks" in extra else None
    args = (True, 2, None, 4, padding, None, extra.get("softcap"), sinks, mean)
    gm = build.done(build.call(ATTENTION, q, k, v, 0.3, *args))
    same_as_before(gm)


def test_plain_causal_with_softcap_becomes_a_mask() -> None:
    gm = same_as_before(attention_graph(causal=True, softcap=3.0))
    (node,) = calls(gm, ATTENTION)
    assert not g.arg(node, "causal") and g.arg(node, "bias") is not None


def test_integer_padding_and_a_one_element_offset() -> None:
    same_as_before(attention_graph(causal=True, offset_tensor="offset_vector", key_padding="padding_int"))


# ------------------------------------------------------------------------------------------------- sharing


def test_layers_share_one_mask() -> None:
    mask = {"causal": True, "offset_tensor": "offset_tensor", "key_padding": "padding"}
    gm = same_as_before(attention_graph(layers=3, **mask))
    nodes = calls(gm, ATTENTION)
    assert len({g.arg(n, "bias") for n in nodes}) == 1
    assert len(gm.graph.nodes) == len(attention_graph(layers=3, **mask).graph.nodes) + 9


def test_sliding_and_full_layers_share_what_they_can() -> None:
    build = Builder()
    q, k, v = (build.input(name, *shape) for name, shape in SHAPES.items())
    padding = build.input("padding", BATCH, KEYS, dtype=torch.bool)
    windows = (3, None, 3, None)
    outs = [build.call(ATTENTION, q, k, v, 0.3, True, 4, None, w, padding) for w in windows]
    gm = same_as_before(build.done(*outs))
    biases = [g.arg(n, "bias") for n in calls(gm, ATTENTION)]
    assert biases[0] is biases[2] and biases[1] is biases[3] and biases[0] is not biases[1]
    assert len(calls(gm, torch.ops.aten.le.Tensor)) == 1 and len(calls(gm, torch.ops.aten.lt.Tensor)) == 1


# ---------------------------------------------------------------------------------------- what hides nothing


def test_a_plain_triangle_stays() -> None:
    gm = attention_graph(causal=True, empty_rows_mean=True)
    assert lower_masks(gm.graph) == 0
    (node,) = calls(gm, ATTENTION)
    assert g.arg(node, "causal") is True and g.arg(node, "bias") is None
    same_as_before(attention_graph(causal=True))


@pytest.mark.parametrize(
    ("mask", "gone"),
    [
        ({"causal": True, "offset": KEYS - 1}, True),
        ({"causal": True, "offset": KEYS - 2}, False),
        ({"window": QUERIES + 2, "offset": 2}, True),
        ({"window": QUERIES + 1, "offset": 2}, False),
    ],
    ids=str,
)
def test_terms_that_hide_nothing_go(mask: dict[str, object], gone: bool) -> None:
    gm = same_as_before(attention_graph(**mask))
    (node,) = calls(gm, ATTENTION)
    assert (g.arg(node, "bias") is None and not g.arg(node, "causal")) == gone


def test_decoding_on_symbolic_sizes_needs_no_mask() -> None:
    build = Builder()
    keys = build.size("keys", 9)
    q = build.input("q", 1, HEADS, 1, DIM)
    k, v = (build.input(n, 1, KV_HEADS, keys, DIM) for n in ("k", "v"))
    past = build.call(torch.ops.aten.sym_size.int, k, 2)
    offset = build.call(operator.sub, past, 1)
    gm = build.done(build.call(ATTENTION, q, k, v, 0.3, True, offset, None, None, None))
    lower_masks(gm.graph)
    (node,) = calls(gm, ATTENTION)
    assert g.arg(node, "bias") is None and g.arg(node, "causal") is False and g.arg(node, "offset") == 0


def test_symbolic_sizes_and_windows() -> None:
    build = Builder()
    batch, queries, keys, window = (build.size(n, h) for n, h in (("b", 2), ("s", 5), ("t", 9), ("w", 3)))
    q = build.input("q", batch, HEADS, queries, DIM)
    k, v = (build.input(n, batch, KV_HEADS, keys, DIM) for n in ("k", "v"))
    padding = build.input("padding", batch, keys, dtype=torch.bool)
    gm = build.done(*(build.call(ATTENTION, q, k, v, 0.3, True, 4, None, window, padding) for _ in range(2)))
    lower_masks(gm.graph)
    select(gm.graph, kernels.KERNELS, "cpu")
    gm.recompile()
    for b, s, t, w in ((2, 5, 9, 3), (1, 1, 5, 2), (3, 4, 4, 9)):
        torch.manual_seed(b)
        x = [torch.randn(b, h, n, DIM) for h, n in ((HEADS, s), (KV_HEADS, t), (KV_HEADS, t))]
        pad = torch.rand(b, t) < 0.8
        for out in gm(b, s, t, w, *x, pad):
            close(out, ops.attention.reference(*x, 0.3, True, 4, None, w, pad), torch.float32)


def test_attention_with_lse_is_left_alone() -> None:
    build = Builder()
    q, k, v = (build.input(name, *shape) for name, shape in SHAPES.items())
    node = build.call(ops.attention_lse.overload, q, k, v, 0.3, True, 4)
    gm = build.done(build.call(operator.getitem, node, 1))
    assert lower_masks(gm.graph) == 0 and node.args[4] is True
