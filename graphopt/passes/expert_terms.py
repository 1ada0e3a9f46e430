"""One expert's part of a sum, read off its nodes: the MLP, which rows it sees, and what weighs them.

mlp(x) * routing[..., e:e + 1]         mlp(x[rows]) * routing[rows, places, None], rows where ids are e
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops

aten = torch.ops.aten
LINEAR = ops.linear.overload
GATED, PLAIN = ops.gated_activation.overload, ops.activation.overload


class Mlp(NamedTuple):
    """One expert: what it reads, its linears (gate and up, or one with both, or up alone; then down)."""

    x: fx.Node
    ups: tuple[fx.Node, ...]
    down: fx.Node
    kind: object
    gated: bool

    @property
    def form(self) -> tuple[object, ...]:
        """What all experts of a list have alike."""
        linears = (*self.ups, self.down)
        weights = [at(n, 1) for n in linears]
        biased = [n.args[2] is not None for n in linears]
        return self.kind, self.gated, *(tuple(g.shape(w)) for w in weights), *map(g.dtype, weights), *biased


class Rows(NamedTuple):
    """Which rows an expert sees: those of `x` that chose it by `ids`, or all of them.

    Attributes:
        x: [..., H], or [1, T, H] where rows are taken from it; before a cast (autocast) of those.
        ids: [..., k], or None.
        routing: as ids, or [T, k, 1]; where there are no ids [..., E].
        once: whether a row may choose an expert once only, for the sum to be one.
    """

    x: fx.Node
    ids: fx.Node | None
    routing: fx.Node
    once: bool = False


class Term(NamedTuple):
    """One expert's part of the sum."""

    number: int
    rows: Rows
    mlp: Mlp
    inside: tuple[fx.Node, ...]  # the nodes that compute it


def dense_term(term: object) -> Term | None:
    """mlp(x) * routing[..., e:e + 1], or mlp(x) * sum((ids == e) * routing)"""
    for mlp, share, nodes in _weighted(term):
        column = uncast(share)[0]
        found = _masked(column) or _column(column)
        if found is not None:
            e, ids, routing = found
            if same_lead(routing, mlp.x):
                return Term(e, Rows(mlp.x, ids, routing), mlp, nodes)
    return None


def taken_term(rows: object, term: object, *, once: bool) -> Term | None:
    """mlp(x[rows]) * routing[rows, places], rows and places where ids are e"""
    for mlp, share, nodes in _weighted(term):
        taken = _unshaped(uncast(share)[0])
        x = _source(uncast(mlp.x)[0], rows)
        if x is None or not g.is_call(taken, aten.index.Tensor) or tuple(g.shape(share)[1:]) != (1,):
            continue
        routing, by = at(taken, 0), listed(taken.args[1])
        choice = _choice(by[0], by[1]) if len(by) == 2 and by[0] is rows else None
        if choice is None or g.rank(choice[1]) != 2:
            continue
        e, ids = choice
        same = g.same_shape(g.shape(routing), (*g.shape(ids), *g.shape(routing)[2:]))
        if same and g.same_size(g.shape(x)[-2], g.shape(ids)[0]):
            return Term(e, Rows(x, ids, routing, once), mlp, nodes)
    return None


def _weighted(term: object) -> Iterator[tuple[Mlp, fx.Node, tuple[fx.Node, ...]]]:
    """mlp(x) * share, in both orders: the MLP, the share, and the nodes that compute; casts are no matter."""
    product, *casts = uncast(term)
    for y, share in operands(product, aten.mul.Tensor):
        down, *more = uncast(y)
        found = _mlp(down)
        if found is not None and g.dtype(share).is_floating_point:
            yield found[0], share, (*casts, product, *more, *found[1])


