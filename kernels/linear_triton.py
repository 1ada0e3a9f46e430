"""Linear layers with what stands around them, in Triton."""

from __future__ import annotations

from graphopt.kernel import Kernel

KERNELS: tuple[Kernel, ...] = ()
