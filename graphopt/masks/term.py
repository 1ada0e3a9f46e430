"""The small language in which a mask is read: truths and numbers about (batch, head, query, key)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from graphopt import graph as g

Expr: TypeAlias = sympy.Expr

# The output index. A size-1 dimension is always read at 0, so its axis never occurs.
AXES = tuple(sympy.Symbol(f"{name}_index", integer=True, nonnegative=True) for name in ("b", "h", "i", "j"))
BATCH, HEAD, QUERY, KEY = AXES
ZERO = sympy.Integer(0)
EXACT = 2**31  # float literals below it that are whole are read as integers; fills such as -3.4e38 are not
MAX_CASES = 16  # a mask of more nested cases is no mask that anybody writes; it stays a tensor


class Unreadable(Exception):
    """A value that this language cannot say; whoever asked takes the tensor as it is (a leaf)."""


@dataclass(frozen=True)
class Known:
    """True or False everywhere."""

    value: bool


@dataclass(frozen=True)
class Entry:
    """`node[index]`: an element of a tensor that is not read further. bool: a truth; float: a number."""

    node: fx.Node
    index: tuple[Expr, ...]


@dataclass(frozen=True)
class AtLeast:
    """`expr >= 0` over the integers."""

    expr: Expr


@dataclass(frozen=True)
class Zero:
    """`expr == 0` over the integers."""

    expr: Expr


@dataclass(frozen=True)
class Not:
    """Negation of an `Entry` or a `Zero`; other truths are negated by pushing it inwards."""

    of: Entry | Zero


@dataclass(frozen=True)
class All:
    """Conjunction of two truths or more."""

    of: tuple[Truth, ...]


@dataclass(frozen=True)
class Some:
    """Disjunction of two truths or more."""

    of: tuple[Truth, ...]


@dataclass(frozen=True)
class Number:
    """An integer: axes, sizes and elements of integer tensors (a sympy function named like the node)."""

    expr: Expr


@dataclass(frozen=True)
class Real:
    """A float literal that is no small integer: -inf, finfo.min, 0.5."""

    value: float


@dataclass(frozen=True)
class Choice:
    """`then` where `when` holds, else `other`."""

    when: Truth
    then: Value
    other: Value


@dataclass(frozen=True)
class Sum:
    """Cases of literals plus a float leaf: `where(keep, 0, -inf) + position_bias`."""

    cases: Value
    leaf: Entry


Truth: TypeAlias = "Known | Entry | AtLeast | Zero | Not | All | Some"
Value: TypeAlias = "Truth | Number | Real | Choice | Sum"

TRUE, FALSE = Known(True), Known(False)


@dataclass(frozen=True)
class Space:
    """The sizes (B, H, Q, K) of the output index, each an integer or an expression of sizes."""

    sizes: tuple[Expr, Expr, Expr, Expr]


# --------------------------------------------------------------------------------------------- bounds


def coefficient(expr: Expr, axis: sympy.Symbol) -> Expr | None:
    """c where expr is c * axis + (no axis), c a number; None where it is not of that form."""
    expr = sympy.expand(expr)
    c = expr.coeff(axis, 1)
    return c if c.is_number and not (expr - c * axis).has(axis) else None


def least(expr: Expr, space: Space) -> Expr | None:
    """The least value over the whole index, itself an expression of sizes and leaves; None where unknown."""
    for axis, size in zip(AXES, space.sizes, strict=True):
        if not expr.has(axis):
            continue
        c = coefficient(expr, axis)
        if c is None:
            return None
        expr = expr.subs(axis, size - 1 if c < 0 else 0)
    return sympy.expand(expr)


def never_negative(expr: Expr, space: Space) -> bool:
    """Whether expr >= 0 at every index, as far as integer arithmetic over the sizes shows it."""
    low = least(sympy.expand(expr), space)
    return low is not None and low.is_nonnegative is True


# --------------------------------------------------------------------------------------------- truths


def at_least(expr: Expr, space: Space) -> Truth:
    """`expr >= 0`, decided where the sizes decide it; `c - |x| >= 0` becomes the two bounds of x."""
    expr = sympy.expand(expr)
    if never_negative(expr, space):
        return TRUE
    if never_negative(-expr - 1, space):
        return FALSE
    for magnitude in expr.atoms(sympy.Abs):
        if expr.coeff(magnitude, 1) == -1 and not (expr + magnitude).has(magnitude):
            inner, bound = magnitude.args[0], expr + magnitude
            return all_of(at_least(bound - inner, space), at_least(bound + inner, space))
    return AtLeast(expr)


def zero(expr: Expr, space: Space) -> Truth:
    """`expr == 0`, decided where the sizes decide it."""
    expr = sympy.expand(expr)
    if expr.is_number:
        return Known(bool(expr == 0))
    if never_negative(expr - 1, space) or never_negative(-expr - 1, space):
        return FALSE
    return Zero(-expr if expr.could_extract_minus_sign() else expr)


def negate(truth: Truth) -> Truth:
    """not truth, negations pushed to the leaves."""
    if isinstance(truth, Known):
        return Known(not truth.value)
    if isinstance(truth, Not):
        return truth.of
    if isinstance(truth, AtLeast):
        return AtLeast(sympy.expand(-truth.expr - 1))
    if isinstance(truth, All):
        return any_of(*map(negate, truth.of))
    if isinstance(truth, Some):
        return all_of(*map(negate, truth.of))
    return Not(truth)


def _joined(truths: tuple[Truth, ...], kind: type[All] | type[Some]) -> Truth:
    ends = Known(kind is Some)  # the value that decides: True for any, False for all
    flat: dict[Truth, None] = {}
    for truth in truths:
        flat.update(dict.fromkeys(truth.of if isinstance(truth, kind) else (truth,)))
    if ends in flat:
        return ends
    flat.pop(negate(ends), None)
    if not flat:
        return negate(ends)
    return next(iter(flat)) if len(flat) == 1 else kind(tuple(flat))


def all_of(*truths: Truth) -> Truth:
    """Conjunction: flat, without True and repetitions."""
    return _joined(truths, All)


def any_of(*truths: Truth) -> Truth:
    """Disjunction: flat, without False and repetitions."""
    return _joined(truths, Some)


def conjuncts(truth: Truth) -> tuple[Truth, ...]:
    """The truths whose conjunction it is; none for True."""
    if truth == TRUE:
        return ()
    return truth.of if isinstance(truth, All) else (truth,)


def either(when: Truth, then: Truth, other: Truth) -> Truth:
    """when ? then : other, as few connectives as the constants allow."""
    if then == other:
        return then
    if then == TRUE:
        return any_of(when, other)
    if other == TRUE:
        return any_of(negate(when), then)
    return any_of(all_of(when, then), all_of(negate(when), other))


# -------------------------------------------------------------------------------------------- numbers


def literal(value: float) -> Value:
    """A Python number: an integer where it is one of index size, else a float literal."""
    if math.isfinite(value) and value == int(value) and abs(value) < EXACT:
        return Number(sympy.Integer(int(value)))
    return Real(float(value))


@functools.cache
def rounded(value: float, dtype: torch.dtype) -> float:
    """The number after a trip through dtype: fp32's finfo.min is -inf in bf16."""
    return float(torch.tensor(value, dtype=torch.float64).to(dtype).item())


