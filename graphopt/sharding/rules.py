"""What each operator of the vocabulary does to layouts: linears, attention, norms, and the output."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.sharding.caches import CACHE_RULES, HEADS, caches, updated
from graphopt.sharding.flow import Flow, Outcome, Rule, tensors
from graphopt.sharding.layout import (
    PARTIAL,
    REPLICATED,
    Axis,
    Layout,
    Own,
    Partial,
    Replicated,
    Segments,
    Split,
    one_segment,
)

aten = torch.ops.aten


def unknown(flow: Flow, node: fx.Node) -> Outcome:
    """Any other operator: on all of its operands."""
    for operand in tensors(node):
        flow.full(node, operand, f"there is no sharding rule for {g.op_name(node)}")
    return REPLICATED


def nothing(flow: Flow, node: fx.Node) -> Outcome:
    """What reads no data of its operands."""
    return REPLICATED


def size(flow: Flow, node: fx.Node) -> Outcome:
    """sym_size(x, d): the same on every rank, unless x is shared along d."""
    x, dim = node.args
    have = flow.layout(x)
    if isinstance(have, Split) and isinstance(x, fx.Node) and have.dim == dim % g.rank(x):  # type: ignore[operator]
        flow.full(node, x, "its shared size is read")
    return REPLICATED


def picked(flow: Flow, node: fx.Node) -> Outcome:
    """getitem(x, i): what that result of x is."""
    x, index = node.args
    outcome = flow.layouts.get(x, REPLICATED)  # type: ignore[arg-type]  # a node
    return outcome[index] if isinstance(outcome, tuple) else REPLICATED  # type: ignore[index]  # an int


# ----------------------------------------------------------------------------------------------- linears


def linear(flow: Flow, node: fx.Node) -> Outcome:
    """x whole -> features split, where that helps; x split by features -> a term of a sum."""
    x, weight, bias = node.args[:3]
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    have, last = flow.layout(x), g.rank(x) - 1
    if not isinstance(have, (Split, Own)) or have.dim == last:
        return _shared_linear(flow, node, have)
    for operand in (n for n in (weight, bias) if n is not None):
        flow.full(node, operand, "it is the weight of a linear")
    flow.split(node, x, have.dim, have.segments)
    return Split(have.dim, have.segments)


def _shared_linear(flow: Flow, node: fx.Node, have: Layout) -> Outcome:
    """A linear whose input is whole, a term, or split by features."""
    x, weight, bias = node.args[:3]
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    rows, columns = g.shape(weight)
    style = flow.style(node)
    foreign = [n for n in (weight, bias) if isinstance(n, fx.Node) and n not in flow.weights]
    if not isinstance(rows, int) or not isinstance(columns, int) or foreign:
        return unknown(flow, node)
    if style == "row" and isinstance(have, (Replicated, Partial)):
        if isinstance(have, Partial):
            flow.full(node, x, "")
        axis = Axis(columns, {(node, 0, rows)})
        return _row(flow, node, one_segment(axis, columns), columns)
    if isinstance(have, Split) and style in ("auto", "row"):
        if flow.contracts(node, have.segments):
            return _row(flow, node, have.segments, columns)
    flow.full(node, x, "its features are copied to several ranks, or the plan wants its reader whole")
    if style == "replicated":
        return REPLICATED
    if style in ("auto", "row") and (node in flow.whole or rows < flow.world):
        return REPLICATED
    return _column(flow, node, rows)


def _row(flow: Flow, node: fx.Node, segments: Segments, columns: int) -> Outcome:
    """linear(x_r, W[:, r]): a term; the bias is in the first rank's."""
    for segment in segments:
        if not segment.axis.even(flow.world):
            units = segment.axis.root().units
            pieces = f"pieces (heads or groups) of its {segment.size} input features"
            flow.uneven(node, units, pieces if units != segment.size else "input features")
    flow.split(node, node.args[0], g.rank(node.args[0]) - 1, segments)  # type: ignore[arg-type]  # a node
    flow.split(node, node.args[1], 1, segments)
    flow.kinds[node] = "row"
    return PARTIAL


