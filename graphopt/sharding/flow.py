"""Decide what is shared: every linear tries to be, layouts flow, and what does not fit gives in.

q = linear(x, Wq): split by features -> heads -> attention -> linear(y, Wo): a sum's term -> all_reduce
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.errors import ShardError
from graphopt.sharding.layout import (
    REPLICATED,
    Axis,
    Layout,
    Own,
    Partial,
    Replicated,
    Segment,
    Segments,
    Split,
    same_sizes,
    seeds_of,
)
from graphopt.sharding.plan import Pinned

Outcome: TypeAlias = "Layout | tuple[Layout, ...]"
Rule: TypeAlias = "Callable[[Flow, fx.Node], Outcome]"


@dataclass
class Flow:
    """Layouts of all values of a graph, found by sweeps to a fixpoint.

    At first every linear on weights shares its output features. Where a shared value meets a call that cannot
    go on with a part (a norm over the features, an operator without a rule), the linears that it comes from
    are left whole, and the graph is swept again; sums are taken where a call first needs them. A sweep that
    changes nothing is the result.

    Attributes:
        rules: what each operator does to layouts; `fallback` for all others.
        whole: the linears (and embeddings) that stay whole, and why.
        whole_rows: the rows of packed linears that every rank has, and why.
        cuts: rows at which a linear's output is sliced: it is several outputs side by side.
        summed: values that are summed where they are made.
        contracted: calls whose results are terms, and the pieces over which they sum; copied: those of which
            several ranks turned out to have the same piece, which would be counted more than once.
        layouts: what a rank has of each value; wants: what a call needs of an operand, where it differs.
        kept: what attention reads as keys and values, once somebody asked; attended: what these are made of.
        kinds: how each linear and embedding is shared: "column", "row", "vocabulary".
    """

    graph: fx.Graph
    world: int
    rules: Mapping[object, Rule]
    fallback: Rule
    pinned: Pinned = field(default_factory=Pinned)
    whole: dict[fx.Node, str] = field(default_factory=dict)
    whole_rows: dict[fx.Node, dict[int, str]] = field(default_factory=dict)
    cuts: dict[fx.Node, set[int]] = field(default_factory=dict)
    summed: set[fx.Node] = field(default_factory=set)
    contracted: dict[fx.Node, Segments] = field(default_factory=dict)
    copied: set[fx.Node] = field(default_factory=set)
    layouts: dict[fx.Node, Outcome] = field(default_factory=dict)
    wants: dict[tuple[fx.Node, fx.Node], Layout] = field(default_factory=dict)
    kinds: dict[fx.Node, str] = field(default_factory=dict)
    reduced: set[fx.Node] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    kept: set[fx.Node] | None = None
    attended: set[fx.Node] | None = None
    changed: bool = False
    parted: bool = False

    def __post_init__(self) -> None:
        self.weights = g.weight_only(self.graph)
        self.output = g.output_node(self.graph)

    # -------------------------------------------------------------------------------------------- the sweeps

    def settle(self) -> None:
        """Sweep until nothing changes.

        Raises:
            ShardError: what would be shared does not divide, or the plan contradicts itself.
        """
        for _ in range(
            2 * len(self.graph.nodes) + 2
        ):  # every further sweep leaves a value whole, cut or summed
            self.sweep()
            if not self.changed:
                break
        else:
            raise RuntimeError("layouts do not settle")
        self.check()

    def sweep(self) -> None:
        """One walk over the graph, with what the walks before have learned."""
        if self.parted:  # where sums are taken may be another place now
            self.summed, self.copied, self.parted = set(), set(), False
        self.layouts, self.wants, self.kinds, self.contracted = {}, {}, {}, {}
        self.reduced, self.errors, self.changed = set(), [], False
        for node in self.graph.nodes:
            if node in self.weights or node.op in ("placeholder", "get_attr"):
                self.layouts[node] = REPLICATED
                continue
            rule = self.rules.get("output" if node.op == "output" else node.target, self.fallback)
            self.layouts[node] = self.taken(node, rule(self, node))
        found = {node for node, segments in self.contracted.items() if self.copies(segments)}
        self.copied |= found  # a later call has cut their features into fewer pieces than there are ranks
        self.changed = self.changed or bool(found)

    def taken(self, node: fx.Node, outcome: Outcome) -> Outcome:
        """A term that something needs summed is summed where it is made, once for all who read it."""
        if isinstance(outcome, Partial) and node in self.summed:
            self.reduced.add(node)
            return REPLICATED
        return outcome

    def check(self) -> None:
        """Raise for what was found wrong, and for a value whose parts have different sizes."""
        for node, outcome in self.layouts.items():
            for layout in outcome if isinstance(outcome, tuple) else (outcome,):
                for axis in [s.axis.root() for s in getattr(layout, "segments", ())]:
                    if not axis.even(self.world) and not axis.padded:
                        self.uneven(node, axis.units, "parts")
        if self.errors:
            raise ShardError(self.errors[0])

    # --------------------------------------------------------------------------------- what rules ask and say

    def layout(self, node: object) -> Layout:
        """What a rank has of a value; what is no value of the graph is everywhere."""
        found = self.layouts.get(node, REPLICATED) if isinstance(node, fx.Node) else REPLICATED
        if isinstance(found, tuple):
            return REPLICATED
        if isinstance(found, Split) and all(s.axis.root().units == 1 for s in found.segments):
            return REPLICATED  # one piece, of which every rank has a copy
        return found

    def full(self, user: fx.Node, operand: object, why: str) -> None:
        """A call needs all of an operand: sum it, or leave what it comes from whole, or gather it."""
        have = self.layout(operand)
        if isinstance(have, Replicated):
            return
        assert isinstance(operand, fx.Node)
        if isinstance(have, Partial):
            self.summed.add(operand)
            self.changed = True
            return
        free = [rows for rows in seeds_of(have) if self.style(rows[0]) in ("auto", "row")]
        for rows in free:
            self.leave_whole(*rows, why)
        if not free:
            self.gather(user, operand, have)

    def gather(self, user: fx.Node, operand: fx.Node, have: Layout) -> None:
        """A call needs all of an operand that the plan wants shared, or that is shared for its width."""
        assert isinstance(have, (Split, Own))
        if isinstance(have, Own):
            self.errors.append(
                f"{where(user)}: {g.op_name(user)} needs all of {operand.name}, which the plan wants shared "
                "and which cannot be gathered; leave the linears that make it out of the plan"
            )
        for segment in have.segments:
            root = segment.axis.root()
            root.padded = root.padded or not root.even(self.world)
        self.wants[user, operand] = REPLICATED

    def split(self, user: fx.Node, operand: object, dim: int, segments: Segments, why: str = "") -> None:
        """A call needs a rank's part of an operand: one of all that there is, or the one that there is."""
        have = self.layout(operand)
        assert isinstance(operand, fx.Node)
        if isinstance(have, (Split, Own)):
            if have.dim != dim or not same_sizes(have.segments, segments):
                self.full(user, operand, why or f"{g.op_name(user)} shares another dimension of it")
                return
            for mine, other in zip(have.segments, segments, strict=True):
                mine.axis.unite(other.axis)
        elif isinstance(have, Partial):
            self.full(user, operand, "")
        if not isinstance(have, Split):
            self.wants[user, operand] = Split(dim, segments)

    def copies(self, segments: Segments) -> bool:
        """Whether several ranks have the same piece."""
        return any(s.axis.copies(self.world) > 1 for s in segments)

    def contracts(self, node: fx.Node, segments: Segments) -> bool:
        """Whether a call may sum over these pieces, each a rank's alone; the end of the sweep looks again."""
        if node in self.copied or self.copies(segments):
            return False
        self.contracted[node] = segments
        return True

    def own(self, user: fx.Node, operand: fx.Node, dim: int, segments: Segments) -> None:
        """A call needs an operand's part among all, as a cache keeps it."""
        if len(segments) != 1:
            self.full(user, operand, "its parts lie apart")
        elif isinstance(self.layout(operand), Split):
            self.wants[user, operand] = Own(dim, segments)

    def column(self, node: fx.Node, rows: int) -> Segments:
        """The output features of a linear (or a vocabulary), in the pieces that its readers cut it into."""
        edges = sorted({0, rows, *self.cuts.get(node, ())})
        left = self.whole_rows.get(node, {})
        return tuple(
            Segment(
                Axis(1 if any(r in left for r in (a, b - 1)) else b - a, {(node, a, b)}, (node, a, b)), b - a
            )
            for a, b in pairwise(edges)
        )

    def cut(self, segment: Segment, at: int) -> bool:
        """A reader cuts a segment there: sweep again with two. False where no weight's rows end there."""
        origin = segment.axis.origin
        if origin is None or at * (origin[2] - origin[1]) % segment.size:
            return False
        node, first, last = origin
        row = first + at * (last - first) // segment.size
        self.cuts.setdefault(node, set()).add(row)
        self.changed = self.parted = True
        return True

    def leave_whole(self, node: fx.Node, first: int, last: int, why: str) -> None:
        """Do not share these rows of a linear's weight (or of an embedding's) after all."""
        if node in self.whole:
            return
        rows = self.whole_rows.setdefault(node, {})
        if any(r not in rows for r in range(first, last)):
            rows.update(dict.fromkeys(range(first, last), why))
            self.changed = self.parted = True
        weight = node.args[1] if g.is_call(node, ops.linear.overload) else node.args[0]
        if len(rows) == g.shape(weight)[0]:  # type: ignore[arg-type]  # a node
            self.whole[node] = why

    def uneven(self, node: fx.Node, units: int, what: str) -> None:
        """Remember that something that should be shared does not divide; the last sweep's are raised.

        Args:
            units: what none may be cut of; `what` names them.
        """
        self.errors.append(
            f"{where(node)}: {g.op_name(node)} has {units} {what}, which {self.world} ranks cannot share "
            f"evenly; choose a number of ranks that divides {units}, or leave it out by a plan ('replicated')"
        )

    def style(self, node: fx.Node) -> str:
        """What the plan wants of a linear or an embedding."""
        weight = node.args[1] if g.is_call(node, ops.linear.overload) else node.args[0]
        return self.pinned.style(names_behind(weight), where(node)) if self.pinned.rows else "auto"


def names_behind(weight: object) -> tuple[str, ...]:
    """The names of the weights that a value is made of."""
    found: dict[str, None] = {}
    todo: list[object] = [weight]
    while todo:
        node = todo.pop()
        if isinstance(node, fx.Node):
            found.update(dict.fromkeys(g.weight_names(node)))
            todo += node.all_input_nodes
    return tuple(found)


def where(node: fx.Node) -> str:
    """The module that a node belongs to, or the node's name."""
    return g.module_path(node) or node.name


def tensors(node: fx.Node) -> Sequence[fx.Node]:
    """The tensors that a call reads, each once."""
    return [n for n in node.all_input_nodes if g.is_tensor(n)]
