"""How pointwise operators read at an index: `le(a, b)` is `b - a >= 0`, `where(c, 0, -inf)` is a choice."""

from __future__ import annotations

import math
from collections.abc import Callable

import sympy
import torch
from torch import fx

from graphopt import graph as g
from graphopt.masks.expression import Index, Reading, Rule, in_dtype, integer, size_expr
from graphopt.masks.term import (
    FALSE,
    ZERO,
    Choice,
    Entry,
    Known,
    Number,
    Real,
    Space,
    Sum,
    Truth,
    Unreadable,
    Value,
    all_of,
    any_of,
    as_float,
    at_least,
    by_case,
    by_cases,
    choice,
    either,
    is_truth,
    literal,
    negate,
    never_negative,
    zero,
)

aten = torch.ops.aten


# -------------------------------------------------------------------------------------- truth <-> number


def as_truth(value: Value, space: Space) -> Truth:
    """`value != 0`. Raises Unreadable for float leaves."""
    if is_truth(value):
        return value  # type: ignore[return-value]  # is_truth
    if isinstance(value, Choice):
        return either(value.when, as_truth(value.then, space), as_truth(value.other, space))
    if isinstance(value, Number):
        return negate(zero(value.expr, space))
    if isinstance(value, Real):
        return Known(value.value != 0)
    raise Unreadable("a float leaf as a truth")


def as_number(value: Value) -> Value:
    """A truth as 0 or 1; numbers as they are."""
    if not is_truth(value):
        return value
    return choice(value, Number(sympy.Integer(1)), Number(ZERO))  # type: ignore[arg-type]  # is_truth


def cast(value: Value, dtype: torch.dtype, space: Space) -> Value:
    """A value as another dtype holds it. Raises Unreadable for a float leaf that the dtype rounds."""
    if dtype == torch.bool:
        return as_truth(value, space)
    if isinstance(value, Entry) and not is_truth(value):
        raise Unreadable("a rounded float leaf is a leaf of its own")
    return in_dtype(as_number(value), dtype)


# ------------------------------------------------------------------------------------------- comparisons


def compared(x: Value, y: Value, above: int, space: Space) -> Truth:
    """`x >= y` (above 0) or `x > y` (above 1) over integers, a float literal allowed on one side."""
    a, b = as_float(x), as_float(y)
    if a is not None and b is not None:
        return Known(a > b if above else a >= b)
    if isinstance(y, Real) and math.isfinite(y.value):
        return at_least(integer(x) - (math.floor(y.value) + 1 if above else math.ceil(y.value)), space)
    if isinstance(x, Real) and math.isfinite(x.value):
        return at_least((math.ceil(x.value) - 1 if above else math.floor(x.value)) - integer(y), space)
    return at_least(integer(x) - integer(y) - above, space)


def equal(x: Value, y: Value, space: Space) -> Truth:
    """`x == y` over integers, a float literal allowed on one side."""
    a, b = as_float(x), as_float(y)
    if a is not None and b is not None:
        return Known(a == b)
    if isinstance(x, Real) or isinstance(y, Real):
        integer(y if isinstance(x, Real) else x)
        return FALSE  # an integer never is -inf, or 0.5
    return zero(integer(x) - integer(y), space)


def _truth_by_cases(test: Callable[[Value, Value], Truth], x: Value, y: Value) -> Truth:
    if isinstance(x, Choice):
        return either(x.when, _truth_by_cases(test, x.then, y), _truth_by_cases(test, x.other, y))
    if isinstance(y, Choice):
        return either(y.when, _truth_by_cases(test, x, y.then), _truth_by_cases(test, x, y.other))
    return test(x, y)


def comparison(test: Callable[[Value, Value, Space], Truth]) -> Rule:
    """The rule of a comparison operator."""

    def rule(reading: Reading, node: fx.Node, index: Index) -> Value:
        x, y = (as_number(reading.operand(a, index)) for a in node.args[:2])
        return _truth_by_cases(lambda p, q: test(p, q, reading.space), x, y)

    return rule


