"""Bind collectives over a named axis to a process group: torch's functional collectives.

all_reduce(x, "tp")   ->   wait_tensor(_c10d_functional.all_reduce(x, "sum", "0"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.errors import PipelineError
from graphopt.runtime.ranks import Mesh

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
Emit: TypeAlias = "Callable[..., fx.Node]"


def bind_collectives(graph: fx.Graph, mesh: Mesh | None) -> int:
    """Replace the vocabulary's collectives by those of the mesh's group; returns how many.

    Without a mesh they stay: such a graph runs in lockstep with those of the other ranks
    (`graphopt.sharding.lockstep`).

    Raises:
        PipelineError: a collective over an axis that the mesh does not have.
    """
    bound = 0
    for node in [n for n in graph.nodes if mesh is not None and g.is_call(n, *SPELLINGS)]:
        assert mesh is not None
        axis = g.arg(node, "axis")
        if axis != mesh.axis:
            raise PipelineError(f"{node.name} is over axis {axis!r}; the mesh has {mesh.axis!r} alone")

        def emit(target: Callable[..., object], *args: object, like: fx.Node = node) -> fx.Node:
            new = graph.call_function(target, args)  # type: ignore[arg-type]  # nodes and plain values
            g.copy_provenance(new, like)
            g.set_val(new, g.val(like))
            return new

        with graph.inserting_before(node):
            node.replace_all_uses_with(SPELLINGS[node.target](emit, node, mesh))
        graph.erase_node(node)
        bound += 1
    return bound


def _all_reduce(emit: Emit, node: fx.Node, mesh: Mesh) -> fx.Node:
    """The sum is in new memory: a wait makes it readable."""
    begun = emit(c10d.all_reduce.default, node.args[0], g.arg(node, "reduction"), mesh.group)
    return emit(c10d.wait_tensor.default, begun)


def _all_gather(emit: Emit, node: fx.Node, mesh: Mesh) -> fx.Node:
    """The group gathers along the first dimension."""
    laid = emit(torch.Tensor.contiguous, node.args[0])
    begun = emit(c10d.all_gather_into_tensor.default, laid, mesh.world, mesh.group)
    ready = emit(c10d.wait_tensor.default, begun)
    return emit(side_by_side, ready, mesh.world, g.arg(node, "dim"))


def _reduce_scatter(emit: Emit, node: fx.Node, mesh: Mesh) -> fx.Node:
    """The group scatters along the first dimension."""
    stacked = emit(one_after_another, node.args[0], mesh.world, g.arg(node, "dim"))
    reduction = g.arg(node, "reduction")
    begun = emit(c10d.reduce_scatter_tensor.default, stacked, reduction, mesh.world, mesh.group)
    return emit(c10d.wait_tensor.default, begun)


SPELLINGS: Mapping[object, Callable[[Emit, fx.Node, Mesh], fx.Node]] = {
    ops.all_reduce.overload: _all_reduce,
    ops.all_gather.overload: _all_gather,
    ops.reduce_scatter.overload: _reduce_scatter,
}


def side_by_side(x: torch.Tensor, world: int, dim: int) -> torch.Tensor:
    """The ranks' parts, gathered along the first dimension, along `dim`."""
    return x if dim % x.dim() == 0 else torch.cat(x.chunk(world), dim)


def one_after_another(x: torch.Tensor, world: int, dim: int) -> torch.Tensor:
    """The ranks' parts along `dim`, along the first dimension."""
    return x.contiguous() if dim % x.dim() == 0 else torch.cat(x.chunk(world, dim))
