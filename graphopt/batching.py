"""Regions of a recorded graph that `torch.vmap` has batched, cut out so that they can be run as one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from graphopt.errors import CaptureRefused

ENTER, EXIT = "_vmap_increment_nesting", "_vmap_decrement_nesting"
# What the other transforms of torch.func record where they begin -> what they are.
DERIVATIVES: Mapping[str, str] = {
    "_grad_increment_nesting": "torch.func.grad, vjp or jacrev",
    "_jvp_increment_nesting": "torch.func.jvp or jacfwd",
    "_enter_dual_level": "forward-mode differentiation",
}


@dataclass(frozen=True)
class Batched:
    """One region, outermost where they are nested.

    Attributes:
        nodes: its nodes, from entering to leaving.
        reads: the nodes outside of it that it reads, in order.
        gives: its nodes that are read outside of it, in order.
        body: (what it reads) -> a tuple of what it gives.
    """

    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]
    body: fx.GraphModule


def batched_regions(gm: fx.GraphModule) -> tuple[Batched, ...]:
    """The regions of a recorded graph, in order. Raises CaptureRefused where one is entered and not left."""
    found: list[Batched] = []
    inside: list[fx.Node] = []
    depth = 0
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        depth += name == ENTER
        if depth:
            inside.append(node)
        depth -= name == EXIT
        if inside and not depth:
            found.append(_cut(gm, tuple(inside)))
            inside = []
    if inside:
        raise CaptureRefused(f"the region of torch.vmap that {inside[0].name} begins has no end")
    return tuple(found)


def _cut(gm: fx.GraphModule, nodes: tuple[fx.Node, ...]) -> Batched:
    """A region with a copy of its nodes as its body."""
    own = set(nodes)
    reads = tuple(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own))
    gives = tuple(node for node in nodes if any(user not in own for user in node.users))
    body = fx.Graph()
    env = {node: body.placeholder(node.name) for node in reads}
    for node in nodes:
        env[node] = body.node_copy(node, env.__getitem__)
    body.output(tuple(env[node] for node in gives))
    return Batched(nodes, reads, gives, fx.GraphModule(gm, body, "Batched"))
