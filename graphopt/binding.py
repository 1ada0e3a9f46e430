"""What a pattern's parts and names stand for in a model, and how far an attempt to bind them came."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx

from graphopt import graph as g
from graphopt.listing import describe, short_dtype
from graphopt.rule import Carried, Parameter, Part, Symbolic
from graphopt.torch_private import OpOverload


@dataclass
class Binding:
    """What a pattern's parts and names stand for in the model. Guards read it by name."""

    nodes: dict[Part, fx.Node] = field(default_factory=dict)
    leaves: dict[str, object] = field(default_factory=dict)  # tensor parameter -> node
    names: dict[str, object] = field(default_factory=dict)  # dimension -> size; scalar -> literal or node
    carried: dict[str, object] = field(default_factory=dict)
    lead: tuple[object, ...] | None = None  # what `...` stands for
    assumed: list[tuple[torch.SymFloat, float]] = field(
        default_factory=list
    )  # graph values taken for literals

    def __getitem__(self, name: str) -> object:
        """A parameter's node or literal, or a dimension's size."""
        return self.leaves[name] if name in self.leaves else self.names[name]

    def number(self, name: str) -> object:
        """A dimension or scalar as a number: an int, a float, or a sympy expression."""
        return g.number(self.names[name])


class Miss(NamedTuple):
    """Where an attempt stopped: how many parts had matched, and why the next did not; worded when asked.

    `guard` names what refused a match that was complete: a rule's guard, or a check of every match.
    """

    depth: int
    node: fx.Node
    text: str = ""
    want: object = None
    have: object = None
    guard: str = ""

    @property
    def reason(self) -> str:
        """Why, naming what was expected and what was found."""
        return self.text or f"expected {shown(self.want)}, found {shown(self.have)}"

    @property
    def expected(self) -> str:
        """What the pattern has there: `aten.rsqrt`, `weight [n] f32`; empty where a guard refused."""
        want, _ = self._differing()
        if self.guard:
            return ""
        if self.text and isinstance(want, (str, Symbolic)):  # a name alone says less
            return self.text
        return described(want)

    @property
    def found(self) -> str:
        """What the model has there: `aten.sqrt (sqrt_3) [2,7,1] f32`; empty where a guard refused."""
        return "" if self.guard else described(self._differing()[1])

    def _differing(self) -> tuple[object, object]:
        """Of two calls of one operator, the first operands that differ, or their dtypes."""
        want, have = self.want, self.have
        if not isinstance(want, Part) or want.leaf or not g.is_call(have, want.target):
            return want, have
        assert isinstance(have, fx.Node)
        value = g.tensor(have)
        if want.dtype is not None and value is not None and value.dtype != want.dtype:
            return want.dtype, have
        operands = zip(want.args, have.args, strict=False)
        return next(((a, x) for a, x in operands if cannot_be(a, x)), (want, have))


def cannot_be(want: object, have: object) -> bool:
    """Whether a call of the pattern is plainly another call than the model's."""
    return (
        isinstance(want, Part)
        and not want.leaf
        and (not isinstance(have, fx.Node) or have.target != want.target)
    )


def evaluate(want: Symbolic, names: Mapping[str, object]) -> object:
    """An expression of names as a number, or as a sympy expression of the model's symbolic sizes."""
    values = [g.operand(names[n]) for n in want.names]
    return g.expression(_compiled(want)(*values))


@functools.cache
def _compiled(want: Symbolic) -> Callable[..., object]:
    """An expression as a Python function of its names. The text is made by `rule_trace`, never by a user."""
    arguments = [n.replace("|1", "_or_1") for n in want.names]
    text = want.text.replace("|1", "_or_1")
    function: Callable[..., object] = eval(f"lambda {', '.join(arguments)}: {text}", {"__builtins__": {}})
    return function


def shown(value: object) -> str:
    """A pattern's or a model's argument in a reason."""
    if isinstance(value, Part):
        return value.leaf or target_name(value.target)
    if isinstance(value, fx.Node):
        return f"{g.op_name(value)} ({value.name})"
    if isinstance(value, Symbolic):
        return value.text
    if isinstance(value, (Carried, Parameter)):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(shown(v) for v in value)}]"
    return repr(value)


def described(value: object) -> str:
    """As `shown`, with the dimensions and dtype of a tensor."""
    if isinstance(value, Part) and value.leaf:
        dims = ["..."] * value.ellipsis + [_dimension(d) for d in value.shape[2 * value.ellipsis :]]
        return f"{value.leaf} [{','.join(dims)}]" + (f" {short_dtype(value.dtype)}" if value.dtype else "")
    if isinstance(value, fx.Node):
        return f"{shown(value)} {describe(g.val(value))}".rstrip()
    return short_dtype(value) if isinstance(value, torch.dtype) else shown(value)


def _dimension(dim: object) -> str:
    return "|".join(map(shown, dim)) if isinstance(dim, tuple) else shown(dim)


def target_name(target: object) -> str:
    """An operator in a reason: `aten.mul`."""
    return target._schema.name.replace("::", ".") if isinstance(target, OpOverload) else str(target)
