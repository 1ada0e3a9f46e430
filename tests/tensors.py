"""Random tensors that are the same at each call."""

from __future__ import annotations

import torch
from torch import Tensor


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same at each call of the same shape."""
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)


def qkv(b: int = 2, h: int = 2, s: int = 5, d: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    return rand(b, h, s, d), rand(b, h, s, d) + 0.1, rand(b, h, s, d) - 0.1
