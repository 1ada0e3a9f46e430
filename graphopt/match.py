"""Find where a rule's pattern occurs. Pure: graphs are read, never edited.

The matcher starts at the pattern's first output (its anchor) and walks up the data flow with a stack of goals. Commutative
operands are choice points with an undoable trail, so a wrong first guess is taken back wherever it shows; a step bound
makes it total. A failure is a value: the deepest place that was reached, and why it went no further.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.binding import Binding, Miss, evaluate, shown
from graphopt.rule import Carried, Parameter, Part, Symbolic, Variant

aten = torch.ops.aten

COMMUTATIVE = frozenset(
    {
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.logical_and.default,
        aten.logical_or.default,
        aten.maximum.default,
        aten.minimum.default,
    }
)
# Free to compute twice: an inner view that something else reads, too, is simply left there for the other reader.
VIEWS = frozenset(
    {aten.reshape.default, aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.select.int}
)
STEP_BOUND = 20_000  # goals for one attempt; real rules need tens
Goal: TypeAlias = "tuple[object, object]"  # (what the pattern has, what the model has)
Goals: TypeAlias = "tuple[Goal, Goals] | None"


def match(variant: Variant, anchor: fx.Node) -> Binding | Miss:
    """Match a variant with its first output at `anchor`: the binding, or the deepest miss."""
    if not _may_be(variant.anchor, anchor):
        return Miss(1, anchor, f"no operand is what {variant.rule.name} reads")
    attempt = _Attempt(variant)
    if not attempt.solve(((variant.anchor, anchor), None), 1):
        return attempt.miss(anchor)
    binding = attempt.binding
    reason = outside_reader(variant, binding)
    if reason is not None:
        return Miss(len(binding.nodes), reason[0], reason[1])
    if variant.rule.guard is not None:
        refused = variant.rule.guard(binding)
        if refused is not None:
            return Miss(len(binding.nodes), anchor, refused)
    return binding


def outside_reader(variant: Variant, binding: Binding) -> tuple[fx.Node, str] | None:
    """An inner value of the match that something outside of it reads, or None."""
    outputs = {id(p) for p in variant.pattern.outputs}
    inside = set(binding.nodes.values())
    for part, node in binding.nodes.items():
        if part.leaf or id(part) in outputs or part.target in VIEWS:
            continue
        for user in node.users:
            if user not in inside:
                return node, f"{node.name} is also used by {user.name}"
    return None


class _Attempt:
    """One attempt: bindings with a trail, so that a choice can be taken back."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.binding = Binding()
        self.trail: list[Callable[[], None]] = []
        self.steps = 0
        self.deepest = -1
        self.stopped: tuple[object, object, str] | None = None
        self.last: fx.Node | None = None
        self.later: list[tuple[Symbolic, object]] = []

    # ------------------------------------------------------------------------------------------- the search

    def solve(self, goals: Goals, done: int) -> bool:
        """Reach every goal, then the outputs from the `done`-th on, trying both orders of commutative operands."""
        while goals is not None:
            self.steps += 1
            if self.steps > STEP_BOUND:
                return self.stop(goals[0][0], goals[0][1], f"gave up after {STEP_BOUND} steps")
            (want, have), goals = goals
            if isinstance(want, tuple):
                opened = self.open_list(want, have, goals)
                if opened is False:
                    return False
                goals = opened
                continue
            if not isinstance(want, Part):
                if not self.unify(want, have):
                    return False
                continue
            if want.leaf:
                if not self.leaf(want, have):
                    return False
                continue
            known = self.binding.nodes.get(want)
            if known is not None:
                if known is not have:
                    return self.stop(want, have, f"expected {known.name} again")
                continue
            if not isinstance(have, fx.Node) or have.op != "call_function" or have.target != want.target:
                return self.stop(want, have, "")
            self.bind(self.binding.nodes, want, have)
            if len(want.args) != len(have.args) or want.kwargs.keys() != have.kwargs.keys():
                return self.stop(want, have, "other arguments")
            rest = goals
            for key, value in want.kwargs.items():
                rest = ((value, have.kwargs[key]), rest)
            if want.target in COMMUTATIVE and _swappable(want, have):
                return self.either(want, have, rest, done)
            for value, mine in zip(reversed(want.args), reversed(have.args), strict=True):
                rest = ((value, mine), rest)
            goals = rest
        return self.settle() and self.other_outputs(done)

    def either(self, want: Part, have: fx.Node, rest: Goals, done: int) -> bool:
        """Both orders of two operands."""
        (a, b), (x, y) = want.args[:2], have.args[:2]
        if _cannot_be(a, x) or _cannot_be(b, y):
            return self.solve(((a, y), ((b, x), rest)), done)
        mark = len(self.trail)
        if self.solve(((a, x), ((b, y), rest)), done):
            return True
        self.undo(mark)
        return self.solve(((a, y), ((b, x), rest)), done)

    def other_outputs(self, index: int) -> bool:
        """Find the pattern's further outputs by going down from what is bound already."""
        outputs = self.variant.pattern.outputs
        if index == len(outputs):
            return self.determined()
        part = outputs[index]
        assert isinstance(part, Part)
        if part in self.binding.nodes:
            return self.other_outputs(index + 1)
        for candidate in self.candidates(part):
            mark = len(self.trail)
            if self.solve(((part, candidate), None), index + 1):
                return True
            self.undo(mark)
        return False

    def candidates(self, part: Part) -> Iterator[fx.Node]:
        """Model nodes that could be `part`: reached from a bound ancestor through readers of the right operators."""
        path = self.path_from_bound(part)
        if path is None:
            return
        start, *steps = path
        layer = [self.binding.leaves[start.leaf] if start.leaf else self.binding.nodes[start]]
        for step in steps:
            layer = [u for n in layer if isinstance(n, fx.Node) for u in n.users if u.target == step.target]
        bound = set(self.binding.nodes.values())
        yield from (n for n in dict.fromkeys(layer) if isinstance(n, fx.Node) and n not in bound)

    def path_from_bound(self, part: Part) -> list[Part] | None:
        """The shortest way down from a bound part to `part`, both included."""
        frontier: list[list[Part]] = [[part]]
        while frontier:
            found = [p for p in frontier if p[0] in self.binding.nodes or p[0].leaf in self.binding.leaves]
            if found:
                return min(found, key=lambda p: bool(p[0].leaf))  # a shared inner value says more than a shared leaf
            frontier = [[q, *p] for p in frontier for q in p[0].parts()]
        return None

    # ------------------------------------------------------------------------------------------ unification

    def leaf(self, want: Part, have: object) -> bool:
        """Bind a tensor parameter: any node of the right dtype whose shape unifies."""
        known = self.binding.leaves.get(want.leaf)
        if known is not None:
            return known is have or self.stop(want, have, f"{want.leaf} is {known} elsewhere")
        if not isinstance(have, fx.Node):
            return self.stop(want, have, f"{want.leaf} is the literal {have!r}, not a tensor")
        value = have.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return self.stop(want, have, f"{want.leaf} is no tensor")
        if value.dtype != want.dtype:
            return self.stop(want, have, f"{want.leaf} has dtype {value.dtype}, not {want.dtype}")
        shape, dims = tuple(value.shape), want.shape
        if want.ellipsis:
            dims = dims[2:]
            extra = len(shape) - len(dims)
            if extra < 0:
                return self.stop(want, have, f"{want.leaf} has {len(shape)} dimensions, fewer than {len(dims)}")
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
                return self.stop(want, have, f"{want.leaf} has shape {tuple(value.shape)}, {shown(wanted)} is not {size}")
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
        return len(known) == len(sizes) and all(g.expression(a) == g.expression(b) for a, b in zip(known, sizes, strict=True))

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
            if isinstance(want, float) and isinstance(value, torch.SymFloat) and torch_private.hint(value) == want:
                # dynamic=True makes graph values even of constants such as math.pi; applying the match guards on it
                self.binding.assumed.append((value, want))
                self.trail.append(self.binding.assumed.pop)  # type: ignore[arg-type]  # what pop returns is not used
                return True
            have = g.number(have)
        if type(want) is not type(have) and not (isinstance(want, float) and isinstance(have, int)):
            if not (isinstance(want, int) and isinstance(have, float)) or isinstance(want, bool):
                return self.stop(want, have, "")
        return want == have or self.stop(want, have, "")

    def open_list(self, want: tuple, have: object, goals: Goals) -> Goals | Literal[False]:
        """Two lists as goals; where the pattern's begins with `...`, the model's begins with what that stands for."""
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
        """An expression of names: bound if it is one name, compared if all are known, kept for later if not."""
        if have is None or isinstance(have, (bool, str, list, tuple)):
            return self.stop(want, have, "")
        if isinstance(have, fx.Node) and isinstance(have.meta.get("val"), torch.Tensor):
            return self.stop(want, have, f"{have.name} is a tensor, not a number")
        if want.is_name:
            return self.unify_name(want.names[0], have)
        if all(n in self.binding.names for n in want.names):
            value = self.evaluate(want)
            return g.equal(value, g.number(have)) or self.stop(want, have, f"{shown(want)} is {value}")
        later = self.later
        later.append((want, have))
        self.trail.append(later.pop)  # type: ignore[arg-type]  # what pop returns is not used
        return True

    def evaluate(self, want: Symbolic) -> object:
        """An expression's value under the binding: a number, or a sympy expression of the model's sizes."""
        return evaluate(want, self.binding.names)

    def settle(self) -> bool:
        """Compare the expressions that were kept for later, as far as their names are known by now."""
        for want, have in self.later:
            if all(n in self.binding.names for n in want.names) and not g.equal(self.evaluate(want), g.number(have)):
                return self.stop(want, have, f"{shown(want)} is {self.evaluate(want)}")
        return True

    def determined(self) -> bool:
        """Whether every expression could be compared: one that was not would match anything."""
        for want, have in self.later:
            if not all(n in self.binding.names for n in want.names):
                return self.stop(want, have, f"nothing says what {want.text} is")
        return True

    # ------------------------------------------------------------------------------------------- bookkeeping

    def bind(self, table: dict, key: object, value: object) -> None:  # type: ignore[type-arg]  # any of the binding's tables
        table[key] = value
        self.trail.append(functools.partial(table.pop, key))  # type: ignore[arg-type]  # what pop returns is not used

    def undo(self, mark: int) -> None:
        while len(self.trail) > mark:
            self.trail.pop()()

    def stop(self, want: object, have: object, reason: str) -> Literal[False]:
        depth = len(self.binding.nodes)
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
        return Miss(self.deepest, node, reason, want, have)


