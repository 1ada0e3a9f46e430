"""What views do to layouts: which dimension is shared afterwards, and in which pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import fx

from graphopt import graph as g
from graphopt.sharding.flow import Flow, Outcome, Rule
from graphopt.sharding.layout import (
    PARTIAL,
    REPLICATED,
    Layout,
    Own,
    Partial,
    Segment,
    Segments,
    Split,
    total,
)
from graphopt.sharding.rules import unknown

aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------------- views


def same(flow: Flow, node: fx.Node) -> Outcome:
    """clone(x): as x."""
    return flow.layout(node.args[0])


def reshape(flow: Flow, node: fx.Node) -> Outcome:
    """[.., H * D] <-> [.., H, D]: the shared dimension must come first of those that are joined or parted."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    have = flow.layout(x)
    if not isinstance(have, (Split, Own)):
        return have
    moved = None if isinstance(have, Own) else moved_split(g.shape(x), g.shape(node), have)
    if moved is None:
        return unknown(flow, node)
    return moved


def moved_split(old: Sequence[g.Size], new: Sequence[g.Size], have: Split) -> Split | None:
    """Where the shared dimension is after a reshape; None where a rank's part is no block any more."""
    group = next(((o, n) for o, n in groups(old, new) if have.dim in o), None)
    if group is None:
        return None
    before = [d for d in group[0] if old[d] != 1]
    after = [d for d in group[1] if new[d] != 1]
    if not before or not after or before[0] != have.dim:
        return None
    inner = [old[d] for d in before[1:]]
    sizes = [new[d] for d in after]
    if not all(isinstance(s, int) for s in (*inner, *sizes[1:])):
        return None
    if len(have.segments) == sizes[0] and len(sizes) > 1 and not inner and sizes[0] > 1:
        return _side_by_side(have.segments, after[1], sizes[1])  # type: ignore[arg-type]  # ints
    per_old, per_new = prod(inner), prod(sizes[1:])
    segments = []
    for segment in have.segments:
        entries = segment.size * per_old
        if entries % per_new:  # type: ignore[operator]  # ints
            return None
        pieces = entries // per_new
        segment.axis.refine(pieces)
        segments.append(Segment(segment.axis, pieces))
    return Split(after[0], tuple(segments))


def _side_by_side(segments: Segments, dim: int, size: int) -> Split | None:
    """[q q k k v v] as [3, heads]: the heads are shared."""
    if len({s.size for s in segments}) != 1:
        return None
    first = segments[0].axis
    for other in segments[1:]:
        first.unite(other.axis)
    first.refine(size)
    return Split(dim, (Segment(first, size),))


def groups(old: Sequence[g.Size], new: Sequence[g.Size]) -> list[tuple[list[int], list[int]]]:
    """Dimensions of two shapes of one product, in the smallest groups of equal products."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = [i] if i < len(old) else [], [j] if j < len(new) else []
        a: g.Size = old[i] if before else 1
        b: g.Size = new[j] if after else 1
        i, j = i + len(before), j + len(after)
        while not g.same_size(a, b):
            grow_old = j >= len(new) or (i < len(old) and _divides(a, b))
            if grow_old and i >= len(old):
                return []
            if grow_old:
                a, before, i = a * old[i], [*before, i], i + 1
            else:
                b, after, j = b * new[j], [*after, j], j + 1
        found.append((before, after))
    return found


def _divides(a: g.Size, b: g.Size) -> bool:
    """Whether a is a proper factor of b, or the smaller: its side is the one to be multiplied."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    import sympy

    numerator, denominator = sympy.fraction(sympy.cancel(sympy.sympify(g.expression(b)) / g.expression(a)))
    return bool(denominator == 1 and numerator != 1)


def permute(flow: Flow, node: fx.Node) -> Outcome:
    """permute(x, dims): the shared dimension moves along."""
    x, dims = node.args[:2]
    have = flow.layout(x)
    if not isinstance(have, (Split, Own)) or not isinstance(x, fx.Node):
        return have
    order = [d % g.rank(x) for d in dims]  # type: ignore[operator, union-attr]  # ints
    return type(have)(order.index(have.dim), have.segments)


def cut_out(flow: Flow, node: fx.Node) -> Outcome:
    """slice(x, dim, a, b): another dimension, or whole segments of the shared one."""
    x, dim, start, end, step = (*node.args, 0, None, None, 1)[:5] if len(node.args) < 5 else node.args[:5]
    have = flow.layout(x)
    if not isinstance(have, (Split, Own)) or not isinstance(x, fx.Node) or not isinstance(dim, int):
        return have
    if dim % g.rank(x) != have.dim:
        return have
    if isinstance(have, Own) or step != 1:
        return unknown(flow, node)
    at, to = bounds(start, end, total(have.segments))
    kept, position, cut = [], 0, False
    for segment in have.segments:
        first, last = position, position + segment.size
        position = last
        for edge in (at, to):
            if first < edge < last:
                cut = flow.cut(segment, edge - first) or cut
        if at <= first and last <= to:
            kept.append(segment)
    if sum(s.size for s in kept) != to - at or not kept:
        if not cut:
            return unknown(flow, node)
        return REPLICATED  # swept again, with the cut
    return Split(have.dim, tuple(kept))


