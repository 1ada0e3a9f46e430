"""Write in place again what was made functional for the passes.

new = index_copy(cache, 2, i, x); copy_(cache, new)   ->   new = index_copy_(cache, 2, i, x)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.lowering.alias import family, readers
from graphopt.lowering.build import insert_call

aten = torch.ops.aten

# What can be written over its first argument -> how: the in-place operator, called with the same arguments.
IN_PLACE: dict[object, Callable[..., object]] = {
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_put.default: aten.index_put_.default,
    aten.index_add.default: aten.index_add_.default,
    aten.index_fill.int_Scalar: aten.index_fill_.int_Scalar,
    aten.masked_fill.Scalar: aten.masked_fill_.Scalar,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter.value: aten.scatter_.value,
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
}
# Those that are worth it on any buffer: they write little of it.
UPDATES = (ops.cache_update.overload, aten.index_copy.default, aten.index_put.default)
# A part is written: the view of it, then a copy into the view.
PARTS: dict[object, Callable[..., object]] = {
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.select_scatter.default: aten.select.int,
}


def write_in_place(graph: fx.Graph) -> int:
    """Turn each final `copy_(input, value)` into in-place calls where that is safe; returns how many.

    Safe means: the value was made from the input by calls that can run in place, one after the other;
    nothing reads an older state of the input after it is overwritten; and the value is not returned as
    memory of its own.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    written = 0
    for copy in [n for n in graph.nodes if g.is_call(n, aten.copy_.default)]:
        target, value = copy.args[:2]
        if not isinstance(target, fx.Node) or target.op != "placeholder" or not isinstance(value, fx.Node):
            continue
        chain = chain_to(target, value)
        if chain is None or unsafe(target, chain, copy, order) is not None:
            continue
        holder = target
        for node in chain:
            holder = overwrite(graph, target, node)
        copy.replace_all_uses_with(holder)
        graph.erase_node(copy)
        written += 1
    return written


def update_fresh(graph: fx.Graph) -> int:
    """index_copy(zeros(..), ..) -> index_copy_(zeros(..), ..) where nobody else reads them; returns how many.

    A cache that the graph allocates itself would else be allocated and copied twice.
    """
    updated = 0
    for node in [n for n in graph.nodes if g.is_call(n, *UPDATES, *PARTS) and _has_position(n)]:
        base = node.args[0]
        if not isinstance(base, fx.Node) or not _is_fresh(base) or readers(base) != {node}:
            continue
        if any(other in family(base) for other in list(g.flat_arguments(node))[1:]):
            continue
        if g.dtype(base) == g.dtype(node) and g.same_shape(g.shape(base), g.shape(node)):
            overwrite(graph, base, node)
            updated += 1
    return updated


def _is_fresh(node: fx.Node) -> bool:
    """Whether a call makes new memory: it is an operator, and its schema lets its result be no view."""
    schema = g.schema_arguments(node.target) if node.op == "call_function" else ()
    return bool(schema) and g.is_pure(node) and not any(a.alias_info is not None for a in schema)


def _has_position(node: fx.Node) -> bool:
    return not g.is_call(node, ops.cache_update.overload) or g.arg(node, "position") is not None


def chain_to(target: fx.Node, value: fx.Node) -> list[fx.Node] | None:
    """The calls from an input to the value written back to it, in order; None if it is made otherwise."""
    chain: list[fx.Node] = []
    while value is not target:
        if not g.is_call(value, *IN_PLACE, *PARTS, ops.cache_update.overload):
            return None
        if not _has_position(value):
            return None
        chain.append(value)
        base = value.args[0]
        if not isinstance(base, fx.Node):
            return None
        value = base
    return chain[::-1] or None


def unsafe(target: fx.Node, chain: Sequence[fx.Node], copy: fx.Node, order: dict[fx.Node, int]) -> str | None:
    """Why the chain may not run in place on the input; None where it may."""
    state = target
    for node in chain:
        if g.dtype(node) != g.dtype(target) or not g.same_shape(g.shape(node), g.shape(target)):
            return f"{node.name} is {g.dtype(node)} {tuple(g.shape(node))}, the input is not"
        if any(other in family(state, copy) for other in list(g.flat_arguments(node))[1:]):
            return f"{node.name} reads what it writes"
        late = [r.name for r in readers(state, copy) if r is not node and order[r] > order[node]]
        if late:
            return f"{late[0]} reads {state.name} after it is overwritten"
        state = node
    returned = any(reader.op == "output" for reader in readers(state, copy))
    return f"{state.name} is returned" if returned else None


def overwrite(graph: fx.Graph, target: fx.Node, node: fx.Node) -> fx.Node:
    """Let one call of the chain write to the input; returns the node that then is the input's memory."""
    with graph.inserting_before(node):
        if node.target in PARTS:
            part = insert_call(graph, node, PARTS[node.target], target, *node.args[2:])
            insert_call(graph, node, aten.copy_.default, part, node.args[1], False)
            node.replace_all_uses_with(target)
            graph.erase_node(node)
            return target
        if g.is_call(node, ops.cache_update.overload):
            position = g.arg(node, "position")
            assert isinstance(position, fx.Node)
            if g.dtype(position) != torch.int64:
                position = insert_call(graph, node, aten.to.dtype, position, torch.int64, False, False, None)
            node.target, node.args = aten.index_copy_.default, (target, -2, position, node.args[1])
            return node
    node.target, node.args = IN_PLACE[node.target], (target, *node.args[1:])
    return node
