"""Find where a replacement goes: after all that it reads, before all that reads it. Pure: nothing is moved.

    cat(rot(q[:r]), q[r:]); k[r:]; cat(rot(k[:r]), k[r:])   ->   k[r:]; rope(q, k)

What a rule with two outputs reads may be computed only after the first output is used, because the program
was written so. Such inputs can be computed earlier where nothing forbids it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from graphopt import aliasing
from graphopt import graph as g
from graphopt.binding import Binding


@dataclass(frozen=True)
class Place:
    """New nodes go right before `node`, and so, before them and in this order, do the `hoisted` ones."""

    node: fx.Node
    hoisted: tuple[fx.Node, ...] = ()


def find_place(binding: Binding, outputs: list[fx.Node]) -> Place | str:
    """The place of what replaces the outputs, or why there is none."""
    tables = (binding.leaves, binding.names, binding.carried)
    reads = [v for table in tables for v in table.values() if isinstance(v, fx.Node)]
    first = min(outputs)
    if all(n < first for n in reads):
        return Place(first)
    inside = set(binding.nodes.values())
    reader = min((u for n in outputs for u in n.users if u not in inside), default=None)
    if reader is None:
        return "nothing reads its results"
    late = _not_before(reader, reads)
    return _immovable(late, reader, outputs) or Place(reader, tuple(sorted(late)))


def _not_before(place: fx.Node, reads: Iterable[fx.Node]) -> set[fx.Node]:
    """What has to be computed for the reads and is not yet, at a place."""
    found: set[fx.Node] = set()
    todo = [n for n in reads if not n < place]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [n for n in node.all_input_nodes if not n < place]
    return found


def _immovable(late: set[fx.Node], place: fx.Node, outputs: list[fx.Node]) -> str:
    """Why one of the late nodes cannot be computed at the place; empty where all can."""
    for node in sorted(late):
        if node is place or any(n is place or n in outputs for n in node.all_input_nodes):
            return f"{node.name}, which it needs, is computed from its own result"
        if not g.is_pure(node):
            return f"{node.name}, which it needs, comes after a reader of its result and has an effect"
    if not late:
        return ""
    between = place
    while between is not max(late):
        if aliasing.writes(between):  # what it writes may be what a late node reads
            return f"{max(late).name}, which it needs, comes after a reader of its result and a write"
        between = between.next
    return ""