def bounds(start: object, end: object, size: int) -> tuple[int, int]:
    """A slice's range, as Python reads it."""
    return slice(start, end).indices(size)[:2]


def select(flow: Flow, node: fx.Node) -> Outcome:
    """select(x, dim, i): the dimensions after it move up."""
    x, dim = node.args[:2]
    have = flow.layout(x)
    if not isinstance(have, (Split, Own)) or not isinstance(x, fx.Node) or not isinstance(dim, int):
        return have
    at = dim % g.rank(x)
    if at == have.dim and isinstance(have, Split) and isinstance(node.args[2], int):
        size = total(have.segments)
        index = node.args[2] % size
        cut = [
            flow.cut(have.segments[0], edge)
            for edge in (index, index + 1)
            if 0 < edge < size and len(have.segments) == 1
        ]
        return REPLICATED if any(cut) else unknown(flow, node)
    if at == have.dim:
        return unknown(flow, node)
    return type(have)(have.dim - (at < have.dim), have.segments)


def expand(flow: Flow, node: fx.Node) -> Outcome:
    """expand(x, sizes): new dimensions come first."""
    x = node.args[0]
    have = flow.layout(x)
    if not isinstance(have, (Split, Own)) or not isinstance(x, fx.Node):
        return have
    if isinstance(have, Own) or total(have.segments) == 1:
        return unknown(flow, node)
    return Split(have.dim + g.rank(node) - g.rank(x), have.segments)


def cat(flow: Flow, node: fx.Node) -> Outcome:
    """cat(xs, dim): along another dimension than the shared one, all shared alike."""
    parts = [x for x in node.args[0] if isinstance(x, fx.Node)]  # type: ignore[union-attr]  # a list
    dim = node.args[1] if len(node.args) > 1 else 0
    haves = [flow.layout(x) for x in parts]
    if all(isinstance(h, Partial) for h in haves):
        return PARTIAL
    leader = next((h for h in haves if isinstance(h, (Split, Own))), None)
    if leader is None or not isinstance(dim, int) or dim % g.rank(node) == leader.dim:
        return unknown(flow, node)
    if any(isinstance(h, Own) for h in haves):
        return _cat_own(flow, node, parts, haves)
    for part in parts:
        flow.split(node, part, leader.dim, leader.segments)
    return leader


def stack(flow: Flow, node: fx.Node) -> Outcome:
    """stack(xs, dim): the dimensions after the new one move down."""
    parts = [x for x in node.args[0] if isinstance(x, fx.Node)]  # type: ignore[union-attr]  # a list
    dim = node.args[1] if len(node.args) > 1 else 0
    leader = next((h for h in map(flow.layout, parts) if isinstance(h, Split)), None)
    if leader is None or not isinstance(dim, int):
        return unknown(flow, node)
    for part in parts:
        flow.split(node, part, leader.dim, leader.segments)
    return Split(leader.dim + (dim % g.rank(node) <= leader.dim), leader.segments)


def _cat_own(flow: Flow, node: fx.Node, parts: Sequence[fx.Node], haves: Sequence[Layout]) -> Outcome:
    """A cache and what is appended to it."""
    shared = [h for h in haves if isinstance(h, (Split, Own))]
    if any(isinstance(h, Partial) for h in haves) or len({h.dim for h in shared}) != 1:
        return unknown(flow, node)
    for part, have in zip(parts, haves, strict=True):
        if isinstance(have, (Split, Own)):
            for mine, other in zip(have.segments, shared[0].segments, strict=True):
                mine.axis.unite(other.axis)
            flow.own(node, part, have.dim, have.segments)
    return Own(shared[0].dim, shared[0].segments)


def along(position: int, default: object = None) -> Rule:
    """A call that works along the dimensions of its argument `position` only."""

    def rule(flow: Flow, node: fx.Node) -> Outcome:
        x = node.args[0]
        have = flow.layout(x)
        given = node.args[position] if len(node.args) > position else default
        dims = given if isinstance(given, (list, tuple)) else (given,)
        if not isinstance(have, (Split, Own)) or not isinstance(x, fx.Node):
            return unknown(flow, node) if isinstance(have, Partial) else have
        if not dims or any(not isinstance(d, int) or d % g.rank(x) == have.dim for d in dims):
            return unknown(flow, node)
        return have

    return rule


def pad(flow: Flow, node: fx.Node) -> Outcome:
    """pad(x, amounts): of other dimensions than the shared one."""
    x, amounts = node.args[:2]
    have = flow.layout(x)
    if not isinstance(have, (Split, Own)) or not isinstance(x, fx.Node):
        return unknown(flow, node) if isinstance(have, Partial) else have
    padded = len(amounts) // 2  # type: ignore[arg-type]  # a list
    return unknown(flow, node) if have.dim >= g.rank(x) - padded else have


VIEW_RULES: Mapping[object, Rule] = {
    aten.reshape.default: reshape,
    aten.permute.default: permute,
    aten.slice.Tensor: cut_out,
    aten.select.int: select,
    aten.expand.default: expand,
    aten.cat.default: cat,
    aten.stack.default: stack,
    aten.roll.default: along(2),
    aten.pad.default: pad,
    aten.softmax.int: along(1),
    aten.log_softmax.int: along(1),
    aten.clone.default: same,
}
