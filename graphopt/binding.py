"""What a pattern's parts and names stand for in a model, and how far an attempt to bind them came."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx

from graphopt import graph as g
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
    """Where an attempt stopped: how many parts had matched, and why the next did not; worded when asked."""

    depth: int
    node: fx.Node
    text: str = ""
    want: object = None
    have: object = None

    @property
    def reason(self) -> str:
        """Why, naming what was expected and what was found."""
        return self.text or f"expected {shown(self.want)}, found {shown(self.have)}"


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
        return value.leaf or _target_name(value.target)
    if isinstance(value, fx.Node):
        return f"{g.op_name(value)} ({value.name})"
    if isinstance(value, Symbolic):
        return value.text
    if isinstance(value, (Carried, Parameter)):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(shown(v) for v in value)}]"
    return repr(value)


def _target_name(target: object) -> str:
    return target._schema.name.replace("::", ".") if isinstance(target, OpOverload) else str(target)