# ------------------------------------------------------------------------------------------------ logic


def logic(join: Callable[[Truth, Truth], Truth], bools_only: bool = False) -> Rule:
    """The rule of a logical operator; of the bits of integers it raises Unreadable."""

    def rule(reading: Reading, node: fx.Node, index: Index) -> Value:
        if bools_only and g.dtype(node) != torch.bool:
            raise Unreadable("bits of integers")
        x, y = (as_truth(reading.operand(a, index), reading.space) for a in node.args[:2])
        return join(x, y)

    return rule


def exclusive(x: Truth, y: Truth) -> Truth:
    """x != y."""
    return either(x, negate(y), y)


def logical_not(reading: Reading, node: fx.Node, index: Index) -> Value:
    """not x. Raises Unreadable for integers, whose bits are another thing."""
    if g.dtype(node) != torch.bool:
        raise Unreadable("bits of integers")
    return negate(as_truth(reading.operand(node.args[0], index), reading.space))


# ------------------------------------------------------------------------------------------- arithmetic


def plus(x: Value, y: Value, dtype: torch.dtype) -> Value:
    """x + y of two literals or two integers."""
    a, b = as_float(x), as_float(y)
    if a is not None and b is not None:
        return in_dtype(literal(a + b), dtype)
    return in_dtype(Number(integer(x) + integer(y)), dtype)


def times(x: Value, y: Value, dtype: torch.dtype) -> Value:
    """x * y of two literals or two integers."""
    a, b = as_float(x), as_float(y)
    if a is not None and b is not None:
        return in_dtype(literal(a * b), dtype)
    return in_dtype(Number(integer(x) * integer(y)), dtype)


def _add(x: Value, y: Value, dtype: torch.dtype) -> Value:
    """x + y. A float leaf stands beside the cases and does not enter them."""
    for p, q in ((x, y), (y, x)):
        if isinstance(p, Entry) and not isinstance(q, (Entry, Sum)):
            return Sum(in_dtype(q, dtype), p)
    if isinstance(x, Sum) or isinstance(y, Sum):
        leafy, other = (x, y) if isinstance(x, Sum) else (y, x)
        assert isinstance(leafy, Sum)
        if isinstance(other, (Entry, Sum)):
            raise Unreadable("two float leaves")
        return Sum(_add(leafy.cases, other, dtype), leafy.leaf)
    return by_cases(lambda p, q: plus(p, q, dtype), x, y)


def _scaled(value: Value, alpha: object, dtype: torch.dtype) -> Value:
    if alpha == 1:
        return value
    if not isinstance(alpha, (int, float)):
        raise Unreadable("symbolic alpha")
    return by_case(lambda v: times(v, literal(alpha), dtype), value)


def add(reading: Reading, node: fx.Node, index: Index) -> Value:
    """x + alpha * y; of bools: or."""
    x, y = (reading.operand(a, index) for a in node.args[:2])
    if g.dtype(node) == torch.bool:
        return any_of(as_truth(x, reading.space), as_truth(y, reading.space))
    return _add(as_number(x), _scaled(as_number(y), g.arg(node, "alpha"), g.dtype(node)), g.dtype(node))


def sub(reading: Reading, node: fx.Node, index: Index) -> Value:
    """x - alpha * y."""
    x, y = (as_number(reading.operand(a, index)) for a in node.args[:2])
    minus = _scaled(y, -1, g.dtype(node))
    return _add(x, _scaled(minus, g.arg(node, "alpha"), g.dtype(node)), g.dtype(node))


def rsub(reading: Reading, node: fx.Node, index: Index) -> Value:
    """y - alpha * x."""
    x, y = (as_number(reading.operand(a, index)) for a in node.args[:2])
    minus = _scaled(x, -1, g.dtype(node))
    return _add(y, _scaled(minus, g.arg(node, "alpha"), g.dtype(node)), g.dtype(node))


