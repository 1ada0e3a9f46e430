"""A rule is an equation between two plain functions: pattern(...) == replacement(...).

    rule(hand_silu, lambda x: ops.activation(x, "silu"), x=T("... n"))

Both sides are traced (`rule_trace`) and canonicalised by the pass that canonicalises models, once for each
choice of dtypes (a *variant*): a cast that vanishes in an fp32 model vanishes in the fp32 variant, too. What
the trace leaves as a literal is an expression of named dimensions and is unified with the model's, never
wild-carded and never burnt in.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import fx

from graphopt.errors import RuleError

if TYPE_CHECKING:
    from graphopt.binding import Binding

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Guard: TypeAlias = "Callable[[Binding], str | None]"
# The pass that brings models to one spelling, handed down: patterns go through the same one.
Canonicalise: TypeAlias = "Callable[[fx.GraphModule], None]"


# ------------------------------------------------------------------------------------------------ parameters


@dataclass(frozen=True)
class T:
    """A tensor parameter.

    Args:
        dims: names of its dimensions, as `"b h s d"`; equal names are equal sizes. A leading `...` is any
            number of dimensions; `"b|1"` may also be 1 where it is broadcast (`"...|1 n"`: the leading
            ones); `"h*d"` is a product; a number is itself.
        dtype: a variable ("T", the rule's main float dtype; "W", another one), or `"bool"`, `"int64"`,
            `"complex64"`.
        optional: whether None also fits; the rule then has a variant with it and one without.
        below: of integers that index a dimension: its name. The equation holds for 0 .. its size - 1, which
            is all that a model may give; tests draw from there.
    """

    dims: str
    dtype: str = "T"
    optional: bool = False
    below: str = ""


@dataclass(frozen=True)
class Float:
    """A float parameter: a literal of the model, or a node under `dynamic=True`; traced near its sample."""

    sample: float


@dataclass(frozen=True)
class Int:
    """An integer parameter: a literal or a symbolic size. A dimension of the same name is the same number."""

    sample: int


@dataclass(frozen=True)
class Text:
    """A string parameter of one of our ops, as `kind`; the sample has to be a value that the op takes."""

    sample: str


Spec: TypeAlias = "T | Float | Int | Text"


@dataclass(frozen=True)
class Rule:
    """pattern(*parameters) == replacement(*parameters), for tensors that fit `specs` and pass `guard`.

    Attributes:
        carry: argument names of our ops that the pattern leaves open: whatever the model has there moves to
            the replacement's argument of that name (`attention`'s masks while it swallows a repeat).
        guard: looks at a complete binding; returns None, or why the rule does not apply.
    """

    pattern: Callable[..., object]
    replacement: Callable[..., object]
    specs: Mapping[str, Spec]
    carry: tuple[str, ...] = ()
    guard: Guard | None = None

    @property
    def name(self) -> str:
        """The pattern's name, which says who writes it so."""
        return self.pattern.__name__

    def dtype_variables(self) -> tuple[str, ...]:
        """The names of its float dtypes: "T", "W"."""
        return tuple(sorted({s.dtype for s in self.specs.values() if isinstance(s, T) and len(s.dtype) == 1}))

    def functions(self) -> tuple[Callable[..., object], ...]:
        """The functions that say what the rule is."""
        return (self.pattern, self.replacement, *(() if self.guard is None else (self.guard,)))

    def fixed_dtypes(self) -> frozenset[torch.dtype]:
        """The float dtypes that it names outright: a model without them has no such match."""
        specs = (s for s in self.specs.values() if isinstance(s, T) and len(s.dtype) > 1)
        return frozenset(d for s in specs if (d := getattr(torch, s.dtype)).is_floating_point)

    def optional(self) -> tuple[str, ...]:
        """The parameters that may be None."""
        return tuple(name for name, s in self.specs.items() if isinstance(s, T) and s.optional)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def rule(
    pattern: Callable[..., object],
    replacement: Callable[..., object],
    shared: Mapping[str, Spec] | None = None,
    *,
    carry: Sequence[str] = (),
    guard: Guard | None = None,
    **specs: Spec,
) -> Rule:
    """Make a rule. Nothing is traced yet: `variants` does that, on first use.

    Args:
        shared: specs of parameters that several rules have alike; those of this rule alone are keywords.
            A parameter that has a default may go without a spec.

    Raises:
        RuleError: a parameter of the pattern has no spec, or a spec no parameter.
    """
    names = pattern.__code__.co_varnames[: pattern.__code__.co_argcount]
    needed = names[: len(names) - len(pattern.__defaults__ or ())]
    given = {**(shared or {}), **specs}
    if not set(needed) <= set(given) <= set(names):
        raise RuleError(
            f"{pattern.__name__} takes {names}, but specs are given for {tuple(given)}; name each once"
        )
    ordered = {name: given[name] for name in names if name in given}
    return Rule(pattern, replacement, MappingProxyType(ordered), tuple(carry), guard)


# --------------------------------------------------------------------------------------------- traced forms


@dataclass(frozen=True)
class Symbolic:
    """A size or a scalar of the trace, as an expression of dimensions and parameters: `head_dim // 2`."""

    text: str
    names: tuple[str, ...]  # the names that it mentions

    @property
    def is_name(self) -> bool:
        """Whether it is one bare name, so that meeting a value binds it."""
        return self.names == (self.text,)


