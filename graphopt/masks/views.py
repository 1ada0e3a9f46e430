"""How factories, views, indexing and scans read at an index: they only move or make it."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from graphopt import graph as g
from graphopt.masks.arithmetic import as_number, as_truth
from graphopt.masks.expression import Index, Reading, Rule, in_dtype, integer, size_expr
from graphopt.masks.term import ZERO, Expr, Number, Space, Unreadable, Value, literal, never_negative

aten = torch.ops.aten


# --------------------------------------------------------------------------------------------- factories


def filled(argument: str | None, constant: float = 0.0) -> Rule:
    """full, ones, zeros, new_full, ones_like, scalar_tensor: one literal everywhere."""

    def rule(reading: Reading, node: fx.Node, index: Index) -> Value:
        value = literal(constant) if argument is None else reading.operand(g.arg(node, argument), ())
        if g.dtype(node) == torch.bool:
            return as_truth(value, reading.space)
        return in_dtype(value, g.dtype(node))

    return rule


def arange(reading: Reading, node: fx.Node, index: Index) -> Value:
    """start + step * index."""
    names = g.argument_names(node.target)
    start = size_expr(g.arg(node, "start")) if "start" in names else ZERO
    step = size_expr(g.arg(node, "step")) if "step" in names else sympy.Integer(1)
    return in_dtype(Number(start + step * index[0]), g.dtype(node))


def constant(reading: Reading, node: fx.Node, index: Index) -> Value:
    """A constant of one element that the graph holds. Raises Unreadable for longer ones, which are leaves."""
    owner = node.graph.owning_module
    value = getattr(owner, str(node.target), None) if owner is not None else None
    if type(value) is not torch.Tensor or value.numel() != 1 or value.is_meta:  # no fake, no parameter
        raise Unreadable("no constant of one element")
    number = literal(value.item())
    return as_truth(number, reading.space) if value.dtype == torch.bool else number


# ------------------------------------------------------------------------------------------------- views


def _tensor(argument: object) -> fx.Node:
    if not g.is_tensor(argument):
        raise Unreadable("no tensor")
    assert isinstance(argument, fx.Node)
    return argument


def reshape(reading: Reading, node: fx.Node, index: Index) -> Value:
    """A reshape that only inserts and removes dimensions of size 1. Raises Unreadable for any other."""
    x = _tensor(node.args[0])
    wide = [d for d in range(g.rank(x)) if g.expression(g.shape(x)[d]) != 1]
    wide_out = [d for d in range(g.rank(node)) if g.expression(g.shape(node)[d]) != 1]
    if not g.same_shape([g.shape(x)[d] for d in wide], [g.shape(node)[d] for d in wide_out]):
        raise Unreadable("a reshape that mixes dimensions")
    at = dict(zip(wide, wide_out, strict=True))
    return reading.at(x, tuple(index[at[d]] if d in at else ZERO for d in range(g.rank(x))))


def permute(reading: Reading, node: fx.Node, index: Index) -> Value:
    """out[k] = x[dims[k]]; also transpose."""
    x = _tensor(node.args[0])
    rank = g.rank(x)
    dims = list(range(rank))
    if node.target == aten.permute.default:
        dims = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]  # a list of ints
    else:
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]  # two ints
        dims[a], dims[b] = dims[b], dims[a]
    return reading.at(x, tuple(index[dims.index(d)] for d in range(rank)))


def expand(reading: Reading, node: fx.Node, index: Index) -> Value:
    """Broadcast: dimensions of size 1 are read at 0, which `Reading.at` does."""
    return reading.operand(_tensor(node.args[0]), index)


def _dim(node: fx.Node, x: fx.Node) -> int:
    return int(g.arg(node, "dim")) % g.rank(x)  # type: ignore[arg-type]  # an int by schema


def _position(argument: object, size: g.Size, space: Space) -> Expr:
    """A start or an index from a schema, wrapped where it is a negative literal."""
    position = size_expr(argument)
    if position.is_number:
        return position if position >= 0 else sympy.Max(position + size_expr(size), 0)
    if not never_negative(position, space):
        raise Unreadable("a position that may be negative")
    return position


def slice_(reading: Reading, node: fx.Node, index: Index) -> Value:
    """x[start + step * index]."""
    x = _tensor(node.args[0])
    dim = _dim(node, x)
    start = g.arg(node, "start")
    first = ZERO if start is None else _position(start, g.shape(x)[dim], reading.space)
    step = size_expr(g.arg(node, "step"))
    return reading.at(x, (*index[:dim], first + step * index[dim], *index[dim + 1 :]))


def select(reading: Reading, node: fx.Node, index: Index) -> Value:
    """x[..., index, ...] along one dimension."""
    x = _tensor(node.args[0])
    dim = _dim(node, x)
    position = _position(g.arg(node, "index"), g.shape(x)[dim], reading.space)
    return reading.at(x, (*index[:dim], position, *index[dim:]))


# ---------------------------------------------------------------------------------------------- indexing


def _wrapped_never(expr: Expr, space: Space) -> Expr:
    if not never_negative(expr, space):
        raise Unreadable("an index that may be negative")
    return expr


def index_tensor(reading: Reading, node: fx.Node, index: Index) -> Value:
    """x[t0, t1, :]: advanced indexing by integer tensors, as `padding[batch, key]`.

    Raises Unreadable for bool tensors and for an index that may be negative.
    """
    x = _tensor(node.args[0])
    given = list(node.args[1])  # type: ignore[arg-type]  # a list of tensors and None
    given += [None] * (g.rank(x) - len(given))
    at = [d for d, t in enumerate(given) if t is not None]
    tensors = [_tensor(given[d]) for d in at]
    if any(g.dtype(t) == torch.bool for t in tensors):
        raise Unreadable("indexing by a bool tensor")
    width = max(g.rank(t) for t in tensors)
    front = at[0] if at == list(range(at[0], at[-1] + 1)) else 0  # separated index tensors go first
    picked = index[front : front + width]
    others = iter((*index[:front], *index[front + width :]))
    source = tuple(
        _wrapped_never(integer(reading.operand(given[d], picked)), reading.space) if d in at else next(others)
        for d in range(g.rank(x))
    )
    return reading.at(x, source)


def gather(reading: Reading, node: fx.Node, index: Index) -> Value:
    """x[..., t[index], ...] along one dimension; gather does not wrap."""
    x = _tensor(node.args[0])
    dim = _dim(node, x)
    picked = reading.at(_tensor(g.arg(node, "index")), index)
    return reading.at(x, (*index[:dim], integer(picked), *index[dim + 1 :]))


def index_select(reading: Reading, node: fx.Node, index: Index) -> Value:
    """x[..., t[index], ...] along one dimension, t one-dimensional."""
    x = _tensor(node.args[0])
    dim = _dim(node, x)
    picked = reading.at(_tensor(g.arg(node, "index")), (index[dim],))
    return reading.at(x, (*index[:dim], integer(picked), *index[dim + 1 :]))


# ------------------------------------------------------------------------------------------------- scans


def diff(reading: Reading, node: fx.Node, index: Index) -> Value:
    """x[d] - x[d - 1], the element before the first from `prepend`: where one formula covers both.

    Raises Unreadable for another kind of difference, and for one that is not constant.
    """
    x, prepend = _tensor(node.args[0]), _tensor(g.arg(node, "prepend"))
    dim = _dim(node, x)
    one = g.arg(node, "n") == 1 and g.arg(node, "append") is None and g.expression(g.shape(prepend)[dim]) == 1
    if not one or g.dtype(node) == torch.bool:
        raise Unreadable("a difference of another kind")

    def at(source: fx.Node, position: Expr) -> Expr:
        return integer(reading.at(source, (*index[:dim], position, *index[dim + 1 :])))

    if g.expression(g.shape(x)[dim]) == 1:
        return Number(at(x, ZERO) - at(prepend, ZERO))
    step = sympy.Dummy(integer=True, positive=True)  # any element but the first
    inner = sympy.expand(at(x, step) - at(x, step - 1))
    first = sympy.expand(at(x, ZERO) - at(prepend, ZERO))
    if inner.has(step) or inner != first:
        raise Unreadable("a difference that is not constant")
    return Number(inner)


def cumsum(reading: Reading, node: fx.Node, index: Index) -> Value:
    """The running sum of something constant along its dimension. Raises Unreadable for anything else."""
    x = _tensor(node.args[0])
    dim = _dim(node, x)
    step = sympy.Dummy(integer=True, nonnegative=True)
    summand = integer(as_number(reading.at(x, (*index[:dim], step, *index[dim + 1 :]))))
    if summand.has(step):
        raise Unreadable("a sum of something that is not constant")
    return in_dtype(Number(summand * (index[dim] + 1)), g.dtype(node))
