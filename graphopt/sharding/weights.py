"""A rank's part of a value, as nodes; slices reach the checkpoint's tensors through what is made of them.

part(cat([q, k]), rows)   ->   cat([q[rows of q], k[rows of k]])
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import fx

from graphopt import graph as g
from graphopt.rewrite import fake_result

aten = torch.ops.aten
Ranges: TypeAlias = "Iterable[tuple[int, int, int]]"  # (first, last + 1, zeros after them) of a dimension


@dataclass
class Parts:
    """Takes parts of a graph's values; one part of one value is one node, so that tied weights stay tied."""

    graph: fx.Graph
    weights: Collection[fx.Node]  # what depends on weights alone
    origin: g.Origin
    made: dict[tuple[object, ...], fx.Node] = field(default_factory=dict)

    def call(self, like: fx.Node, target: Callable[..., object], *args: object, **kwargs: object) -> fx.Node:
        """One call at the insertion point, in the place of the source that `like` stands for."""
        new = self.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]  # nodes and plain values
        g.copy_provenance(new, like)
        new.meta["origin"] = self.origin
        g.set_val(new, fake_result(new))
        return new

    def once(self, key: tuple[object, ...], make: Callable[[], fx.Node]) -> fx.Node:
        """What was made before under the same key, or now."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def part(self, node: fx.Node, dim: int, ranges: Ranges) -> fx.Node:
        """The given entries of one dimension, side by side."""
        wanted = tuple(ranges)
        return self.once((node, dim, wanted), lambda: self._part(node, dim, wanted))

    def _part(self, node: fx.Node, dim: int, ranges: Ranges) -> fx.Node:
        pieces: list[fx.Node] = []
        for first, last, zeros in ranges:
            found = self.pieces(node, dim, first, last)
            if zeros or last == first:  # a rank beyond the end has zeros alone
                found = [self.padded(self.joined(node, found, dim), dim, 0, zeros)]
            pieces += found
        return self.joined(node, pieces, dim)

    def joined(self, like: fx.Node, pieces: list[fx.Node], dim: int) -> fx.Node:
        """Pieces of a dimension in one."""
        return (
            pieces[0] if len(pieces) == 1 else self.call(like, aten.cat.default, pieces, dim - g.rank(like))
        )

    def padded(self, node: fx.Node, dim: int, before: int, after: int) -> fx.Node:
        """Zeros before and after the entries of a dimension."""
        inner = [0] * (2 * (g.rank(node) - 1 - dim))
        return self.call(node, aten.pad.default, node, [*inner, before, after])

    def pieces(self, node: fx.Node, dim: int, first: int, last: int) -> list[fx.Node]:
        """Entries first .. last of a dimension, in one or more pieces."""
        if first == 0 and g.same_size(g.shape(node)[dim], last):
            return [node]
        if node in self.weights and g.is_call(node, aten.permute.default) and node.args[1] == [1, 0]:
            inner = node.args[0]
            assert isinstance(inner, fx.Node)
            turned = self.joined(inner, self.pieces(inner, 1 - dim, first, last), 1 - dim)
            return [self.call(node, aten.permute.default, turned, [1, 0])]
        if node in self.weights and g.is_call(node, aten.cat.default) and last > first:
            return self._of_joined(node, dim, first, last)
        cut = self.call(node, aten.slice.Tensor, node, dim - g.rank(node), first, last, 1)
        if node in self.weights and dim:  # columns lie apart; kernels want rows that are whole
            cut = self.call(node, aten.clone.default, cut, memory_format=torch.contiguous_format)
        return [cut]

    def _of_joined(self, node: fx.Node, dim: int, first: int, last: int) -> list[fx.Node]:
        """The pieces of a concatenation: those of its parts."""
        parts = node.args[0]
        along = node.args[1] if len(node.args) > 1 else 0
        assert isinstance(parts, (list, tuple)) and isinstance(along, int)
        along %= g.rank(node)
        if along != dim:
            cuts = [self.joined(p, self.pieces(p, dim, first, last), dim) for p in parts]  # type: ignore[arg-type]  # nodes
            return [self.joined(node, cuts, along)]
        found: list[fx.Node] = []
        start = 0
        for part in parts:
            assert isinstance(part, fx.Node)
            size = g.shape(part)[dim]
            assert isinstance(size, int)
            a, b = max(first - start, 0), min(last - start, size)
            if a < b:
                found += self.pieces(part, dim, a, b)
            start += size
        return found
