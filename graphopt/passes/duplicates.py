"""Equal calls that rules have made, one for each layer, become one: layers share their masks and biases."""

from __future__ import annotations

from torch import fx

from graphopt import aliasing
from graphopt import graph as g
from graphopt.passes.speller import argument_key, mergeable


def merge_made(gm: fx.GraphModule) -> int:
    """f(x), f(x) -> f(x) for ATen calls that rules made; returns how many went. Recompiling is the caller's.

    The canonical graph has no equal calls, so only replacements bring them. A graph in which something is
    written in place is left as it is: what was read before a write is not what is read after it.
    """
    if any(aliasing.writes(n) for n in gm.graph.nodes):
        return 0
    known: dict[object, fx.Node] = {}
    merged = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or g.is_ours(node.target) or not mergeable(node.target):
            continue
        key = (node.target, argument_key(node.args), argument_key(tuple(node.kwargs.items())))
        first = known.setdefault(key, node)
        if first is not node and g.origin(node) is not None:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
            merged += 1
    return merged
