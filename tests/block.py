"""One small attention block with sibling projections, for tests that need weights to merge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from graphopt import backend
from tests.tolerances import TOLERANCE

MERGED = 2  # weights that one block has prepared: Q, K, V in one and gate, up in one (no biases)


class Block(nn.Module):
    """x [batch, length, 20] -> x + attention(x), then an MLP; 5 heads of 4; `breaks` adds a graph break."""

    def __init__(self, seed: int = 0, breaks: bool = False, layer: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.q, self.k, self.v, self.o = (layer(20, 20, bias=False) for _ in range(4))
            self.gate, self.up = layer(20, 33, bias=False), layer(20, 33, bias=False)
            self.down = layer(33, 20, bias=False)
        self.breaks = breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], 5, 4)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def block(seed: int = 0, breaks: bool = False) -> Block:
    """An eval-mode block without gradients."""
    return Block(seed, breaks).eval().requires_grad_(False)


def example(length: int = 5, batch: int = 2) -> torch.Tensor:
    """x [batch, length, 20], the same at each call."""
    return torch.randn(batch, length, 20, generator=torch.Generator().manual_seed(length))


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts, there when the block ends: graphs compiled, weights prepared. Forgets older reports."""
    backend.clear_reports()  # the backend keeps a limited number of them
    before = backend.STORE.prepared
    counts: dict[str, int] = {}
    yield counts
    counts["graphs"] = len(backend.reports())
    counts["prepared"] = backend.STORE.prepared - before


def agree(ours: torch.Tensor, eager: torch.Tensor) -> None:
    """Equal as far as fp32 sums in another order are."""
    rtol, atol = TOLERANCE[torch.float32]
    torch.testing.assert_close(ours, eager, rtol=rtol, atol=atol)
