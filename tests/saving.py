"""A model with every kind of weight, and what it is saved as."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import graphopt
from tests.block import Block


class Mixed(nn.Module):
    """Tied, packed, merged and plain weights, in two dtypes; buffers inside and outside the state dict."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(30, 20)
            self.block = Block(seed)
            self.packed = nn.Parameter(torch.randn(64, 64))
            self.head = nn.Linear(20, 30, bias=False)
            self.head.weight = self.embed.weight
            self.gain = nn.Parameter(torch.randn(20).double())
            self.register_buffer("shift", torch.randn(3, 20))
            self.register_buffer("mean", torch.randn(20), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.gain.float() + self.mean
        wide = nn.functional.linear(nn.functional.pad(x, (0, 44)), self.packed)
        x = self.block(x) + wide[..., :20] + self.shift[1]
        return self.head(x)


TOKENS = torch.tensor([[1, 5, 2, 7], [3, 3, 0, 29]])


def mixed(seed: int = 0) -> Mixed:
    return Mixed(seed).eval().requires_grad_(False)


OPTIONS: dict[str, object] = {"strict": True, "quantize": "int8"}


def run(seed: int = 0) -> tuple[Mixed, torch.Tensor]:
    """An optimized model that has run, and its result."""
    model = graphopt.optimize(mixed(seed), **OPTIONS)
    return model, model(TOKENS)


def weights_file(directory: Path) -> Path:
    (file,) = directory.glob("weights-*.safetensors")
    return file


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: x.detach().clone() for n, x in (*model.named_parameters(), *model.named_buffers())}
