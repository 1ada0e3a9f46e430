"""Interleaved A/B timing: both sides meet the same machine, in turns, and the median of the turns counts."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Comparison:
    """Seconds of each turn of two calls that took turns."""

    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def seconds(self) -> tuple[float, float]:
        """The medians of both sides."""
        return statistics.median(self.a), statistics.median(self.b)

    @property
    def speedup(self) -> float:
        """How many times as fast b is: the median of the turns' ratios, as a busy moment hits both sides."""
        return statistics.median(a / b for a, b in zip(self.a, self.b, strict=True))


def compare(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Call a and b in turns, after one unmeasured call of each; every other turn b is first."""
    a(), b()
    times: dict[Callable[[], object], list[float]] = {a: [], b: []}
    for turn in range(turns):
        for call in (a, b) if turn % 2 == 0 else (b, a):
            start = clock()
            call()
            times[call].append(clock() - start)
    return Comparison(tuple(times[a]), tuple(times[b]))


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Run with that many threads inside an operator.

    One thread is what to compare programs with on a shared machine: with several, each operator waits for a
    thread that another process has pushed aside (an attention of 20 us was seen to take 11 ms).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processor() -> str:
    """The processor's name and number of cores: "AMD EPYC (family 26, model 2), 2 cores"."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    kind = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{name}{kind}, {cores} core{'s' if cores > 1 else ''}"
