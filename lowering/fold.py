"""Cut what depends on weights alone out of a graph: it is prepared once and kept in the WeightStore.

linear(x, cat([w_q, w_k]))   ->   prepared = prepared_weights(store, w_q, w_k); linear(x, prepared[0])
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.lowering.alias import escapes
from graphopt.lowering.build import insert_call
from graphopt.weights import Prepared, PreparePlan, WeightStore, prepared_weights

aten = torch.ops.aten
HANDLE = "prepared"  # the attribute of the graph module that holds its `Prepared`
NORMS = (ops.rms_norm.overload, ops.add_rms_norm.overload)


def shift_norm_weights(graph: fx.Graph) -> int:
    """rms_norm(x, w, weight_offset=1) -> rms_norm(x, 1 + w): the sum is prepared; returns how many."""
    shifted = 0
    known = g.weight_only(graph)
    for node in [n for n in graph.nodes if g.is_call(n, *NORMS)]:
        weight, offset = g.arg(node, "weight"), g.arg(node, "weight_offset")
        if weight not in known or not isinstance(offset, (int, float)) or offset == 0:
            continue
        assert isinstance(weight, fx.Node)
        with graph.inserting_before(node):
            wide = torch.promote_types(g.dtype(weight), torch.float32)
            if not g.arg(node, "cast_before_scale") and wide != g.dtype(weight):
                weight = insert_call(graph, node, aten.to.dtype, weight, wide, False, False, None)
            weight = insert_call(graph, node, aten.add.Tensor, weight, offset)
        changed = {"weight": weight, "weight_offset": 0.0}
        names = g.argument_names(node.target)
        node.args = tuple(changed[name] if name in changed else g.arg(node, name) for name in names)
        node.kwargs = {}
        shifted += 1
    return shifted


def fold(gm: fx.GraphModule, store: WeightStore) -> tuple[PreparePlan, ...]:
    """Replace every largest value that depends on weights alone by an item of one `prepared_weights` call.

    The weights stay arguments of the graph; their prepared forms carry `meta["prepared"]`, their plan.
    Values whose memory is returned or written stay in the graph: they must be new at each call. So do sizes.
    """
    graph = gm.graph
    cut = cuts(graph)
    if not cut:
        return ()
    inputs = g.placeholders(graph)
    shared: dict[str, fx.GraphModule] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    plans = tuple(plan_of(gm, node, order, inputs, shared) for node in cut)
    sources = sorted({i for plan in plans for i in plan.sources})
    arguments = tuple(tuple(map(sources.index, plan.sources)) for plan in plans)
    setattr(gm, HANDLE, Prepared(store, plans, arguments))
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        handle = graph.create_node("get_attr", HANDLE)
        bound = graph.call_function(prepared_weights, (handle, *(inputs[i] for i in sources)))
        g.set_val(bound, tuple(g.val(node) for node in cut))
        for i, (node, plan) in enumerate(zip(cut, plans, strict=True)):
            item = graph.call_function(operator.getitem, (bound, i))
            g.copy_provenance(item, node)
            g.set_val(item, g.val(node))
            item.meta["prepared"] = plan
            node.replace_all_uses_with(item)
    g.eliminate_dead_code(graph)
    return plans


def cuts(graph: fx.Graph) -> list[fx.Node]:
    """The values to prepare, in order: tensors made of weights alone that something else reads."""
    known = g.weight_only(graph)
    return [
        node
        for node in graph.nodes
        if node in known
        and node.op == "call_function"
        and g.is_tensor(node)
        and any(user not in known for user in node.users)
        and not escapes(node)
    ]


def plan_of(
    gm: fx.GraphModule,
    node: fx.Node,
    order: Mapping[fx.Node, int],
    inputs: list[fx.Node],
    shared: dict[str, fx.GraphModule],
) -> PreparePlan:
    """The graph from weights to one value; plans of one hash (equal layers) share their graph module."""
    needed = sorted(_ancestors(node), key=order.__getitem__)
    sources = [n for n in needed if n.op == "placeholder"]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for i, source in enumerate(sources):
        copies[source] = graph.placeholder(f"w{i}")
        g.set_val(copies[source], g.val(source))
    for old in needed:
        if old not in copies:
            copies[old] = graph.node_copy(old, copies.__getitem__)
    graph.output(copies[node])
    digest = hashlib.sha256(g.fingerprint(graph).encode())
    for constant in (n for n in needed if n.op == "get_attr"):
        digest.update(_content(gm, constant))
    name = digest.hexdigest()[:16]
    if name not in shared:
        shared[name] = fx.GraphModule(gm, graph)
    names = tuple(g.weight_names(s)[0] for s in sources)
    return PreparePlan(shared[name], name, tuple(map(inputs.index, sources)), names)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    found, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                todo.append(source)
    return found


def _content(gm: fx.GraphModule, node: fx.Node) -> bytes:
    """A constant's bytes: plans that differ in a constant differ."""
    value = operator.attrgetter(str(node.target))(gm)
    if not isinstance(value, torch.Tensor):
        return repr(value).encode()
    return bytes(
        value.detach().cpu().reshape(-1).view(torch.uint8).tolist()
    )  # without numpy; constants are small
