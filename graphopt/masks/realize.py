"""Make tensors of truths, in a graph or at once: the probe runs the very code that builds the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from graphopt import graph as g
from graphopt.masks.expression import size_expr
from graphopt.masks.form import MaskForm
from graphopt.masks.term import (
    AXES,
    BATCH,
    KEY,
    All,
    AtLeast,
    Entry,
    Expr,
    Not,
    Some,
    Space,
    Truth,
    Unreadable,
    Zero,
    axes_of,
    elements,
    never_negative,
)
from graphopt.torch_private import fake_mode_of, no_dispatch_of

aten = torch.ops.aten
Axes: TypeAlias = "tuple[sympy.Symbol, ...]"
Made: TypeAlias = "fx.Node | torch.Tensor | int"  # a node in a graph; a tensor or a size at once


@dataclass(frozen=True)
class Maker:
    """Where tensors are made: `call` runs an operator or appends it, `tensor` and `size` look up what is."""

    form: MaskForm
    device: torch.device
    call: Callable[..., Made]
    tensor: Callable[[fx.Node], Made]
    size: Callable[[Expr], Made]

    def extent(self, axis: sympy.Symbol) -> Expr:
        """The size of an axis."""
        return self.form.sizes[AXES.index(axis)]


@dataclass(frozen=True)
class MaskArguments:
    """A form as arguments of `ops.attention`: numbers, and nodes of the graph."""

    causal: bool
    offset: int | fx.Node
    offset_tensor: fx.Node | None
    window: int | fx.Node | None
    key_padding: fx.Node | None
    bias: fx.Node | None
    empty_rows_mean: bool


# ------------------------------------------------------------------------------------------------ parts


def key_padding(form: MaskForm, maker: Maker) -> Made | None:
    """The [B, K] bool tensor of a form's key padding, or None."""
    if form.key_padding is None:
        return None
    x = truth(form.key_padding, (BATCH, KEY), maker)
    wide = {a for a in (BATCH, KEY) if maker.extent(a) != 1}
    if wide and wide <= axes_of(form.key_padding):
        return x
    return maker.call(aten.expand.default, x, [maker.size(form.sizes[0]), maker.size(form.sizes[3])])


def bias(form: MaskForm, maker: Maker) -> Made | None:
    """What stays a tensor, broadcastable to [B, H, Q, K]: bool where True keeps, or float to add; or None."""
    if form.whole and g.rank(form.mask) == 4:
        return maker.tensor(form.mask)
    if form.bias is not None:
        return entry(form.bias.node, form.bias.index, AXES, maker)
    return truth(form.rest, AXES, maker) if form.rest is not None else None


# ------------------------------------------------------------------------------------------------ truths


def truth(t: Truth, axes: Axes, maker: Maker) -> Made:
    """A bool tensor, broadcastable to the axes. Raises Unreadable for arithmetic that it cannot spell."""
    if isinstance(t, Entry):
        return entry(t.node, t.index, axes, maker)
    if isinstance(t, Not) and isinstance(t.of, Zero):
        x = _as_tensor(number(t.of.expr, axes, maker), t.of.expr, maker)
        return maker.call(aten.to.dtype, x, torch.bool)  # as programs cast it: they merge
    if isinstance(t, Not):
        return maker.call(aten.logical_not.default, truth(t.of, axes, maker))
    if isinstance(t, (AtLeast, Zero)):
        test = aten.ge.Scalar if isinstance(t, AtLeast) else aten.eq.Scalar
        return maker.call(test, _as_tensor(number(t.expr, axes, maker), t.expr, maker), 0)
    if isinstance(t, (All, Some)):
        join = aten.logical_and.default if isinstance(t, All) else aten.logical_or.default
        return reduce(lambda x, y: maker.call(join, x, y), [truth(x, axes, maker) for x in t.of])
    raise Unreadable(f"{t} as a tensor")


