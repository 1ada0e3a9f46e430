"""A fast implementation of an op: what it launches, what it refuses, and the cases that test and time it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx

Refuses: TypeAlias = "Callable[[fx.Node], str | None]"
GPU = "gpu"  # a kernel's target: every one in `graphopt.targets.TARGETS`
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")


@dataclass(frozen=True)
class Tensor:
    """A tensor argument of a case, by description: the same case serves every dtype and device.

    Attributes:
        shape: its sizes.
        dtype: None for the dtype the case is run in; integer tensors hold 0 .. `below` - 1, each once
            while they last.
        layout: `transposed` swaps dimensions 1 and 2 in memory (heads after a view), `sliced` is a part of a
            wider last dimension (one of Q, K, V in their merged linear), `expanded` has stride 0 in the
            first dimension.
        scale: standard deviation of the random values.
        below: exclusive upper bound of integer values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    layout: str = "contiguous"
    scale: float = 1.0
    below: int = 2

    def make(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> torch.Tensor:
        """The tensor: normally distributed, reproducible from the generator (a CPU one: devices agree)."""
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is none of {LAYOUTS}")
        size = list(self.shape)
        if self.layout == "transposed":
            size[1], size[2] = size[2], size[1]
        if self.layout == "sliced":
            size[-1] *= 2
        if self.layout == "expanded":
            size[0] = 1
        made = self._values(size, self.dtype or dtype, generator).to(device)
        if self.layout == "transposed":
            return made.transpose(1, 2)
        if self.layout == "sliced":
            return made.narrow(-1, self.shape[-1] // 2, self.shape[-1])
        return made.expand(self.shape)

    def _values(self, size: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        if dtype.is_floating_point:
            return torch.randn(size, generator=generator, dtype=torch.float32).mul_(self.scale).to(dtype)
        if dtype is torch.bool:
            return torch.rand(size, generator=generator) < 0.7
        count = math.prod(size)
        return torch.arange(count).remainder(self.below).reshape(size).to(dtype)


@dataclass(frozen=True)
class Case:
    """Arguments of one call of an op, in the order of its signature; a `Tensor` stands for random values."""

    name: str
    arguments: tuple[object, ...]

    def make(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
    ) -> tuple[object, ...]:
        """The arguments as tensors and plain values."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(a.make(dtype, device, generator) if isinstance(a, Tensor) else a for a in self.arguments)

    def with_residual(self) -> Case:
        """The same call of the op's `add_` form: after the first tensor one more of its shape."""
        x, *rest = self.arguments
        assert isinstance(x, Tensor)
        return Case(self.name, (x, Tensor(x.shape), *rest))


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op for one target.

    Attributes:
        op: the op's name in the vocabulary, as `rms_norm`.
        name: the kernel's own name, as the report shows it.
        launch: a module-level function with the op's signature (generated code calls it by its qualified
            name).
        refuses: why it cannot run a node, naming the value and the limit; None where it can.
        target: `cpu`, one GPU target as `cuda:90`, or `gpu` for all of them.
        cases: what the correctness test and the benchmark run.
        must_accept: cases that it may not refuse; GPU kernels are compiled at these, in half precision and
            fp32, for each target.
        expects: (jit function's name, what its code must have in half precision): "matrix", the target's
            matrix instruction; "wide_loads", 16-byte loads of global memory.
    """

    op: str
    name: str
    launch: Callable[..., object]
    refuses: Refuses
    target: str = "cpu"
    cases: tuple[Case, ...] = ()
    must_accept: tuple[Case, ...] = ()
    expects: tuple[tuple[str, str], ...] = ()


def never(node: fx.Node) -> None:
    """The `refuses` of a kernel that takes everything its op takes."""
