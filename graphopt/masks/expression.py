"""Read a node's value at a symbolic index: the mask as a formula over (batch, head, query, key)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import sympy
import torch
from torch import fx

from graphopt import graph as g
from graphopt.masks.term import (
    AXES,
    ZERO,
    Choice,
    Entry,
    Expr,
    Number,
    Real,
    Space,
    Sum,
    Unreadable,
    Value,
    as_float,
    by_case,
    element,
    literal,
    rounded,
)

Index: TypeAlias = "tuple[Expr, ...]"


@dataclass
class Reading:
    """One reading of a mask: what it saw on the way, so that the probe knows where to cut the graph.

    `opened` are the nodes read through, `leaves` those taken as they are, by name.
    """

    space: Space
    rules: dict[object, Rule]
    opened: set[fx.Node] = field(default_factory=set)
    leaves: dict[str, fx.Node] = field(default_factory=dict)
    memo: dict[tuple[fx.Node, Index], Value] = field(default_factory=dict)

    def at(self, node: fx.Node, index: Index) -> Value:
        """The value of `node[index]`: read through the node where a rule can, else the element itself."""
        sizes = map(g.expression, g.shape(node))
        index = tuple(ZERO if s == 1 else sympy.expand(e) for s, e in zip(sizes, index, strict=True))
        key = (node, index)
        if key not in self.memo:
            self.memo[key] = self._read(node, index)
        return self.memo[key]

    def _read(self, node: fx.Node, index: Index) -> Value:
        rule = self.rules.get(node.target if node.op == "call_function" else node.op)
        if rule is None:
            return self.leaf(node, index)
        try:
            value = rule(self, node, index)
        except Unreadable:
            return self.leaf(node, index)
        self.opened.add(node)
        return value

    def leaf(self, node: fx.Node, index: Index) -> Value:
        """The element itself. Raises Unreadable for complex tensors."""
        if g.dtype(node).is_complex:
            raise Unreadable("complex")
        self.leaves[node.name] = node
        if g.dtype(node) == torch.bool or g.dtype(node).is_floating_point:
            return Entry(node, index)
        return Number(element(node, index))

    def operand(self, argument: object, index: Index) -> Value:
        """A pointwise operand at the output's index: a tensor broadcast to it, a size, or a literal.

        Raises Unreadable for anything else.
        """
        if g.is_tensor(argument):
            assert isinstance(argument, fx.Node)
            return self.at(argument, index[len(index) - g.rank(argument) :])
        number = g.number(argument)
        if isinstance(number, (bool, int, float)):
            return literal(number)
        if isinstance(number, sympy.Expr) and number.is_integer:
            return Number(number)
        raise Unreadable(f"operand {argument}")


Rule: TypeAlias = "Callable[[Reading, fx.Node, Index], Value]"


def integer(value: Value) -> Expr:
    """The integer expression that a value is. Raises Unreadable for anything else."""
    if not isinstance(value, Number):
        raise Unreadable("not an integer")
    return value.expr


def size_expr(size: object) -> Expr:
    """A size argument (int, SymInt or the node that holds one) as an expression; else raises Unreadable."""
    number = g.number(size)
    if isinstance(number, (int, sympy.Expr)):
        return sympy.sympify(number)
    raise Unreadable(f"size {size}")


def in_dtype(value: Value, dtype: torch.dtype) -> Value:
    """A numeric value as dtype holds it: literals are rounded, integers that may be inexact are refused.

    Indices are exact in fp32 up to 2^24; in bf16 only up to 256, so half dtypes carry literals alone.

    Raises Unreadable for what is refused, and for a real number that a dtype of integers is to hold.
    """
    if isinstance(value, Choice):
        return by_case(lambda v: in_dtype(v, dtype), value)
    number = as_float(value)
    if number is not None and dtype.is_floating_point:
        return literal(rounded(number, dtype))
    if isinstance(value, Real):
        raise Unreadable(f"{value.value} as {dtype}")
    if isinstance(value, Number) and dtype in (torch.int64, torch.int32, torch.float32, torch.float64):
        return value
    if isinstance(value, (Entry, Sum)) and dtype.is_floating_point:
        return value
    if number is not None and 0 <= number < 128:
        return value
    raise Unreadable(f"inexact in {dtype}")


def coordinates(rank: int) -> Index:
    """The output index of a tensor of that rank, aligned right: (i, j) for rank 2."""
    return AXES[4 - rank :]
