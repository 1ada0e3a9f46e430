"""Make a settled flow's graph the graph of one rank: parts of weights, sizes of its own, and collectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.rewrite import fake_result
from graphopt.sharding.flow import Flow
from graphopt.sharding.layout import Layout, Own, Replicated, Split, local_size, ranges
from graphopt.sharding.views import bounds
from graphopt.sharding.weights import Parts

aten = torch.ops.aten


@dataclass
class Local:
    """The edit of a graph for one rank. `flow` has settled; the graph is edited once, in order."""

    flow: Flow
    axis: str
    rank: int
    parts: Parts
    stands_for: dict[fx.Node, fx.Node] = field(default_factory=dict)  # a sum -> its terms
    changed: set[fx.Node] = field(default_factory=set)

    def run(self) -> None:
        """Edit the graph in place."""
        for node in list(self.flow.graph.nodes):
            if node in self.flow.weights or node.op in ("placeholder", "get_attr"):
                continue
            touched = self.convert(node)
            edit = EDITS.get(node.target) if node.op == "call_function" else None
            if edit is not None:
                touched = edit(self, node) or touched
            if node.op == "output" or g.is_mutable(node.target):
                continue
            if touched or not self.changed.isdisjoint(node.all_input_nodes):
                g.set_val(node, fake_result(node))
                self.changed.add(node)
            if node in self.flow.reduced:
                self.reduce(node)

    def original(self, node: fx.Node) -> fx.Node:
        """The node of the flow that an operand stands for."""
        return self.stands_for.get(node, node)

    def have(self, node: object) -> Layout:
        """What the rank has of an operand."""
        return self.flow.layout(self.original(node) if isinstance(node, fx.Node) else node)

    # -------------------------------------------------------------------------------------------- operands

    def convert(self, user: fx.Node) -> bool:
        """Give a call what it needs of each operand; whether anything had to be made."""
        new: dict[fx.Node, fx.Node] = {}
        with self.flow.graph.inserting_before(user):
            for operand in user.all_input_nodes:
                want = self.flow.wants.get((user, self.original(operand)))
                made = None if want is None else self.converted(operand, self.have(operand), want)
                if made is not None and made is not operand:
                    new[operand] = made
        for operand, made in new.items():
            user.replace_input_with(operand, made)
        return bool(new)

    def converted(self, node: fx.Node, have: Layout, want: Layout) -> fx.Node | None:
        """An operand in another layout; None where it is that already."""
        if isinstance(want, Split) and isinstance(have, (Replicated, Own)):
            return self.parts.part(node, want.dim, ranges(want.segments, self.flow.world, self.rank))
        if isinstance(want, Own) and isinstance(have, Split):
            return self.parts.once((node, "own"), lambda: self.embedded(node, have))
        if isinstance(want, Replicated) and isinstance(have, Split):
            return self.parts.once((node, "gathered"), lambda: self.gathered(node, have))
        return None

    def embedded(self, node: fx.Node, have: Split) -> fx.Node:
        """A rank's heads among zeros for all others'."""
        ((first, last, _),) = ranges(have.segments, self.flow.world, self.rank)
        return self.parts.padded(node, have.dim, first, have.segments[0].size - last)

    def gathered(self, node: fx.Node, have: Split) -> fx.Node:
        """Every rank's part, side by side; without what they were padded with."""
        pieces, start = [], 0
        for segment in have.segments:
            local = segment.local(self.flow.world)
            piece = self.cut(node, have.dim, start, start + local)
            start += local
            wide = self.parts.call(node, ops.all_gather.overload, piece, self.axis, have.dim - g.rank(node))
            whole = self.parts.call(
                node, aten.cat.default, [piece] * self.flow.world, have.dim - g.rank(node)
            )
            g.set_val(wide, g.val(whole))  # the reference is that of a mesh of one rank
            self.flow.graph.erase_node(whole)
            copies = segment.axis.copies(self.flow.world)
            if copies > 1:  # every piece once
                firsts = range(0, local * self.flow.world, local * copies)
                once = [self.cut(wide, have.dim, first, first + local) for first in firsts]
                wide = self.parts.joined(node, once, have.dim)
            pieces.append(self.cut(wide, have.dim, 0, segment.size))
        return self.parts.joined(node, pieces, have.dim)

    def cut(self, node: fx.Node, dim: int, first: int, last: int) -> fx.Node:
        """Entries of a dimension; the value itself where these are all."""
        if first == 0 and g.same_size(g.shape(node)[dim], last):
            return node
        return self.parts.call(node, aten.slice.Tensor, node, dim - g.rank(node), first, last, 1)

    def reduce(self, node: fx.Node) -> None:
        """The sum of a value's terms, for all who read it."""
        with self.flow.graph.inserting_after(node):
            done = self.parts.call(node, ops.all_reduce.overload, node, self.axis)
        node.replace_all_uses_with(done, delete_user_cb=lambda user: user is not done)
        self.stands_for[done] = node
        if node in self.changed:
            self.changed.add(done)

    # --------------------------------------------------------------------------------- sizes in arguments

    def resize(self, node: fx.Node) -> bool:
        """reshape, expand: the size of the shared dimension is the rank's."""
        layout = self.flow.layouts[node]
        sizes = node.args[1]
        if not isinstance(layout, Split) or not isinstance(sizes, (list, tuple)) or sizes[layout.dim] == -1:
            return False
        new = list(sizes)
        new[layout.dim] = local_size(layout.segments, self.flow.world)
        node.update_arg(1, new)
        return True

    def move_slice(self, node: fx.Node) -> bool:
        """slice of whole segments: where they are in the rank's part."""
        have, layout = self.flow.layouts[self.sliced_from(node)], self.flow.layouts[node]
        dim = node.args[1] if len(node.args) > 1 else 0
        if not isinstance(have, Split) or not isinstance(layout, Split) or not isinstance(dim, int):
            return False
        if dim % g.rank(node) != have.dim:
            return False
        start, end = (*node.args[2:4], None, None)[:2]
        whole = sum(s.size for s in have.segments)
        at, _ = bounds(start, end, whole)
        position, first = 0, 0
        for segment in have.segments:
            if position < at:
                first += segment.local(self.flow.world)
            position += segment.size
        node.args = (node.args[0], dim, first, first + local_size(layout.segments, self.flow.world), 1)
        return True

    def sliced_from(self, node: fx.Node) -> fx.Node:
        """The value that a slice reads, as the flow knows it."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        return self.original(x)

    # --------------------------------------------------------------------------------- linears, embeddings

    def bias_once(self, node: fx.Node) -> bool:
        """linear(x_r, W_r, b): the terms' sum has the bias once, from the first rank."""
        if self.flow.kinds.get(node) != "row" or self.rank == 0 or node.args[2] is None:
            return False
        node.update_arg(2, None)
        return True

    def own_rows(self, node: fx.Node) -> bool:
        """embedding(W, ids) -> embedding(W_r, ids - first), and zeros for the ids of other ranks."""
        if self.flow.kinds.get(node) != "vocabulary":
            return False
        table, ids = node.args[:2]
        assert isinstance(table, fx.Node) and isinstance(ids, fx.Node)
        (want,) = [w for (user, _), w in self.flow.wants.items() if user is node and isinstance(w, Split)]
        ((first, last, _),) = ranges(want.segments, self.flow.world, self.rank)
        call = self.parts.call
        with self.flow.graph.inserting_before(node):
            below = call(node, aten.lt.Scalar, ids, first)
            above = call(node, aten.ge.Scalar, ids, last)
            foreign = call(node, aten.logical_or.default, below, above)
            local = call(node, aten.masked_fill.Scalar, call(node, aten.sub.Tensor, ids, first), foreign, 0)
        node.args, node.kwargs = (table, local), {}
        g.set_val(node, fake_result(node))
        with self.flow.graph.inserting_after(node):
            row = call(node, aten.unsqueeze.default, foreign, -1)
        with self.flow.graph.inserting_after(row):
            masked = call(node, aten.masked_fill.Scalar, node, row, 0.0)
        node.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)
        self.stands_for[masked] = node
        self.changed.add(masked)
        if node in self.flow.reduced:
            self.reduce(masked)
            self.stands_for.update({sum_: node for sum_ in masked.users})
            self.flow.reduced.discard(node)
        return True


Edit: TypeAlias = "Callable[[Local, fx.Node], bool]"
EDITS: Mapping[object, Edit] = {
    aten.reshape.default: Local.resize,
    aten.expand.default: Local.resize,
    aten.slice.Tensor: Local.move_slice,
    aten.embedding.default: Local.own_rows,
    ops.linear.overload: Local.bias_once,
}