def _mlp(down: fx.Node) -> tuple[Mlp, tuple[fx.Node, ...]] | None:
    """linear(act(linear(x)) * linear(x)), or without the gate, or gate and up by one linear."""
    h = at(down, 0) if g.is_call(down, LINEAR) else None
    if h is not None and g.is_call(h, PLAIN):
        up = at(h, 0)
        plain = g.is_call(up, LINEAR)
        return (Mlp(at(up, 0), (up,), down, h.args[1], False), (down, h, up)) if plain else None
    if h is None or not g.is_call(h, GATED):
        return None
    gate, up, kind = at(h, 0), at(h, 1), h.args[2]
    if g.is_call(gate, LINEAR) and g.is_call(up, LINEAR) and at(gate, 0) is at(up, 0):
        return Mlp(at(gate, 0), (gate, up), down, kind, True), (down, h, gate, up)
    if not g.is_call(gate, aten.slice.Tensor) or not g.is_call(up, aten.slice.Tensor):
        return None
    both = at(gate, 0)
    size = g.shape(both)[-1]
    halves = [tuple(gate.args[1:]), tuple(up.args[1:])] == [(-1, 0, size // 2, 1), (-1, size // 2, size, 1)]
    if not halves or not g.is_call(both, LINEAR) or at(up, 0) is not both:
        return None
    return Mlp(at(both, 0), (both,), down, kind, True), (down, h, gate, up, both)


# --------------------------------------------------------------------------------------- rows and routing


def _column(share: fx.Node) -> tuple[int, None, fx.Node] | None:
    """routing[..., e:e + 1] or routing[..., e, None] -> e, no ids, routing"""
    if g.is_call(share, aten.slice.Tensor):
        dim, e, end, step = share.args[1:]
        one = isinstance(e, int) and end == e + 1 and (dim, step) == (-1, 1)
        return (e, None, at(share, 0)) if one and isinstance(e, int) else None
    column = _unshaped(share)
    if column is share or not g.is_call(column, aten.select.int):
        return None
    dim, e = column.args[1:]
    shaped = g.same_shape(g.shape(share), (*g.shape(column), 1))
    return (e, None, at(column, 0)) if shaped and dim == -1 and isinstance(e, int) else None


def _masked(share: fx.Node) -> tuple[int, fx.Node, fx.Node] | None:
    """sum((ids == e) * routing, -1, keepdim) -> e, ids, routing"""
    if not g.is_call(share, aten.sum.dim_IntList) or tuple(share.args[1:3]) != ([-1], True):
        return None
    for equal, routing in operands(share.args[0], aten.mul.Tensor):
        found = _equal(uncast(equal)[0])
        if found is not None and g.same_shape(g.shape(found[1]), g.shape(routing)):
            return *found, routing
    return None


def _choice(rows: object, places: object) -> tuple[int, fx.Node] | None:
    """rows, places = where(ids == e), or places, rows = where(one_hot(ids).permute(2, 1, 0)[e]) -> e, ids"""
    if not g.is_call(rows, operator.getitem) or not g.is_call(places, operator.getitem):
        return None
    assert isinstance(rows, fx.Node) and isinstance(places, fx.Node)
    where, order = at(rows, 0), (rows.args[1], places.args[1])
    if at(places, 0) is not where or not g.is_call(where, aten.where.default):
        return None
    condition = at(where, 0)
    if order == (0, 1):
        return _equal(condition)
    if order != (1, 0) or not g.is_call(condition, aten.select.int):
        return None
    turned, (dim, e) = at(condition, 0), condition.args[1:]
    if not g.is_call(turned, aten.permute.default) or listed(turned.args[1]) != [2, 1, 0] or dim != -3:
        return None
    hot = at(turned, 0)
    known = g.is_call(hot, aten.one_hot.default) and isinstance(e, int) and e >= 0
    return (e, at(hot, 0)) if known and isinstance(e, int) else None


def _equal(node: fx.Node) -> tuple[int, fx.Node] | None:
    """ids == e -> e, ids"""
    if not g.is_call(node, aten.eq.Scalar):
        return None
    ids, e = at(node, 0), node.args[1]
    whole = g.dtype(ids) == torch.int64 and isinstance(e, int) and not isinstance(e, bool)
    return (e, ids) if whole and isinstance(e, int) else None


def _source(x: fx.Node, rows: object) -> fx.Node | None:
    """x[rows], or x[None, rows] in two dimensions -> x"""
    taken = _unshaped(x)
    if not g.is_call(taken, aten.index.Tensor) or g.rank(x) != 2:
        return None
    source, by = at(taken, 0), listed(taken.args[1])
    plain = by == [rows] and g.rank(source) == 2 and taken is x
    stacked = by == [None, rows] and g.rank(source) == 3 and g.shape(source)[0] == 1
    kept = g.same_size(g.shape(x)[-1], g.shape(source)[-1])
    return source if kept and (plain or stacked) else None


def chosen_once(ids: fx.Node) -> bool:
    """Whether no row of ids has one twice: they are the places of its largest scores."""
    if g.is_call(ids, aten.reshape.default) and g.same_size(g.shape(at(ids, 0))[-1], g.shape(ids)[-1]):
        return chosen_once(at(ids, 0))
    if not g.is_call(ids, operator.getitem) or ids.args[1] != 1:
        return False
    choice = at(ids, 0)
    return g.is_call(choice, aten.topk.default) and g.arg(choice, "dim") in (-1, g.rank(ids) - 1)


# --------------------------------------------------------------------------------------------- arguments


def at(node: fx.Node, index: int) -> fx.Node:
    """An argument that is a node."""
    argument = node.args[index]
    assert isinstance(argument, fx.Node), (node, argument)
    return argument


def listed(argument: object) -> list[object]:
    """An argument that is a list, or alone."""
    return list(argument) if isinstance(argument, (list, tuple)) else [argument]


def operands(node: object, target: object) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Both orders of a call's two tensors; none where a sum scales the second."""
    if not isinstance(node, fx.Node) or not g.is_call(node, target) or node.kwargs.get("alpha", 1) != 1:
        return
    a, b = node.args[:2]
    if isinstance(a, fx.Node) and isinstance(b, fx.Node) and g.is_tensor(a) and g.is_tensor(b):
        yield from ((a, b), (b, a))


def uncast(node: object) -> tuple[fx.Node, ...]:
    """What is behind casts to a float dtype, and the casts."""
    assert isinstance(node, fx.Node)
    casts: list[fx.Node] = []
    while g.is_call(node, aten.to.dtype) and g.dtype(node).is_floating_point:
        casts.append(node)
        node = at(node, 0)
    return (node, *casts)


def same_lead(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors agree in all dimensions but the last."""
    return g.same_shape(g.shape(a)[:-1], g.shape(b)[:-1])


def _unshaped(node: fx.Node) -> fx.Node:
    return at(node, 0) if g.is_call(node, aten.reshape.default) else node
