"""What updates of caches do to layouts: a cache keeps the caller's shape, a rank uses its own heads of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.sharding.flow import Flow, Outcome, Rule
from graphopt.sharding.layout import REPLICATED, Layout, Own, Replicated, Split

aten = torch.ops.aten
HEADS = 1  # of [batch, heads, length, head_dim]


def cache_update(flow: Flow, node: fx.Node) -> Outcome:
    """cache_update(cache, new, position): the cache keeps the caller's shape, a rank its own heads of it."""
    cache, new = node.args[:2]
    assert isinstance(cache, fx.Node) and isinstance(new, fx.Node)
    flow.full(node, g.arg(node, "position"), "it is an index")
    return _written(flow, node, cache, new, HEADS)


def _written(flow: Flow, node: fx.Node, base: fx.Node, new: fx.Node, *dims: int) -> Layout:
    """base with `new` written into it, shared along one of `dims`."""
    have, old = flow.layout(new), flow.layout(base)
    mine = isinstance(old, (Replicated, Own)) and node in attended(flow)
    if isinstance(have, (Split, Own)) and have.dim in dims and mine:
        if isinstance(old, Own) and old.dim == have.dim:
            for one, other in zip(old.segments, have.segments, strict=True):
                one.axis.unite(other.axis)
        flow.own(node, new, have.dim, have.segments)
        return Own(have.dim, have.segments)
    if isinstance(old, Own) and isinstance(have, Replicated):
        return old
    flow.full(node, new, f"{g.op_name(node)} writes it into a whole")
    flow.full(node, base, f"{g.op_name(node)} writes into a whole")
    return REPLICATED


def index_copy(flow: Flow, node: fx.Node) -> Outcome:
    """index_copy(base, dim, index, new): as a cache's update."""
    base, dim, index, new = node.args[:4]
    assert isinstance(base, fx.Node) and isinstance(new, fx.Node) and isinstance(dim, int)
    flow.full(node, index, "it is an index")
    return _written(flow, node, base, new, *(d for d in range(g.rank(base)) if d != dim % g.rank(base)))


def index_put(flow: Flow, node: fx.Node) -> Outcome:
    """index_put(base, [None, None, rows], new): as a cache's update, if one dimension alone is indexed."""
    base, indices, new = node.args[:3]
    assert isinstance(base, fx.Node) and isinstance(new, fx.Node) and isinstance(indices, (list, tuple))
    given = [i for i in indices if i is not None]
    for index in given:
        flow.full(node, index, "it is an index")
    if len(given) != 1 or g.rank(given[0]) != 1 or g.rank(new) != g.rank(base):  # type: ignore[arg-type]  # a node
        return _written(flow, node, base, new)
    indexed = next(d for d, i in enumerate(indices) if i is not None)
    return _written(flow, node, base, new, *(d for d in range(g.rank(base)) if d != indexed))


def write_back(flow: Flow, node: fx.Node) -> Outcome:
    """copy_(input, value): a cache is written as it is kept."""
    target, value = node.args[:2]
    if isinstance(flow.layout(value), Own):
        return REPLICATED
    if isinstance(flow.layout(value), Split) and value in caches(flow):
        have = flow.layout(value)
        assert isinstance(have, Split) and isinstance(value, fx.Node)
        flow.own(node, value, have.dim, have.segments)
        return REPLICATED
    flow.full(node, value, "it is written into an input")
    flow.full(node, target, "it is written")
    return REPLICATED


def attended(flow: Flow) -> set[fx.Node]:
    """What attention's keys and values are made of in this graph; a cache that it does not read is whole.

    After a graph break, code that no graph has may read the cache.
    """
    if flow.attended is None:
        flow.attended = set()
        attentions = (ops.attention.overload, ops.attention_lse.overload)
        todo = [x for node in flow.graph.nodes if g.is_call(node, *attentions) for x in node.args[1:3]]
        while todo:
            node = todo.pop()
            if isinstance(node, fx.Node) and node not in flow.attended:
                flow.attended.add(node)
                if not g.is_call(node, ops.linear.overload, *attentions):
                    todo += node.all_input_nodes
    return flow.attended


KEEPS_HEADS = (aten.slice.Tensor, aten.clone.default, aten.roll.default, aten.pad.default)


def caches(flow: Flow) -> set[fx.Node]:
    """Values that attention reads as keys or values, and what is cut out of them: caches, where returned."""
    if flow.kept is not None:
        return flow.kept
    found: set[fx.Node] = set()
    for node in flow.graph.nodes:
        if g.is_call(node, ops.attention.overload, ops.attention_lse.overload):
            found.update(n for n in node.args[1:3] if isinstance(n, fx.Node))
    for node in flow.graph.nodes:
        if g.is_call(node, *KEEPS_HEADS) and node.args[0] in found:
            found.add(node)
    flow.kept = found
    return found


def updated(flow: Flow) -> set[fx.Node]:
    """Those of the caches that go on from an input: a concatenation with it, and what is cut out of that."""
    found: set[fx.Node] = set()
    for node in flow.graph.nodes:
        if g.is_call(node, aten.cat.default):
            if any(_an_input(x) for x in node.all_input_nodes):
                found.add(node)
        elif g.is_call(node, *KEEPS_HEADS) and node.args[0] in found:
            found.add(node)
    return found & caches(flow)


def _an_input(node: fx.Node) -> bool:
    """Whether a value is an input, or is cut out of one."""
    while g.is_call(node, *KEEPS_HEADS):
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node.op == "placeholder"


CACHE_RULES: Mapping[object, Rule] = {
    ops.cache_update.overload: cache_update,
    aten.index_copy.default: index_copy,
    aten.index_put.default: index_put,
    aten.copy_.default: write_back,
}
