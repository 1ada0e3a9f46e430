"""What rewrites did, for whoever checks them: the calls that each took away, those that it made, and inputs.

A node's call is written down when it is first seen, before any pass changes its arguments: each node of any
stage can be computed from the program's inputs, through what the captured program computes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import fx

from graphopt import graph as g

if TYPE_CHECKING:
    from graphopt.rewrite import Match


class Call(NamedTuple):
    """One call as it was at some time; fx gives a node new arguments, it never changes the old ones."""

    node: fx.Node
    target: Callable[..., object]
    args: Any  # what a node has there
    kwargs: Any

    def reads(self) -> list[fx.Node]:
        """The nodes among the arguments, each once."""
        found: dict[fx.Node, None] = {}
        self.given(found.setdefault)
        return list(found)

    def given(self, value: Callable[[fx.Node], Any]) -> tuple[Any, Any]:
        """Its arguments and keyword arguments, with a value for each node."""
        return fx.node.map_arg((self.args, self.kwargs), value)


def call_of(node: fx.Node) -> Call:
    """A node's call as it is now."""
    return Call(node, node.target, node.args, node.kwargs)  # type: ignore[arg-type]  # a call's target is callable


@dataclass(frozen=True, eq=False)
class Rewrite:
    """One applied match: `before` and `after` give the same, from the same inputs.

    Attributes:
        match: its name, and where it was.
        functions: what made it: their source says which rewrite this is.
        before, after: the calls taken away and made, each list in order.
        outputs: (old, new) for each value that the rest of the graph reads.
    """

    match: Match
    functions: tuple[Callable[..., object], ...]
    before: tuple[Call, ...]
    after: tuple[Call, ...]
    outputs: tuple[tuple[fx.Node, fx.Node], ...]

    def leaves(self) -> list[fx.Node]:
        """What both sides read and neither computes, in the order in which they read it."""
        found: dict[fx.Node, None] = {}
        for calls, outputs in ((self.before, 0), (self.after, 1)):
            made = {call.node for call in calls}
            read = [n for call in calls for n in call.reads()] + [pair[outputs] for pair in self.outputs]
            found.update(dict.fromkeys(n for n in read if n not in made))
        return list(found)


@dataclass
class Ledger:
    """The rewrites of one compilation, in order, and every node's call as it was when it was first seen.

    Attributes:
        calls: in an order in which they can be computed.
        inputs: a placeholder's place among the program's arguments.
        constants: what the graph itself holds.
        same: the new output of a rewrite -> the old one: the value is the captured program's.
        closed: why nothing more is written down; empty while it is.
    """

    calls: dict[fx.Node, Call] = field(default_factory=dict)
    inputs: dict[fx.Node, int] = field(default_factory=dict)
    constants: dict[fx.Node, object] = field(default_factory=dict)
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    rewrites: list[Rewrite] = field(default_factory=list)
    closed: str = ""

    def see(self, gm: fx.GraphModule) -> None:
        """Write down the calls of nodes that are new: what edits without a match have made."""
        if self.closed:
            return
        inputs = g.placeholders(gm.graph)
        for i, node in enumerate(inputs):
            self.inputs[node] = i
        for node in gm.graph.nodes:
            if node in self.calls or node in self.constants:
                continue
            if node.op == "get_attr":
                self.constants[node] = operator.attrgetter(str(node.target))(gm)
            elif node.op == "call_function":
                plan = node.meta.get("prepared")  # what is prepared of weights: computed from them
                sources = tuple(inputs[i] for i in plan.sources) if plan else ()
                self.calls[node] = Call(node, plan.gm, sources, {}) if plan else call_of(node)

    def took(self, nodes: Iterable[fx.Node]) -> tuple[Call, ...]:
        """The calls of nodes that are about to be replaced, in the graph's order."""
        return tuple(call_of(n) for n in sorted(nodes))

    def rewrote(
        self,
        match: Match,
        functions: Sequence[Callable[..., object]],
        before: tuple[Call, ...],
        outputs: Sequence[tuple[fx.Node, fx.Node]],
    ) -> None:
        """A match was applied: write down what it made, which is what leads to the new outputs."""
        if self.closed:
            return
        made = self.new([new for _, new in outputs])
        for call in made:
            self.calls[call.node] = call
        for old, new in outputs:
            if any(call.node is new for call in made):
                self.same[new] = old
        self.rewrites.append(Rewrite(match, tuple(functions), before, made, tuple(outputs)))

    def changed(
        self,
        match: Match,
        functions: Sequence[Callable[..., object]],
        before: tuple[Call, ...],
        node: fx.Node,
    ) -> None:
        """A match gave a node other arguments: its value, as far as others read it, stays what it was."""
        if self.closed:
            return
        made = self.new(node.all_input_nodes)
        for call in made:
            self.calls[call.node] = call
        after = (*made, call_of(node))
        self.rewrites.append(Rewrite(match, tuple(functions), before, after, ((node, node),)))

    def new(self, nodes: Iterable[fx.Node]) -> tuple[Call, ...]:
        """The calls that lead to some nodes and have not been seen yet, in the graph's order."""
        found: dict[fx.Node, None] = {}
        todo = list(nodes)
        while todo:
            node = todo.pop()
            if node.op == "call_function" and node not in self.calls and node not in found:
                found[node] = None
                todo += node.all_input_nodes
        return tuple(call_of(n) for n in sorted(found))

    def above(self, node: fx.Node) -> tuple[Call, ...]:
        """The calls that compute a node from inputs, constants and sizes, as they are now, in order."""
        found: dict[fx.Node, None] = {}
        todo = [node]
        while todo:
            at = todo.pop()
            if at.op == "call_function" and at not in found and g.is_tensor(at):
                found[at] = None
                todo += at.all_input_nodes
        return tuple(call_of(n) for n in sorted(found))
