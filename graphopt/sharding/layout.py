"""The lattice: what a rank holds of a value: all of it, a part of one dimension, or a term of a sum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import TypeAlias

from torch import fx

Rows: TypeAlias = "tuple[fx.Node, int, int]"  # (linear, first row, last row + 1) of its weight


@dataclass(eq=False)
class Axis:
    """A dimension that ranks share: `units` pieces, none of which may be cut.

    Layouts name axes, so what is learned late (a reshape to heads: pieces of head_dim columns) holds for
    every value of the axis. Axes that meet in an elementwise call become one.

    Attributes:
        units: how many pieces; only ever gets smaller.
        seeds: the rows of linears that made it shared; they are left whole where nothing else helps.
        origin: the rows that it stands for, where it does.
        padded: the last rank's piece is filled up with zeros where ranks do not divide the units.
    """

    units: int
    seeds: set[Rows] = field(default_factory=set)
    origin: Rows | None = None
    padded: bool = False
    above: Axis | None = None

    def root(self) -> Axis:
        """The axis that this one has become part of."""
        axis = self
        while axis.above is not None:
            axis = axis.above
        return axis

    def refine(self, pieces: int) -> None:
        """Only so many pieces, of equal size, may be told apart from now on."""
        root = self.root()
        root.units = gcd(root.units, pieces)

    def unite(self, other: Axis) -> None:
        """Both are shared alike from now on."""
        one, two = self.root(), other.root()
        if one is two:
            return
        one.units = gcd(one.units, two.units)
        one.padded = one.padded or two.padded
        one.seeds |= two.seeds
        two.above = one

    def copies(self, world: int) -> int:
        """How many ranks hold the same piece: 1, or more where there are fewer pieces than ranks."""
        units = self.root().units
        return world // units if 0 < units < world and world % units == 0 else 1

    def even(self, world: int) -> bool:
        """Whether every rank gets as many pieces as any other."""
        units = self.root().units
        return units % world == 0 or (0 < units < world and world % units == 0)

    def share(self, world: int, rank: int) -> tuple[int, int]:
        """(first, last + 1) of the rank's pieces; where padded, the last may be beyond the end."""
        units = self.root().units
        if self.copies(world) > 1:
            first = rank * units // world
            return first, first + 1
        each = -(-units // world)
        return rank * each, (rank + 1) * each


@dataclass(frozen=True)
class Segment:
    """A stretch of a dimension, `size` entries long, that is shared along an axis."""

    axis: Axis
    size: int

    def range(self, world: int, rank: int) -> tuple[int, int]:
        """The rank's entries, counted from the segment's start; the last may be beyond its end."""
        each = self.size // self.axis.root().units
        first, last = self.axis.share(world, rank)
        return first * each, last * each

    def local(self, world: int) -> int:
        """How many entries a rank has."""
        first, last = self.range(world, 0)
        return last - first


Segments: TypeAlias = "tuple[Segment, ...]"


@dataclass(frozen=True)
class Replicated:
    """Every rank has all of it."""


@dataclass(frozen=True)
class Partial:
    """Every rank has a term; the value is the sum over the ranks."""


@dataclass(frozen=True)
class Split:
    """A rank has its entries of one dimension, segment after segment: [q q k k v v] -> [q k v]."""

    dim: int
    segments: Segments


@dataclass(frozen=True)
class Own:
    """The full shape, in which a rank's own entries of one dimension are right; the others mean nothing.

    A cache that the caller allocated: its shape is the caller's, a rank writes and reads its own heads.
    """

    dim: int
    segments: Segments


Layout: TypeAlias = "Replicated | Partial | Split | Own"
REPLICATED, PARTIAL = Replicated(), Partial()


def one_segment(axis: Axis, size: int) -> Segments:
    """A dimension of that size along one axis."""
    return (Segment(axis, size),)


def total(segments: Iterable[Segment]) -> int:
    """The size of the whole dimension."""
    return sum(s.size for s in segments)


def local_size(segments: Iterable[Segment], world: int) -> int:
    """The size of a rank's part of the dimension."""
    return sum(s.local(world) for s in segments)


def ranges(segments: Iterable[Segment], world: int, rank: int) -> tuple[tuple[int, int, int], ...]:
    """(first, last + 1, padding) of a rank's entries in the whole dimension, for each segment."""
    found, start = [], 0
    for segment in segments:
        first, last = segment.range(world, rank)
        inside = min(first, segment.size), min(last, segment.size)
        found.append((start + inside[0], start + inside[1], last - first - (inside[1] - inside[0])))
        start += segment.size
    return tuple(found)


def same_sizes(one: Sequence[Segment], two: Sequence[Segment]) -> bool:
    """Whether two dimensions are cut in the same places."""
    return [s.size for s in one] == [s.size for s in two]


def seeds_of(layout: Layout) -> set[Rows]:
    """The rows of linears that made a value shared."""
    if isinstance(layout, (Split, Own)):
        return set().union(*(s.axis.root().seeds for s in layout.segments))
    return set()
