"""Find where a rule's pattern occurs. Pure: graphs are read, never edited.

The matcher starts at the pattern's first output (its anchor) and walks up the data flow with a stack of
goals. Commutative operands are choice points with an undoable trail, so a wrong first guess is taken back
wherever it shows; a step bound makes it total. A failure is a value: the deepest place, and why.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from graphopt import graph as g
from graphopt.binding import Binding, Miss, cannot_be
from graphopt.rule import Part, Variant
from graphopt.unify import Goals, Unifier

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
# Free to compute twice: an inner view that something else reads, too, is left there for the other reader.
# So is a repetition, though it copies: all layers share the tables of a rope with each angle twice.
VIEWS = frozenset(
    {
        *(aten.reshape.default, aten.permute.default, aten.expand.default, aten.slice.Tensor),
        *(aten.select.int, aten.repeat_interleave.self_int),
    }
)
STEP_BOUND = 20_000  # goals for one attempt; real rules need tens


def match(variant: Variant, anchor: fx.Node) -> Binding | Miss:
    """Match a variant with its first output at `anchor`: the binding, or the deepest miss."""
    if not _may_be(variant.anchor, anchor):
        return Miss(1, anchor, f"no operand is what {variant.rule.name} reads", variant.anchor, anchor)
    attempt = _Attempt(variant)
    if not attempt.solve(((variant.anchor, anchor), None), 1):
        return attempt.unifier.miss(anchor)
    binding = attempt.binding
    reason = outside_reader(variant, binding)
    if reason is not None:
        return Miss(len(binding.nodes), reason[0], reason[1], guard=outside_reader.__name__)
    if variant.rule.guard is not None:
        refused = variant.rule.guard(binding)
        if refused is not None:
            name = getattr(variant.rule.guard, "__name__", "guard")
            return Miss(len(binding.nodes), anchor, refused, guard=name)
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
    """One attempt at one place: the search over choices; what it binds is in its unifier."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.unifier = Unifier()
        self.binding = self.unifier.binding
        self.steps = 0

    def solve(self, goals: Goals, done: int) -> bool:
        """Reach every goal, then the outputs from the `done`-th on; commutative operands in both orders."""
        while goals is not None:
            self.steps += 1
            if self.steps > STEP_BOUND:
                return self.unifier.stop(goals[0][0], goals[0][1], f"gave up after {STEP_BOUND} steps")
            (want, have), goals = goals
            if isinstance(want, tuple):
                opened = self.unifier.open_list(want, have, goals)
                if opened is False:
                    return False
                goals = opened
                continue
            if not isinstance(want, Part):
                if not self.unifier.unify(want, have):
                    return False
                continue
            if want.leaf:
                if not self.unifier.leaf(want, have):
                    return False
                continue
            known = self.binding.nodes.get(want)
            if known is not None:
                if known is not have:
                    return self.unifier.stop(want, have, f"expected {known.name} again")
                continue
            if not isinstance(have, fx.Node) or have.op != "call_function" or have.target != want.target:
                return self.unifier.stop(want, have, "")
            self.unifier.bind(self.binding.nodes, want, have)
            if len(want.args) != len(have.args) or want.kwargs.keys() != have.kwargs.keys():
                return self.unifier.stop(want, have, "other arguments")
            rest = goals
            for key, value in want.kwargs.items():
                rest = ((value, have.kwargs[key]), rest)
            if want.target in COMMUTATIVE and _swappable(want, have):
                return self.either(want, have, rest, done)
            # What broadcasts to leading sizes comes last: it cannot say what they are.
            pairs = sorted(zip(want.args, have.args, strict=True), key=lambda pair: _broadcasts(pair[0]))
            for value, mine in reversed(pairs):
                rest = ((value, mine), rest)
            goals = rest
        return self.unifier.settle() and self.other_outputs(done)

    def either(self, want: Part, have: fx.Node, rest: Goals, done: int) -> bool:
        """Both orders of two operands."""
        (a, b), (x, y) = want.args[:2], have.args[:2]
        wrong = (a, x) if cannot_be(a, x) else (b, y) if cannot_be(b, y) else None
        if wrong is not None and (cannot_be(a, y) or cannot_be(b, x)):
            return self.unifier.stop(*wrong, "")
        if wrong is not None:
            return self.solve(((a, y), ((b, x), rest)), done)
        mark = len(self.unifier.trail)
        if self.solve(((a, x), ((b, y), rest)), done):
            return True
        self.unifier.undo(mark)
        if cannot_be(a, y) or cannot_be(b, x):  # the other order says nothing: the first one's miss does
            return False
        return self.solve(((a, y), ((b, x), rest)), done)

    def other_outputs(self, index: int) -> bool:
        """Find the pattern's further outputs by going down from what is bound already."""
        outputs = self.variant.pattern.outputs
        if index == len(outputs):
            return self.unifier.determined()
        part = outputs[index]
        assert isinstance(part, Part)
        if part in self.binding.nodes:
            return self.other_outputs(index + 1)
        for candidate in self.candidates(part):
            mark = len(self.unifier.trail)
            if self.solve(((part, candidate), None), index + 1):
                return True
            self.unifier.undo(mark)
        return False

    def candidates(self, part: Part) -> Iterator[fx.Node]:
        """Model nodes that could be `part`: below a bound ancestor, by readers of the right operators."""
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
                return min(
                    found, key=lambda p: bool(p[0].leaf)
                )  # a shared inner value says more than a shared leaf
            frontier = [[q, *p] for p in frontier for q in p[0].parts()]
        return None


def _may_be(part: Part, node: fx.Node) -> bool:
    """A cheap test that saves an attempt: the anchor's operands call what the pattern's call."""
    if (
        part.dtype is not None
        and isinstance(value := g.val(node), torch.Tensor)
        and value.dtype != part.dtype
    ):
        return False
    wanted, found = part.args, node.args
    if not any(cannot_be(a, x) for a, x in zip(wanted, found, strict=False)):
        return True
    if part.target not in COMMUTATIVE or len(wanted) < 2 or len(found) < 2:
        return False
    return not cannot_be(wanted[0], found[1]) and not cannot_be(wanted[1], found[0])


def _broadcasts(want: object) -> bool:
    return isinstance(want, Part) and want.broadcast


def _swappable(want: Part, have: fx.Node) -> bool:
    return len(want.args) >= 2 and isinstance(have.args[0], fx.Node) and isinstance(have.args[1], fx.Node)
