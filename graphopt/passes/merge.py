"""Merge: linears that read one input become one linear on their concatenated weights: Q, K, V; gate and up.

linear(x, Wq), linear(x, Wk)   ->   y = linear(x, cat([Wq, Wk])); y[..., :q], y[..., q:]
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops, torch_private
from graphopt.observe import Matched, Refused, emit
from graphopt.rewrite import Match, Refusal, fake_result

if TYPE_CHECKING:
    from graphopt.pipeline import Context

aten = torch.ops.aten
LINEAR = ops.linear.overload
RULE = "merge_siblings"
# Where the results of siblings come together again.
JOINS = (
    ops.attention.overload,
    ops.gated_activation.overload,
    ops.activation.overload,
    ops.experts.overload,
)


@dataclass(frozen=True)
class Merge:
    """Sibling linears become one, so that their input is read once and one call does the work.

    Merged are linears of one input whose results come together again at one place (Q, K and V at an
    attention, gate and up at a gated activation), whose weights depend on weights alone and agree in dtype,
    device and in having a bias or not: the keys of two layers, or a parallel MLP beside Q, stay apart. The
    concatenation is a node on the weights: `fold` prepares it once. Options: `max_rows`, the most output
    features of a linear that is merged; a vocabulary is beyond.
    """

    max_rows: int = 65536

    name: ClassVar[str] = "merge"
    requires: ClassVar[frozenset[str]] = frozenset({"recognised"})
    provides: ClassVar[frozenset[str]] = frozenset({"merged"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})
    exactness: ClassVar[str] = "reordered"

    def run(self, gm: fx.GraphModule, ctx: Context) -> None:
        """Edit `gm` in place."""
        order = {n: i for i, n in enumerate(gm.graph.nodes)}
        merger = _Merger(gm.graph, self, ctx, order, g.weight_only(gm.graph), joins(gm.graph))
        for x in list(gm.graph.nodes):
            siblings = sorted((u for u in x.users if is_linear_of(u, x)), key=merger.order.__getitem__)
            if len(siblings) > 1:
                merger.merge(siblings)
        gm.recompile()


def is_linear_of(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is a linear layer on x (and not one that x is the weight of)."""
    return g.is_call(node, LINEAR) and node.args[0] is x


