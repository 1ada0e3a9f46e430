"""Identical layers are looked at once: where a candidate missed, it misses at every node that looks alike.

A miss that saw no further than a node's own arguments depends on nothing else: their operators, literals,
shapes and dtypes, and which of them are the same. Such misses are kept by that look and replayed. Matches are
made anew: each binds its own layer's nodes. (Keeping more, by deeper structural hashes, costs what it saves:
matching a node takes 25 us in all.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt import graph as g
from graphopt.binding import Binding, Miss
from graphopt.match import match
from graphopt.rule import Variant

Look = tuple[object, ...]
SHALLOW = 1  # parts that a miss had matched: the anchor alone


@dataclass
class Replay:
    """Matches variants at nodes, from memory where that is enough. One instance serves one graph.

    Attributes:
        tried: how often the matcher really ran.
    """

    tried: int = 0
    missed: dict[tuple[Variant, Look], Miss] = field(default_factory=dict)
    seen: tuple[fx.Node, Look] | None = None  # the last node, whose look its next candidate asks for again

    def match(self, variant: Variant, node: fx.Node) -> Binding | Miss:
        """What `match` says."""
        key = (variant, self.look(node))
        known = self.missed.get(key)
        if known is not None:
            return known
        self.tried += 1
        found = match(variant, node)
        # A guard's refusal (without `want`) may have looked anywhere.
        if isinstance(found, Miss) and found.depth <= SHALLOW and found.want is not None:
            self.missed[key] = found
        return found

    def look(self, node: fx.Node) -> Look:
        """A node's arguments as far as a shallow miss sees them."""
        if self.seen is None or self.seen[0] is not node:
            order: dict[fx.Node, int] = {}
            about = (node.target, _look(node.args, order), _look(tuple(node.kwargs.items()), order))
            self.seen = (node, about)
        return self.seen[1]


def _look(argument: object, order: dict[fx.Node, int]) -> object:
    """An argument as something to compare: 1, 1.0 and True are three things, two like nodes stay two."""
    if isinstance(argument, (list, tuple)):
        return tuple(_look(a, order) for a in argument)
    if not isinstance(argument, fx.Node):
        return type(argument), argument
    place = order.setdefault(argument, len(order))
    value = g.val(argument)
    if isinstance(value, torch.Tensor):
        sizes = tuple(s if type(s) is int else g.expression(s) for s in value.shape)
        return place, argument.target if argument.op == "call_function" else argument.op, sizes, value.dtype
    return place, argument.target, g.number(argument)