def _as_tensor(x: Made, expr: Expr, maker: Maker) -> Made:
    if reads_tensors(expr):
        return x
    return maker.call(aten.scalar_tensor.default, x, dtype=torch.int64, device=maker.device)


def reads_tensors(expr: Expr) -> bool:
    """Whether an expression depends on the index or on leaves; else it is a size."""
    return bool(expr.free_symbols & set(AXES) or elements(expr))


def number(expr: Expr, axes: Axes, maker: Maker) -> Made:
    """An int64 tensor over the axes, or a size. Raises Unreadable for arithmetic that it cannot spell."""
    if not reads_tensors(expr):
        return maker.size(expr)
    if expr in AXES:
        return coordinate(expr, axes, maker)
    if isinstance(expr, AppliedUndef):
        return entry(maker.form.leaf(expr.func.__name__), expr.args, axes, maker)
    if isinstance(expr, sympy.Abs):
        return maker.call(aten.abs.default, number(expr.args[0], axes, maker))
    if isinstance(expr, sympy.floor):
        above, below = sympy.fraction(sympy.together(expr.args[0]))
        return maker.call(aten.floor_divide.default, number(above, axes, maker), int(below))
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        target = aten.add.Tensor if isinstance(expr, sympy.Add) else aten.mul.Tensor
        size, rest = expr.as_independent(*[a for a in expr.args if reads_tensors(a)], as_Add=expr.is_Add)
        parts = [number(a, axes, maker) for a in type(expr).make_args(rest)]
        if size != (0 if expr.is_Add else 1):
            parts.append(maker.size(size))
        return reduce(lambda x, y: maker.call(target, x, y), parts)
    raise Unreadable(f"{expr} as a tensor")


def coordinate(axis: sympy.Symbol, axes: Axes, maker: Maker) -> Made:
    """0, 1, 2, ... along an axis, size 1 along the others."""
    size = maker.size(maker.extent(axis))
    x = maker.call(aten.arange.default, size, dtype=torch.int64, device=maker.device)
    return maker.call(aten.reshape.default, x, [size if a == axis else 1 for a in axes])


def entry(node: fx.Node, index: Sequence[Expr], axes: Axes, maker: Maker) -> Made:
    """`node[index]` over the axes: by slices where the index is `axis + c` in order, else by indexing."""
    x, rank = maker.tensor(node), g.rank(node)
    dims: list[tuple[Expr, Expr]] = []  # index and size of the dimensions that are left, from the last
    for d, (e, size) in reversed(list(enumerate(zip(index, map(size_expr, g.shape(node)), strict=True)))):
        if size == 1 or reads_tensors(e):
            dims.append((e, size))
        else:
            rank -= 1
            x = maker.call(aten.select.int, x, d - rank - 1, maker.size(e))
    dims.reverse()
    starts = _starts(dims, axes, maker)
    if starts is None:
        return _gathered(x, dims, axes, maker)
    have: list[Expr] = []
    for d, ((_, size), (axis, start)) in enumerate(zip(dims, starts, strict=True)):
        extent = maker.extent(axis) if axis is not None else size
        if size != extent or start != 0:
            ends = maker.size(start), maker.size(start + extent)
            x = maker.call(aten.slice.Tensor, x, d - rank, *ends, 1)
        have.append(extent)
    used = {axis for axis, _ in starts}
    want = [maker.extent(a) if a in used else sympy.Integer(1) for a in axes]
    return x if have == want else maker.call(aten.reshape.default, x, [maker.size(s) for s in want])


def _starts(
    dims: Sequence[tuple[Expr, Expr]], axes: Axes, maker: Maker
) -> list[tuple[sympy.Symbol | None, Expr]] | None:
    """(axis, c) for each dimension that is indexed by axis + c, (None, 0) for size 1; else None."""
    found: list[tuple[sympy.Symbol | None, Expr]] = []
    for e, size in dims:
        if size == 1:
            found.append((None, sympy.Integer(0)))
            continue
        axis = next((a for a in axes if e.has(a)), None)
        if axis is None or reads_tensors(e - axis) or not never_negative(e - axis, Space(maker.form.sizes)):
            return None
        found.append((axis, e - axis))
    order = [axes.index(a) for a, _ in found if a is not None]
    return found if order == sorted(set(order)) else None


