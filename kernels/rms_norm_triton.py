"""RMSNorm with and without residual, in Triton."""

from __future__ import annotations

from graphopt.kernel import Kernel

KERNELS: tuple[Kernel, ...] = ()