def _may_be(part: Part, node: fx.Node) -> bool:
    """A cheap test that saves an attempt: the anchor's operands call what the pattern's call, in one of two orders."""
    if part.dtype is not None and isinstance(value := g.val(node), torch.Tensor) and value.dtype != part.dtype:
        return False
    wanted, found = part.args, node.args
    if not any(_cannot_be(a, x) for a, x in zip(wanted, found, strict=False)):
        return True
    if part.target not in COMMUTATIVE or len(wanted) < 2 or len(found) < 2:
        return False
    return not _cannot_be(wanted[0], found[1]) and not _cannot_be(wanted[1], found[0])


def _swappable(want: Part, have: fx.Node) -> bool:
    return len(want.args) >= 2 and isinstance(have.args[0], fx.Node) and isinstance(have.args[1], fx.Node)


def _cannot_be(want: object, have: object) -> bool:
    """A cheap test that saves a choice point: a call that is plainly another one."""
    return isinstance(want, Part) and not want.leaf and (not isinstance(have, fx.Node) or have.target != want.target)


@functools.cache
def _base_dimension(dim: object) -> object:
    """`b|1` is unified as `b`, `h*g|1` as their product."""
    if isinstance(dim, Symbolic) and dim.text.endswith("|1"):
        text = dim.text.removesuffix("|1")
        return Symbolic(text, tuple(sorted(set(text.split("*")))))
    return dim


def _is_lead(value: object, name: str) -> bool:
    return isinstance(value, Symbolic) and value.text == name