def mul(reading: Reading, node: fx.Node, index: Index) -> Value:
    """x * y; of bools: and."""
    x, y = (reading.operand(a, index) for a in node.args[:2])
    if g.dtype(node) == torch.bool:
        return all_of(as_truth(x, reading.space), as_truth(y, reading.space))
    return by_cases(lambda p, q: times(p, q, g.dtype(node)), as_number(x), as_number(y))


def neg(reading: Reading, node: fx.Node, index: Index) -> Value:
    """-x."""
    return _scaled(as_number(reading.operand(node.args[0], index)), -1, g.dtype(node))


def absolute(reading: Reading, node: fx.Node, index: Index) -> Value:
    """|x| of an integer."""
    return Number(sympy.Abs(integer(reading.operand(node.args[0], index))))


def floor_divide(reading: Reading, node: fx.Node, index: Index) -> Value:
    """x // c; 0 where the sizes say so: a chunk longer than the sequence. Raises Unreadable for other c."""
    if node.target in (aten.div.Tensor_mode, aten.div.Scalar_mode):
        if g.arg(node, "rounding_mode") != "floor":
            raise Unreadable("division that is not floored")
    x, c = (integer(reading.operand(a, index)) for a in node.args[:2])
    if never_negative(x, reading.space) and never_negative(c - 1 - x, reading.space):
        return Number(ZERO)
    if not (c.is_Integer and c > 0):
        raise Unreadable(f"a division by {c}")
    return Number(sympy.floor(sympy.expand(x / c)))


def clamp_min(reading: Reading, node: fx.Node, index: Index) -> Value:
    """max(x, c) of literals: of what an additive mask holds. Raises Unreadable for other numbers."""
    x, low = reading.operand(node.args[0], index), as_float(reading.operand(node.args[1], index))

    def larger(value: Value) -> Value:
        number = as_float(value)
        if number is None or low is None:
            raise Unreadable("the larger of numbers that are no literals")
        return literal(max(number, low))

    return by_case(larger, as_number(x))


def to_dtype(reading: Reading, node: fx.Node, index: Index) -> Value:
    """A cast, a copy, or a move."""
    value = reading.operand(node.args[0], index)
    source = node.args[0]
    if isinstance(source, fx.Node) and g.dtype(source) == g.dtype(node):
        return value
    return cast(value, g.dtype(node), reading.space)


# ------------------------------------------------------------------------------------------------ choice


def where(reading: Reading, node: fx.Node, index: Index) -> Value:
    """condition ? a : b."""
    condition, a, b = (reading.operand(x, index) for x in node.args[:3])
    return _chosen(as_truth(condition, reading.space), a, b, node)


def masked_fill(reading: Reading, node: fx.Node, index: Index) -> Value:
    """mask ? value : x."""
    x, mask, fill = (reading.operand(a, index) for a in node.args[:3])
    return _chosen(as_truth(mask, reading.space), fill, x, node)


def _chosen(when: Truth, then: Value, other: Value, node: fx.Node) -> Value:
    if g.dtype(node) == torch.bool:
        return either(when, _bool_of(then), _bool_of(other))
    value = choice(when, as_number(then), as_number(other))
    return by_case(lambda v: v if isinstance(v, Entry) else in_dtype(v, g.dtype(node)), value)


def _bool_of(value: Value) -> Truth:
    number = as_float(value)
    if number is not None:
        return Known(number != 0)
    if not is_truth(value):
        raise Unreadable("a number among truths")
    return value  # type: ignore[return-value]  # is_truth


def triangle(sign: int) -> Rule:
    """tril (sign 1) keeps column <= row + diagonal, triu (sign -1) keeps column >= row + diagonal; else 0."""

    def rule(reading: Reading, node: fx.Node, index: Index) -> Value:
        x = reading.operand(node.args[0], index)
        diagonal = size_expr(g.arg(node, "diagonal"))
        keep = at_least(sign * (index[-2] + diagonal - index[-1]), reading.space)
        if is_truth(x):
            return all_of(keep, x)  # type: ignore[arg-type]  # is_truth
        return choice(keep, x, Number(ZERO))

    return rule