def as_float(value: Value) -> float | None:
    """A literal's number; None for anything that depends on the index or on leaves."""
    if isinstance(value, Real):
        return value.value
    if isinstance(value, Number) and value.expr.is_number:
        return float(value.expr)
    return None


def choice(when: Truth, then: Value, other: Value) -> Value:
    """when ? then : other. `where(x != 0, fill, x)` is read as `where(x == 0, 0, fill)`."""
    if isinstance(when, Known):
        return then if when.value else other
    if isinstance(when, Not):
        when, then, other = when.of, other, then
    then = then.then if isinstance(then, Choice) and then.when == when else then
    other = other.other if isinstance(other, Choice) and other.when == when else other
    if isinstance(when, Zero) and isinstance(then, Number):
        if sympy.expand(then.expr - when.expr) == 0 or sympy.expand(then.expr + when.expr) == 0:
            then = Number(ZERO)
    return then if then == other else Choice(when, then, other)


def cases(value: Value) -> int:
    """How many cases a value distinguishes."""
    return cases(value.then) + cases(value.other) if isinstance(value, Choice) else 1


def by_case(function: Callable[[Value], Value], value: Value) -> Value:
    """function(value), taken into the branches of a choice."""
    if not isinstance(value, Choice):
        return function(value)
    return choice(value.when, by_case(function, value.then), by_case(function, value.other))


def by_cases(function: Callable[[Value, Value], Value], x: Value, y: Value) -> Value:
    """function(x, y), taken into the branches of choices on both sides.

    Raises Unreadable beyond `MAX_CASES` cases.
    """
    if cases(x) * cases(y) > MAX_CASES:
        raise Unreadable(f"more than {MAX_CASES} cases")
    return by_case(lambda a: by_case(lambda b: function(a, b), y), x)


# ------------------------------------------------------------------------------------------- contents


def is_truth(value: Value) -> bool:
    """Whether a value is a truth; an `Entry` is one when its tensor is bool."""
    if isinstance(value, Entry):
        return g.dtype(value.node) == torch.bool
    return isinstance(value, (Known, AtLeast, Zero, Not, All, Some))


def element(node: fx.Node, index: tuple[Expr, ...]) -> Expr:
    """An element of an integer tensor as a term of integer arithmetic."""
    return sympy.Function(node.name, integer=True)(*index)


def expressions(value: Value) -> Iterator[Expr]:
    """Every integer expression that occurs in a value."""
    if isinstance(value, Entry):
        yield from value.index
    elif isinstance(value, (AtLeast, Zero, Number)):
        yield value.expr
    elif isinstance(value, Not):
        yield from expressions(value.of)
    elif isinstance(value, (All, Some)):
        for part in value.of:
            yield from expressions(part)
    elif isinstance(value, Choice):
        for piece in (value.when, value.then, value.other):
            yield from expressions(piece)
    elif isinstance(value, Sum):
        yield from expressions(value.cases)
        yield from value.leaf.index


def axes_of(value: Value) -> frozenset[sympy.Symbol]:
    """The axes that a value depends on."""
    return frozenset(s for e in expressions(value) for s in e.free_symbols if s in AXES)


def elements(expr: Expr) -> set[AppliedUndef]:
    """The elements of integer tensors that an expression reads."""
    return expr.atoms(AppliedUndef)
