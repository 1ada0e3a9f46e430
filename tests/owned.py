"""An optimized model with a packed weight, and what lies in memory of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

import graphopt
from graphopt import graph as g
from graphopt.ownership import is_stand_in
from graphopt.torch_private import new_fake_mode

OPTIONS: dict[str, object] = {"quantize": "int8", "quantize_exclude": ("head",)}


class Packed(nn.Module):
    """x [batch, 64] -> 64 features; with OPTIONS, `weight` is packed and `head` is read as it is."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.weight = nn.Parameter(torch.randn(64, 64) / 5)
            self.gain = nn.Parameter(torch.randn(64))
            self.head = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + nn.functional.linear(x, self.weight, self.gain * 2))


def rows(count: int = 3) -> torch.Tensor:
    """x [count, 64]."""
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(count))


def packed(seed: int = 0) -> Packed:
    return Packed(seed).eval().requires_grad_(False)


def owned(seed: int = 0, **options: object) -> Packed:
    """An optimized one."""
    return graphopt.optimize(packed(seed), **{"strict": True, **OPTIONS, **options})


def released(seed: int = 0, **options: object) -> tuple[Packed, torch.Tensor]:
    """An optimized one that has run, and what it gave for `rows()`."""
    model = owned(seed, **options)
    return model, model(rows())


def compiled(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same program on weights that are not owned."""
    return torch.compile(model, backend="graphopt", options=dict(OPTIONS))


def stand_ins(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if is_stand_in(p)}


def memory(model: nn.Module) -> int:
    """The bytes of all storages that parameters and their prepared forms lie in, each counted once."""
    return graphopt.weight_bytes(model) - sum(b.nbytes for b in model.buffers())


class Transposed(nn.Module):
    """Q, K, V with weights [in, out]: merged, they stand in what is prepared as columns."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(64, n) / 5) for n in (64, 12, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.addmm(x.new_zeros(w.shape[1]), x, w) for w in (self.q, self.k, self.v)], -1)


def prepare_graph(build: Callable[..., fx.Node], *shapes: tuple[int, ...]) -> fx.GraphModule:
    """A prepare graph with abstract values, from `build(graph, *weights)`."""
    mode, graph = new_fake_mode(), fx.Graph()
    weights = []
    for i, shape in enumerate(shapes):
        weights.append(graph.placeholder(f"w{i}"))
        with mode:
            g.set_val(weights[-1], torch.empty(shape))

    def call(target: Callable[..., object], *args: object) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]  # nodes
        with mode:
            g.set_val(node, target(*fx.node.map_arg(args, g.val)))
        return node

    graph.output(build(call, *weights))
    return fx.GraphModule(nn.Module(), graph)
