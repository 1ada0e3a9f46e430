"""Sharding a drawn graph for all ranks, and running it in lockstep beside the whole one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.observe import Event, Refused
from graphopt.passes.shard import Shard
from graphopt.pipeline import Context
from graphopt.sharding.lockstep import lockstep
from tests.graphs import calls
from tests.tolerances import close


class Refusals:
    """Listens for what is left whole, and why."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def on_event(self, event: Event) -> None:
        if isinstance(event, Refused):
            self.reasons[event.refusal.node] = event.refusal.reason


def shared(
    gm: fx.GraphModule, world: int, heard: Refusals | None = None, **options: object
) -> list[fx.GraphModule]:
    """The graph of each rank."""
    ranks = []
    for rank in range(world):
        copy = fx.GraphModule(gm, g.copy_graph(gm.graph))
        context = Context(observers=(heard,) if heard else ())
        Shard(world, rank, **options).run(copy, context)  # type: ignore[arg-type]  # options by name
        copy.graph.lint()
        ranks.append(copy)
    return ranks


def values(gm: fx.GraphModule, seed: int = 0) -> list[torch.Tensor]:
    """Random values for the placeholders; integers are small indices."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for node in g.placeholders(gm.graph):
        shape = [int(s) for s in g.shape(node)]
        if g.dtype(node).is_floating_point:
            found.append(0.3 * torch.randn(shape, generator=generator, dtype=g.dtype(node)))
        else:
            found.append(torch.randint(0, 5, shape, generator=generator).to(g.dtype(node)))
    return found


def check(
    gm: fx.GraphModule, world: int, heard: Refusals | None = None, **options: object
) -> list[fx.GraphModule]:
    """Shard, run all ranks in lockstep, and compare with the whole graph; returns the ranks' graphs."""
    gm.recompile()
    args = values(gm)
    want = gm(*[a.clone() for a in args])
    ranks = shared(gm, world, heard, **options)
    for rank, found in enumerate(lockstep(ranks, [[a.clone() for a in args] for _ in ranks])):
        assert isinstance(found, (tuple, list))
        for have, expected in zip(found, want, strict=True):
            close(have, expected, torch.float32)
        for node in g.output_node(ranks[rank].graph).all_input_nodes:
            assert g.shape(node) == tuple(expected_shape(want, ranks[rank], node))
    return ranks


def expected_shape(want: Sequence[torch.Tensor], gm: fx.GraphModule, node: fx.Node) -> torch.Size:
    """The shape of the output that a node is."""
    outputs = list(g.flat_arguments(g.output_node(gm.graph)))
    return want[outputs.index(node)].shape


def reductions(gm: fx.GraphModule) -> int:
    """How many sums over ranks a graph takes."""
    return len(calls(gm, ops.all_reduce.overload))


def gathers(gm: fx.GraphModule) -> int:
    """How many values are gathered from all ranks."""
    return len(calls(gm, ops.all_gather.overload))
