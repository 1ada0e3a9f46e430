"""Zeros to count arrivals with, where the last program finishes the work of all; no launch makes them."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field

import torch

from graphopt.torch_private import fake_mode_of

LEAST = 1024  # counters of a stream: they grow seldom


@dataclass
class Counters:
    """Zeroed int32 counters of one device. A kernel leaves those that it used at zero again.

    A launch of a stream may use those of the launch before it: they never run together. A launch that a CUDA
    graph records gets counters of its own, for good: graphs may be replayed side by side on any streams, and
    zeros that are made inside a capture cost a launch at each replay.
    """

    device: torch.device
    streams: dict[int, torch.Tensor] = field(default_factory=dict)
    reserve: torch.Tensor | None = None  # zeros for captures: memory cannot be set while one is recorded
    taken: int = 0
    spent: list[torch.Tensor] = field(default_factory=list)  # earlier reserves: graphs keep their addresses
    lock: threading.Lock = field(default_factory=threading.Lock)

    RESERVED = 1 << 16  # 256 kB: 2,000 captured launches of 32 kv heads

    def take(self, count: int) -> torch.Tensor:
        """`count` zeros for one launch on the current stream."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._captured(count)
        if self.device.type == "cuda" and (self.reserve is None or self.taken > self.RESERVED // 2):
            self._reserve()
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        if stream not in self.streams or self.streams[stream].numel() < count:
            self.streams[stream] = self._zeros(max(LEAST, 2 * count))
        return self.streams[stream]

    def _reserve(self) -> None:
        """A new reserve: the next launch that no capture records may come after a long one."""
        made = self._zeros(self.RESERVED)
        with self.lock:
            if self.reserve is not None:
                self.spent.append(self.reserve)
            self.reserve, self.taken = made, 0

    def _captured(self, count: int) -> torch.Tensor:
        count += -count % 4  # 16 bytes: an address that is aligned otherwise is another compiled variant
        with self.lock:  # two threads may capture
            if self.reserve is not None and self.taken + count <= self.RESERVED:
                self.taken += count
                return self.reserve[self.taken - count : self.taken]
        return torch.zeros(count, dtype=torch.int32, device=self.device)  # one more launch in the graph

    def _zeros(self, count: int) -> torch.Tensor:
        # From the host, which waits: other streams may use them at once.
        return torch.zeros(count, dtype=torch.int32).to(self.device)


_counters_of = functools.cache(Counters)


def counters(x: torch.Tensor, count: int) -> torch.Tensor:
    """At least `count` zeros on the device of x."""
    if fake_mode_of((x,)) is not None:
        return x.new_empty((count,), dtype=torch.int32)
    with torch.cuda.device_of(x):  # whose capture counts
        return _counters_of(x.device).take(count)