def _column(flow: Flow, node: fx.Node, rows: int) -> Outcome:
    """linear(x, W[r]): a part of the output features."""
    segments = flow.column(node, rows)
    flow.split(node, node.args[1], 0, segments)
    if node.args[2] is not None:
        flow.split(node, node.args[2], 0, segments)
    flow.kinds[node] = "column"
    return Split(g.rank(node) - 1, segments)


def embedding(flow: Flow, node: fx.Node) -> Outcome:
    """embedding(W, ids): the largest table of a graph is shared by rows; ids of other ranks give zeros."""
    table, ids = node.args[:2]
    assert isinstance(table, fx.Node)
    flow.full(node, ids, "it is an index")
    style = flow.style(node)
    rows = g.shape(table)[0] if table in flow.weights else 0
    largest = style in ("vocabulary", "row", "column", "gathered") or table is largest_table(flow)
    if not isinstance(rows, int) or rows < flow.world or not largest or style == "replicated":
        return REPLICATED
    if node in flow.whole:
        return REPLICATED
    axis = Axis(rows, {(node, 0, rows)}, padded=rows % flow.world != 0)
    flow.split(node, table, 0, one_segment(axis, rows))
    flow.kinds[node] = "vocabulary"
    return PARTIAL


def largest_table(flow: Flow) -> fx.Node | None:
    """The embedding table with the most rows: the vocabulary. Positions and types are small beside it."""
    tables = [n.args[0] for n in flow.graph.nodes if g.is_call(n, aten.embedding.default)]
    known = [t for t in tables if t in flow.weights and isinstance(g.shape(t)[0], int)]
    return max(known, key=lambda t: g.shape(t)[0], default=None)


# ------------------------------------------------------------------------------------ heads and norms


def attention(flow: Flow, node: fx.Node) -> Outcome:
    """attention(q, k, v): by heads; a rank's kv heads are those that its query heads read."""
    q, k, v = node.args[:3]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    for x in (q, k, v):
        have = flow.layout(x)
        if not isinstance(have, Replicated) and getattr(have, "dim", None) != HEADS:
            flow.full(node, x, "attention shares heads alone")
    known = [_heads(flow, x) for x in (q, k, v)]
    axes = [segments[0].axis for segments in known if segments is not None and len(segments) == 1]
    heads, groups = g.shape(q)[HEADS], g.shape(k)[HEADS]
    if not axes or not isinstance(heads, int) or not isinstance(groups, int):
        return unknown(flow, node)
    if len([s for s in known if s is not None]) != len(axes):
        return unknown(flow, node)
    of_q = known[0][0].axis if known[0] else Axis(heads)
    of_k = next((s[0].axis for s in known[1:] if s is not None), None) or Axis(groups)
    seeds = of_q.root().seeds | of_k.root().seeds
    of_q.root().seeds, of_k.root().seeds = set(seeds), set(seeds)
    of_q.refine(heads)
    of_k.refine(groups)
    whole_heads = of_q.root().units == heads and of_k.root().units == groups
    if heads % flow.world or not whole_heads:
        flow.uneven(node, heads, "query heads")
    elif groups % flow.world and flow.world % groups:
        flow.uneven(node, groups, "key and value heads")
    flow.split(node, q, HEADS, one_segment(of_q, heads))
    for x in (k, v):
        flow.split(node, x, HEADS, one_segment(of_k, groups))
    _by_head(flow, node, one_segment(of_q, heads), heads)
    both = Split(HEADS, one_segment(of_q, heads))
    return (both, both) if g.is_call(node, ops.attention_lse.overload) else both


def _heads(flow: Flow, x: fx.Node) -> Segments | None:
    """How a value is shared by heads, if it is."""
    have = flow.layout(x)
    return have.segments if isinstance(have, (Split, Own)) and have.dim == HEADS else None


def _by_head(flow: Flow, node: fx.Node, segments: Segments, heads: int) -> None:
    """Bias and sinks of attention: their part, where they have a head dimension."""
    for name in ("offset_tensor", "key_padding"):
        flow.full(node, g.arg(node, name), "it is a mask of all heads")
    bias, sinks = g.arg(node, "bias"), g.arg(node, "sinks")
    if isinstance(bias, fx.Node):
        dim = g.rank(bias) - 3
        if dim >= 0 and g.shape(bias)[dim] == heads and heads != 1:
            flow.split(node, bias, dim, segments)
        else:
            flow.full(node, bias, "it is a mask of all heads")
    if isinstance(sinks, fx.Node):
        flow.split(node, sinks, 0, segments)


