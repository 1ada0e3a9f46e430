"""Attention of few queries over long keys, split over programs, in Triton."""

from __future__ import annotations

from graphopt.kernel import Kernel

KERNELS: tuple[Kernel, ...] = ()
