"""Activations, alone and gated, in Triton."""

from __future__ import annotations

from graphopt.kernel import Kernel

KERNELS: tuple[Kernel, ...] = ()