def rope(flow: Flow, node: fx.Node) -> Outcome:
    """rope(q, k): each as it is shared, by heads or batch."""
    q, k, cos, sin = node.args[:4]
    for table in (cos, sin):
        flow.full(node, table, "it is a table of all heads")
    return tuple(_rows_alone(flow, node, x, (HEADS,)) for x in (q, k))  # type: ignore[arg-type]  # nodes


def _rows_alone(flow: Flow, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> Layout:
    """An operand that may be shared along some dimensions only."""
    have = flow.layout(x)
    if isinstance(have, (Split, Own)) and have.dim in dims:
        flow.split(node, x, have.dim, have.segments)
        return Split(have.dim, have.segments)
    flow.full(node, x, f"{g.op_name(node)} needs all of a row")
    return REPLICATED


def norm(flow: Flow, node: fx.Node) -> Outcome:
    """rms_norm(x), layer_norm(x): as x is shared, but for its last dimension."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    for parameter in tensors(node):
        if parameter is not x:
            flow.full(node, parameter, "it is the weight of a norm")
    return _rows_alone(flow, node, x, range(g.rank(x) - 1))


def added_norm(flow: Flow, node: fx.Node) -> Outcome:
    """add_rms_norm(x, y), add_layer_norm(x, y): the sum is needed whole, or as both are shared."""
    x, y = node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(y, fx.Node)
    for parameter in tensors(node):
        if parameter not in (x, y):
            flow.full(node, parameter, "it is the weight of a norm")
    found = [h for h in (flow.layout(x), flow.layout(y)) if isinstance(h, Split) and h.dim != g.rank(x) - 1]
    if len(found) != 2 or not g.same_shape(g.shape(x), g.shape(y)):
        for operand in (x, y):
            flow.full(node, operand, f"{g.op_name(node)} needs all of a row")
        return REPLICATED, REPLICATED
    for operand in (x, y):
        flow.split(node, operand, found[0].dim, found[0].segments)
    return found[0], found[0]


# --------------------------------------------------------------------------------------------- the output


def output(flow: Flow, node: fx.Node) -> Outcome:
    """What the caller gets: sums, gathered logits; a cache keeps its shape and has a rank's own heads."""
    kept, made = caches(flow), updated(flow)
    for value in dict.fromkeys(v for v in g.flat_arguments(node) if isinstance(v, fx.Node)):
        have = flow.layout(value)
        if isinstance(have, Own):
            continue
        if isinstance(have, Split) and have.dim == HEADS and value in made:
            flow.own(node, value, HEADS, have.segments)
        elif isinstance(have, Split) and have.dim == HEADS and value in kept:
            flow.gather(node, value, have)  # what begins a cache, or is read elsewhere: all heads
        elif isinstance(have, Split) and _wide(flow, have):
            flow.gather(node, value, have)
        else:
            flow.full(node, value, "it is returned")
    return REPLICATED


def _wide(flow: Flow, have: Split) -> bool:
    """Whether a returned value comes from linears with more outputs than inputs, whole: a vocabulary's."""
    if len(have.segments) != 1 or have.segments[0].axis.copies(flow.world) > 1:
        return False
    for seed, _, _ in have.segments[0].axis.root().seeds:
        rows, columns = g.shape(seed.args[1])[:2]  # type: ignore[arg-type]  # a linear's weight
        if rows <= columns:
            return False
    return True


RULES: Mapping[object, Rule] = {
    "output": output,
    operator.getitem: picked,
    aten.sym_size.int: size,
    aten.embedding.default: embedding,
    ops.linear.overload: linear,
    ops.attention.overload: attention,
    ops.attention_lse.overload: attention,
    ops.rope.overload: rope,
    ops.rms_norm.overload: norm,
    ops.layer_norm.overload: norm,
    ops.add_rms_norm.overload: added_norm,
    ops.add_layer_norm.overload: added_norm,
    **CACHE_RULES,
    **dict.fromkeys((aten.zeros_like.default, aten.empty_like.default), unknown),
}
