"""Rotary embedding, alone and with the writes of a token's key and value, in Triton."""

from __future__ import annotations

from graphopt.kernel import Kernel

KERNELS: tuple[Kernel, ...] = ()