def joins(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Value -> the first call in the graph's order, of JOINS or the output, that depends on it."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: dict[fx.Node, fx.Node] = {}
    for node in reversed(graph.nodes):
        reached = [u if u.op == "output" or g.is_call(u, *JOINS) else found.get(u) for u in node.users]
        first = min((n for n in reached if n is not None), key=order.__getitem__, default=None)
        if first is not None:
            found[node] = first
    return found


def parent(node: fx.Node) -> str:
    """The module path without its last part, to tell of what is merged."""
    return g.module_path(node).rpartition(".")[0]


@dataclass
class _Merger:
    graph: fx.Graph
    options: Merge
    ctx: Context
    order: dict[fx.Node, int]
    weights: set[fx.Node]  # what depends on weights alone
    joins: dict[fx.Node, fx.Node]
    ids: dict[str, int] = field(default_factory=dict)
    values: dict[object, torch_private.FakeTensor] = field(default_factory=dict)  # by call: layers are alike

    def merge(self, siblings: Sequence[fx.Node]) -> None:
        """Merge the linears of one input, each group of equals for itself; refuse the others."""
        groups: dict[object, list[fx.Node]] = {}
        for node in siblings:
            reason = self.refuses(node)
            if reason is not None:
                self.refuse(node, reason)
                continue
            groups.setdefault(self.kind(node), []).append(node)
        for (alone,) in (group for group in groups.values() if len(group) == 1):
            self.refuse(alone, self.difference(alone, next(n for n in siblings if n is not alone)))
        for group in groups.values():
            if len(group) > 1:
                self.apply(group)

    def refuses(self, node: fx.Node) -> str | None:
        """Why a linear cannot be merged with any other."""
        _, weight, bias = node.args
        assert isinstance(weight, fx.Node)
        if weight not in self.weights:
            return f"weight {weight.name} does not depend on weights alone"
        if isinstance(bias, fx.Node) and bias not in self.weights:
            return f"bias {bias.name} does not depend on weights alone"
        rows = g.shape(weight)[0]
        if not isinstance(rows, int) or rows > self.options.max_rows:
            return f"{rows} rows > {self.options.max_rows}"
        other = next((u for u in weight.users if not g.is_call(u, LINEAR)), None)
        if g.is_weight(weight) and other is not None and other not in self.weights:
            name = g.weight_names(weight)[0]
            return f"weight {name} is also read by {g.op_name(other)}: merging would hold it twice"
        return None

    def kind(self, node: fx.Node) -> tuple[object, ...]:
        """What siblings have to agree in."""
        _, weight, bias = node.args
        assert isinstance(weight, fx.Node)
        about_bias = g.dtype(bias) if isinstance(bias, fx.Node) else None
        return self.joins.get(node), g.dtype(weight), g.device(weight), about_bias

    def difference(self, node: fx.Node, other: fx.Node) -> str:
        """What sets a linear apart from a sibling."""
        for what, one, two in zip(
            ("join", "dtype", "device", "bias"), self.kind(node), self.kind(other), strict=True
        ):
            if one != two:
                return f"{what} {one} differs from {other.name}'s {two}"
        return f"{other.name} cannot be merged"

    # --------------------------------------------------------------------------------------------- editing

    def apply(self, group: Sequence[fx.Node]) -> None:
        """Replace a group by one linear and a slice for each."""
        identity = self.identify(group)
        if identity in self.ctx.deny or self.ctx.fuel == 0:
            self.refuse(group[0], "denied" if identity in self.ctx.deny else "no fuel left")
            return
        first = group[0]
        before = self.ctx.ledger.took(group) if self.ctx.ledger else ()
        self.hoist([a for node in group for a in node.args[1:] if isinstance(a, fx.Node)], first)
        names = tuple(n.name for n in group)
        origin = g.Origin(RULE, identity, names)
        new: list[fx.Node] = []
        pieces: list[tuple[fx.Node, fx.Node]] = []

        def call(target: Callable[..., object], *args: object) -> fx.Node:
            node = self.graph.call_function(target, args)  # type: ignore[arg-type]  # nodes and plain values
            g.copy_provenance(node, first)
            node.meta |= {"origin": origin, "module_path": parent(first)}
            g.set_val(node, self.value(node))
            self.order[node] = self.order[first]
            new.append(node)
            return node

        with self.graph.inserting_before(first):
            weight = call(aten.cat.default, [n.args[1] for n in group], 0)
            bias = (
                call(aten.cat.default, [n.args[2] for n in group], 0) if first.args[2] is not None else None
            )
            merged = call(LINEAR, first.args[0], weight, bias)
            start = 0
            for node in group:
                rows = g.shape(node.args[1])[0]  # type: ignore[arg-type]  # a node
                piece = call(aten.slice.Tensor, merged, -1, start, start + rows, 1)
                piece.meta["module_path"] = g.module_path(node)
                node.replace_all_uses_with(piece)
                pieces.append((node, piece))
                start += rows  # type: ignore[assignment]  # checked to be an int
        self.weights |= {n for n in (weight, bias) if n is not None}
        for node in group:
            self.graph.erase_node(node)
        if self.ctx.fuel is not None:
            self.ctx.fuel -= 1
        match = Match(identity, RULE, parent(first), g.source(first), names, tuple(n.name for n in new))
        if self.ctx.ledger:
            self.ctx.ledger.rewrote(match, (_Merger.apply,), before, pieces)
        emit(self.ctx.observers, Matched(match))

    def value(self, node: fx.Node) -> object:
        """A new call's abstract value: like that of an equal call on equal tensors, if there was one."""
        inputs = [g.tensor(n) for n in node.all_input_nodes]
        if any(x is None or not all(type(n) is int for n in (*x.shape, *x.stride())) for x in inputs):
            return fake_result(node)
        about = [(x.shape, x.stride(), x.dtype, x.device) for x in inputs if x is not None]
        plain = fx.node.map_arg(node.args, lambda n: node.all_input_nodes.index(n))
        key = repr((node.target, about, plain))
        if key in self.values:
            return torch_private.fake_like(self.values[key])
        result = fake_result(node)
        if isinstance(result, torch_private.FakeTensor):
            self.values[key] = result
        return result

    def hoist(self, needed: Sequence[fx.Node], place: fx.Node) -> None:
        """Move what is computed from weights alone before the first sibling, with what that needs."""
        late: set[fx.Node] = set()
        todo = list(needed)
        while todo:
            node = todo.pop()
            if node.op != "placeholder" and self.order[node] > self.order[place] and node not in late:
                late.add(node)
                todo += node.all_input_nodes
        for node in sorted(late, key=self.order.__getitem__):
            place.prepend(node)
            self.order[node] = self.order[place]

    def identify(self, group: Sequence[fx.Node]) -> str:
        """A stable id: rule @ parent module # hash of the shapes (~ ordinal)."""
        shapes = [f"{g.shape(n.args[1])}" for n in group]  # type: ignore[arg-type]  # a node
        digest = hashlib.sha1(";".join(shapes).encode(), usedforsecurity=False).hexdigest()[:6]
        base = f"{RULE}@{parent(group[0]) or '-'}#{digest}"
        ordinal = self.ids[base] = self.ids.get(base, 0) + 1
        return base if ordinal == 1 else f"{base}~{ordinal}"

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Tell why a linear is left alone."""
        refusal = Refusal(RULE, node.name, g.module_path(node), g.source(node), reason, 1)
        emit(self.ctx.observers, Refused(refusal))
