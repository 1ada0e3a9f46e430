"""Unify a pattern's leaves and literals with a model's, keeping a trail to take choices back by."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.binding import Binding, Miss, evaluate, shown
from graphopt.rule import Carried, Parameter, Part, Symbolic

Goal: TypeAlias = "tuple[object, object]"  # (what the pattern has, what the model has)
Goals: TypeAlias = "tuple[Goal, Goals] | None"
K = TypeVar("K")
V = TypeVar("V")
ROUNDED = 4e-16  # 1 / sqrt(2) and sqrt(1 / 2) differ in the last bit, 1.6e-16: one number, rounded twice


class Unifier:
    """A binding under construction."""

    def __init__(self) -> None:
        self.binding = Binding()
        self.trail: list[Callable[[], object]] = []
        self.later: list[tuple[Symbolic, object]] = []  # expressions that hold a name still unknown
        self.deepest = (-1, False)
        self.stopped: tuple[object, object, str] | None = None
        self.last: fx.Node | None = None

    def leaf(self, want: Part, have: object) -> bool:
        """Bind a tensor parameter: any node of the right dtype whose shape unifies."""
        known = self.binding.leaves.get(want.leaf)
        if known is not None:
            return known is have or self.stop(want, have, f"{want.leaf} is {known} elsewhere")
        if not isinstance(have, fx.Node):
            return self.stop(want, have, f"{want.leaf} is the literal {have!r}, not a tensor")
        value = g.tensor(have)
        if value is None:
            return self.stop(want, have, f"{want.leaf} is no tensor")
        if value.dtype != want.dtype:
            return self.stop(want, have, f"{want.leaf} has dtype {value.dtype}, not {want.dtype}")
        shape, dims = tuple(value.shape), want.shape
        if want.ellipsis:
            dims = dims[2:]
            extra = len(shape) - len(dims)
            if extra < 0:
                return self.stop(
                    want, have, f"{want.leaf} has {len(shape)} dimensions, fewer than {len(dims)}"
                )
            if not (want.broadcast and self.broadcasts(shape[:extra])) and not self.leading(shape[:extra]):
                return self.stop(want, have, f"{want.leaf} has the leading sizes {tuple(shape[:extra])}")
            shape = shape[extra:]
        if len(shape) != len(dims):
            return self.stop(want, have, f"{want.leaf} has {len(shape)} dimensions, not {len(dims)}")
        self.bind(self.binding.leaves, want.leaf, have)
        for size, dim in zip(shape, dims, strict=True):
            wanted = dim
            if isinstance(dim, tuple):
                if g.expression(size) == 1:
                    continue
                wanted = _base_dimension(dim[0])
            if not self.unify(wanted, size):
                return self.stop(
                    want, have, f"{want.leaf} has shape {tuple(value.shape)}, {shown(wanted)} is not {size}"
                )
        return True

    def broadcasts(self, sizes: tuple[object, ...]) -> bool:
        """Whether leading sizes broadcast to those that are known."""
        known = self.binding.lead
        if known is None or len(sizes) > len(known):
            return False
        pairs = zip(reversed(sizes), reversed(known), strict=False)
        return all(g.expression(a) in (1, g.expression(b)) for a, b in pairs)

    def leading(self, sizes: tuple[object, ...]) -> bool:
        """What `...` stands for: the same wherever it is full; fewer or 1 where a tensor is broadcast."""
        known = self.binding.lead
        if known is None:
            binding = self.binding
            binding.lead = sizes
            self.trail.append(lambda: setattr(binding, "lead", None))
            return True
        return len(known) == len(sizes) and all(
            g.expression(a) == g.expression(b) for a, b in zip(known, sizes, strict=True)
        )

    def unify(self, want: object, have: object) -> bool:
        """An argument of the pattern with one of the model."""
        if isinstance(want, Symbolic):
            return self.unify_symbolic(want, have)
        if isinstance(want, Carried):
            if want.name in self.binding.carried:
                same = self.binding.carried[want.name] == have
                return same or self.stop(want, have, f"{want.name} differs")
            self.bind(self.binding.carried, want.name, have)
            return True
        if isinstance(want, Parameter):
            return self.unify_name(want.name, have)
        if isinstance(have, fx.Node):
            value = g.val(have)
            if (
                isinstance(want, float)
                and isinstance(value, torch.SymFloat)
                and torch_private.hint(value) == want
            ):
                # dynamic=True makes graph values even of math.pi; applying the match guards on it
                self.binding.assumed.append((value, want))
                self.trail.append(self.binding.assumed.pop)
                return True
            have = g.number(have)
        if type(want) is not type(have) and not (isinstance(want, float) and isinstance(have, int)):
            if not (isinstance(want, int) and isinstance(have, float)) or isinstance(want, bool):
                return self.stop(want, have, "")
        if isinstance(want, float) and isinstance(have, float) and math.isclose(want, have, rel_tol=ROUNDED):
            return True
        return want == have or self.stop(want, have, "")

    def open_list(self, want: tuple, have: object, goals: Goals) -> Goals | Literal[False]:
        """Two lists as goals; where the pattern's begins with `...`, the model's begins with what it is."""
        if not isinstance(have, (list, tuple)):
            return self.stop(want, have, "")
        if len(want) > 1 and _is_lead(want[0], "lead0") and _is_lead(want[1], "lead1"):
            extra = len(have) - (len(want) - 2)
            if extra < 0 or not self.leading(tuple(g.number(h) for h in have[:extra])):
                return self.stop(want, have, "other leading sizes")
            want, have = want[2:], have[extra:]
        if len(want) != len(have):
            return self.stop(want, have, f"{len(have)} elements, not {len(want)}")
        for a, b in zip(reversed(want), reversed(have), strict=True):
            goals = ((a, b), goals)
        return goals

    def unify_name(self, name: str, have: object) -> bool:
        """A bare name: bound to what it meets first, the same ever after."""
        if name not in self.binding.names:
            self.bind(self.binding.names, name, have)
            return True
        return g.equal(g.number(self.binding.names[name]), g.number(have)) or self.stop(
            name, have, f"{name} is {shown(self.binding.names[name])} elsewhere"
        )

    def unify_symbolic(self, want: Symbolic, have: object) -> bool:
        """An expression of names: bound if it is one, compared if all are known, kept for later if not."""
        if have is None or isinstance(have, (bool, str, list, tuple)):
            return self.stop(want, have, "")
        if isinstance(have, fx.Node) and g.is_tensor(have):
            return self.stop(want, have, f"{have.name} is a tensor, not a number")
        if want.is_name:
            return self.unify_name(want.names[0], have)
        if all(n in self.binding.names for n in want.names):
            value = self.evaluate(want)
            return g.equal(value, g.number(have)) or self.stop(want, have, f"{shown(want)} is {value}")
        later = self.later
        later.append((want, have))
        self.trail.append(later.pop)
        return True

    def evaluate(self, want: Symbolic) -> object:
        """An expression's value under the binding: a number, or a sympy expression of the model's sizes."""
        return evaluate(want, self.binding.names)

    def settle(self) -> bool:
        """Compare the expressions that were kept for later, as far as their names are known by now."""
        for want, have in self.later:
            if all(n in self.binding.names for n in want.names) and not g.equal(
                self.evaluate(want), g.number(have)
            ):
                return self.stop(want, have, f"{shown(want)} is {self.evaluate(want)}")
        return True

    def determined(self) -> bool:
        """Whether every expression could be compared: one that was not would match anything."""
        for want, have in self.later:
            if not all(n in self.binding.names for n in want.names):
                return self.stop(want, have, f"nothing says what {want.text} is")
        return True

    # ------------------------------------------------------------------------------------------- bookkeeping

    def bind(self, table: dict[K, V], key: K, value: V) -> None:
        """Put a value in one of the binding's tables."""
        table[key] = value
        self.trail.append(functools.partial(table.pop, key))

    def undo(self, mark: int) -> None:
        """Take back everything that was bound since the trail was that long."""
        while len(self.trail) > mark:
            self.trail.pop()()

    def stop(self, want: object, have: object, reason: str) -> Literal[False]:
        """Keep why it went no further, if it never came as far; always False."""
        other_call = isinstance(want, Part) and not want.leaf  # says more than a size that does not fit
        depth = (len(self.binding.nodes), other_call)
        if depth > self.deepest:
            self.deepest = depth
            node = next(reversed(self.binding.nodes.values()), None)
            self.stopped = (want, have, reason)
            self.last = node
        return False

    def miss(self, anchor: fx.Node) -> Miss:
        """The deepest stop, in words."""
        if self.stopped is None:
            return Miss(len(self.binding.nodes), anchor, "a further output has no counterpart")
        want, have, reason = self.stopped
        node = have if isinstance(have, fx.Node) else (self.last or anchor)
        return Miss(self.deepest[0], node, reason, want, have)


@functools.cache
def _base_dimension(dim: object) -> object:
    """`b|1` is unified as `b`, `h*g|1` as their product."""
    if isinstance(dim, Symbolic) and dim.text.endswith("|1"):
        text = dim.text.removesuffix("|1")
        return Symbolic(text, tuple(sorted(set(text.split("*")))))
    return dim


def _is_lead(value: object, name: str) -> bool:
    return isinstance(value, Symbolic) and value.text == name
