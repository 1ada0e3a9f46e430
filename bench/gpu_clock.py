"""Timing on a GPU: both sides from CUDA graphs, in turns, on inputs that the cache has forgotten."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CACHE = 64 << 20  # bytes: an H200's L2 holds 60 MB
COPIED = 4 << 30  # bytes of the copy that measures bandwidth
SIDE = 8192  # of the product that measures the matrix units

Call = Callable[[], object]


@dataclass(frozen=True)
class Turned:
    """Median seconds of one call of each side, and the median of the turns' ratios a / b."""

    a: float
    b: float
    ratio: float


def rotations(nbytes: int) -> int:
    """How many sets of buffers of that size keep each call's inputs out of the cache; at least 2."""
    return max(2, min(64, -(-3 * CACHE // max(1, nbytes))))


def captured(calls: Sequence[Call]) -> Callable[[], None]:
    """A CUDA graph of the calls, one after the other: the host's part is paid once for all."""
    for call in calls:  # compile, load, allocate
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def seconds(replay: Call, calls: int, repeats: int = 1) -> float:
    """Seconds of one of `calls` calls in a replay, by events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / (calls * repeats)


def compare(a: Sequence[Call], b: Sequence[Call], *, turns: int = 15) -> Turned:
    """Both sides, each a list of equal calls on rotated buffers, in turns; every other turn b is first."""
    sides = captured(a), captured(b)
    sizes = len(a), len(b)
    times: tuple[list[float], list[float]] = ([], [])
    for replay, size in zip(sides, sizes, strict=True):
        seconds(replay, size)
    for turn in range(turns):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            times[i].append(seconds(sides[i], sizes[i]))
    ratio = statistics.median(x / y for x, y in zip(*times, strict=True))
    return Turned(statistics.median(times[0]), statistics.median(times[1]), ratio)


def alone(calls: Sequence[Call], *, turns: int = 15) -> float:
    """Median seconds of one of the calls."""
    replay = captured(calls)
    seconds(replay, len(calls))
    return statistics.median(seconds(replay, len(calls)) for _ in range(turns))


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, reads and writes counted."""
    source = torch.randint(0, 255, (COPIED,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / alone([lambda: target.copy_(source)])


def matrix_peak() -> float:
    """FLOP/s of torch's bf16 product of SIDE x SIDE random matrices."""
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * SIDE**3 / alone([lambda: a @ b])