@dataclass(frozen=True)
class Carried:
    """An open argument: matches anything, which moves to the replacement's argument of that name."""

    name: str


@dataclass(frozen=True)
class Parameter:
    """A Text parameter where it occurs."""

    name: str


@dataclass(eq=False)
class Part:
    """A node of a traced side: a call, or a leaf (a tensor parameter)."""

    target: object
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    leaf: str = ""  # the parameter's name, for a leaf
    shape: tuple[object, ...] = ()  # a leaf's dimensions: ints, Symbolic, or (Symbolic, 1) where 1 fits, too
    dtype: torch.dtype | None = (
        None  # of a leaf, or of a call's result where nothing that is carried decides it
    )
    ellipsis: bool = False  # a leaf with any number of leading dimensions
    broadcast: bool = False  # whose leading dimensions may be 1 or absent
    name: str = ""

    def parts(self) -> list[Part]:
        """The parts that this one reads, in order."""
        return [p for p in _leaves((self.args, tuple(self.kwargs.values()))) if isinstance(p, Part)]


@dataclass(frozen=True)
class Side:
    """One traced side of the equation: its outputs, and its parts in topological order."""

    outputs: tuple[object, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Variant:
    """A rule traced for one choice of dtypes and of optional parameters."""

    rule: Rule
    dtypes: tuple[tuple[str, torch.dtype], ...]
    absent: tuple[str, ...]
    pattern: Side
    replacement: Side

    @property
    def anchor(self) -> Part:
        """Where matching starts: the pattern's first output."""
        part = self.pattern.outputs[0]
        assert isinstance(part, Part)
        return part


def variants(rule: Rule, dtypes: Iterable[torch.dtype], canonicalise: Canonicalise) -> tuple[Variant, ...]:
    """The rule's variants for a model that uses these float dtypes; equal ones once, the longest first.

    None where the rule names a float dtype outright that the model does not use.

    Raises:
        RuleError: the pattern leaves no trace of a parameter, or is no graph of calls.
    """
    present = tuple(d for d in FLOATS if d in set(dtypes))
    if not rule.fixed_dtypes() <= set(present):
        return ()
    variables, optional = rule.dtype_variables(), rule.optional()
    found: dict[str, Variant] = {}
    for choice in itertools.product(present, repeat=len(variables)):
        for missing in itertools.product((False, True), repeat=len(optional)):
            absent = tuple(n for n, gone in zip(optional, missing, strict=True) if gone)
            variant = _variant(rule, tuple(zip(variables, choice, strict=True)), absent, canonicalise)
            found.setdefault(_text(variant), variant)
    # The longest first: a variant without the cast of a weight also fits where the cast is.
    return tuple(sorted(found.values(), key=lambda v: -len(v.pattern.parts)))


@functools.cache
def _variant(
    rule: Rule,
    dtypes: tuple[tuple[str, torch.dtype], ...],
    absent: tuple[str, ...],
    canonicalise: Canonicalise,
) -> Variant:
    from graphopt.rule_trace import trace_sides  # it reads this file's types

    pattern, replacement = trace_sides(rule, dict(dtypes), absent, canonicalise)
    if not pattern.outputs or not all(isinstance(p, Part) and not p.leaf for p in pattern.outputs):
        raise RuleError(f"{rule.name}: the pattern has to compute each of its outputs")
    if len(pattern.outputs) != len(replacement.outputs):
        raise RuleError(
            f"{rule.name}: the pattern has {len(pattern.outputs)} outputs, "
            f"the replacement {len(replacement.outputs)}"
        )
    _check_traces(rule, pattern, absent)
    return Variant(rule, dtypes, absent, pattern, replacement)


def _check_traces(rule: Rule, side: Side, absent: tuple[str, ...]) -> None:
    """Every parameter has to leave a trace, or matching could not bind it."""
    seen = {p.leaf for p in side.parts if p.leaf}
    for value in (v for p in side.parts for v in _leaves((p.args, tuple(p.kwargs.values())))):
        if isinstance(value, Symbolic):
            seen.update(value.names)
        if isinstance(value, Parameter):
            seen.add(value.name)
    lost = [n for n in rule.specs if n not in seen and n not in absent]
    if lost:
        raise RuleError(
            f"{rule.name}: parameter {lost[0]!r} leaves no trace in the pattern; use it or drop it"
        )


def _leaves(value: object) -> Iterable[object]:
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from _leaves(v)
    else:
        yield value


def _text(variant: Variant) -> str:
    """A text that is equal for equal variants."""
    number = {p: i for side in (variant.pattern, variant.replacement) for i, p in enumerate(side.parts)}

    def show(value: object) -> str:
        if isinstance(value, Part):
            return f"%{number[value]}"
        if isinstance(value, tuple):
            return f"({','.join(show(v) for v in value)})"
        return repr(value)

    lines = []
    for side in (variant.pattern, variant.replacement):
        for p in side.parts:
            kwargs = ",".join(f"{k}={show(v)}" for k, v in p.kwargs.items())
            lines.append(
                f"{p.leaf}|{p.target}|{show(p.args)}|{kwargs}|{show(p.shape)}|{p.dtype if p.leaf else ''}"
            )
        lines.append(show(side.outputs))
    return "\n".join(lines)