def _gathered(x: Made, dims: Sequence[tuple[Expr, Expr]], axes: Axes, maker: Maker) -> Made:
    for d in reversed(range(len(dims))):
        if dims[d][1] == 1:
            rank = len(dims) - sum(size == 1 for _, size in dims[d + 1 :])
            x = maker.call(aten.select.int, x, d - rank, 0)
    return maker.call(aten.index.Tensor, x, [number(e, axes, maker) for e, size in dims if size != 1])


# ------------------------------------------------------------------------------------------- in a graph


def arguments(form: MaskForm, made: MutableMapping[MaskForm, MaskArguments] | None = None) -> MaskArguments:
    """The form as arguments of `ops.attention`; new nodes go right behind the mask, before its readers.

    made: what was made so far; pass one dict for all layers, then a mask that they share is made once.
    Raises Unreadable where a symbolic size cannot be found in the graph.
    """
    if made is not None and form in made:
        return made[form]
    maker = graph_maker(form)
    result = MaskArguments(
        causal=form.causal,
        offset=maker.size(sympy.sympify(form.offset)),  # type: ignore[arg-type]  # a graph's maker makes nodes
        offset_tensor=form.offset_tensor,
        window=None if form.window is None else maker.size(sympy.sympify(form.window)),  # type: ignore[arg-type]
        key_padding=key_padding(form, maker),  # type: ignore[arg-type]
        bias=bias(form, maker),  # type: ignore[arg-type]
        empty_rows_mean=form.additive_fill is not None,
    )
    if made is not None:
        made[form] = result
    return result


def graph_maker(form: MaskForm) -> Maker:
    """A maker that appends calls behind the mask. Its `size` raises Unreadable where no node has it."""
    graph, anchor = form.mask.graph, form.mask
    if anchor.op == "placeholder":
        anchor = g.placeholders(graph)[-1]
    before = anchor.next
    mode = fake_mode_of([g.val(form.mask)])
    assert mode is not None, "a graph's values are fake tensors"

    def call(target: Callable[..., object], *args: object, **kwargs: object) -> fx.Node:
        args, kwargs = with_defaults(target, args, kwargs)
        with graph.inserting_before(before):
            node = graph.call_function(target, args, kwargs)  # type: ignore[arg-type]  # nodes and literals
        values, named = fx.node.map_arg((node.args, node.kwargs), g.val)  # type: ignore[arg-type]  # values of nodes
        with no_dispatch_of(mode):
            g.set_val(node, target(*values, **named))
        g.copy_provenance(node, form.mask)
        return node

    def size(expr: Expr) -> int | fx.Node:
        if expr.is_number:
            return int(expr)
        for node in graph.nodes:
            if node is before:
                break
            if isinstance(g.val(node), torch.SymInt) and g.number(node) == expr:
                return node
        for node in g.placeholders(graph):
            sizes = [size_expr(s) for s in g.shape(node)] if g.is_tensor(node) else []
            if expr in sizes:
                return call(aten.sym_size.int, node, sizes.index(expr))
        for kind, target in ((sympy.Add, operator.add), (sympy.Mul, operator.mul)):
            if isinstance(expr, kind):
                return reduce(lambda x, y: call(target, x, y), map(size, expr.args))
        raise Unreadable(f"no node of the graph holds the size {expr}")

    return Maker(form, g.device(form.mask), call, lambda n: n, size)


def with_defaults(
    target: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Arguments in canonical form: positional and keyword-only ones complete by schema."""
    given = list(args)
    named = dict(kwargs)
    for i, argument in enumerate(g.schema_arguments(target)):
        if argument.kwarg_only:
            named.setdefault(argument.name, argument.default_value)
        elif i >= len(given):
            given.append(argument.default_value)
    return tuple(given), named
