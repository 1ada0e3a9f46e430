"""Delta debugging: the smallest part of a list that still breaks something."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def ddmin(units: Sequence[T], breaks: Callable[[tuple[T, ...]], bool]) -> tuple[T, ...]:
    """A part of `units` that breaks and of which no unit can be left out: interacting pairs stay together.

    It tries ever smaller chunks, then what is left without each. For one culprit of n it takes about
    2 log2(n) tries, for interacting ones more, never above n^2 + 3n. Source: Zeller and Hildebrandt,
    "Simplifying and Isolating Failure-Inducing Input", TSE 28(2), 2002, figure 6.

    Args:
        units: all of them together break, none of them does not; neither is tried.
        breaks: asked once for each part, in the order of `units`.
    """
    left = tuple(units)
    count = 2
    tried: dict[tuple[T, ...], bool] = {}

    def asked(part: tuple[T, ...]) -> bool:
        if part not in tried:
            tried[part] = breaks(part)
        return tried[part]

    while len(left) > 1:
        chunks = _chunks(left, count)
        rests = [tuple(u for u in left if u not in chunk) for chunk in chunks] if count > 2 else []
        chunk = next((chunk for chunk in chunks if asked(chunk)), None)
        rest = None if chunk is not None else next((rest for rest in rests if asked(rest)), None)
        if chunk is not None:
            left, count = chunk, 2
        elif rest is not None:
            left, count = rest, max(count - 1, 2)
        elif count >= len(left):
            return left
        else:
            count = min(2 * count, len(left))
    return left


def _chunks(units: tuple[T, ...], count: int) -> list[tuple[T, ...]]:
    """The units in `count` neighbouring chunks of nearly equal size."""
    ends = [len(units) * i // count for i in range(count + 1)]
    return [units[a:b] for a, b in itertools.pairwise(ends)]
