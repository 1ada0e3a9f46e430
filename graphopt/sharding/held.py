"""Which inputs and outputs of a rank's graph hold its own heads alone, and which inputs it reads whole."""

from __future__ import annotations

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.runtime.held import Held
from graphopt.sharding.caches import HEADS
from graphopt.sharding.elementwise import is_pointwise
from graphopt.sharding.flow import Flow, tensors
from graphopt.sharding.layout import Layout, Own, Split

aten = torch.ops.aten
WRITES = (ops.cache_update.overload, aten.index_copy.default, aten.index_put.default)
ALONG_ANOTHER = (aten.slice.Tensor, aten.index_select.default)  # (x, dim, ...)
KEEP_ALL = (aten.clone.default, aten.roll.default, aten.pad.default)
READ_NOTHING = (aten.zeros_like.default, aten.empty_like.default)


def held(flow: Flow) -> Held:
    """What a settled flow's graph does, before it is edited."""
    inputs = {node: i for i, node in enumerate(g.placeholders(flow.graph))}
    outputs = _outputs(flow.output)
    returned = [i for i, node in outputs if isinstance(_given(flow, flow.output, node), Own)]
    written, whole, passed = [], [], []
    for node in flow.graph.nodes:
        if g.is_call(node, aten.copy_.default) and node.args[0] in inputs:
            if isinstance(_given(flow, node, node.args[1]), Own):
                written.append(inputs[node.args[0]])
    for node, i in inputs.items():
        if node in flow.weights or not g.is_tensor(node) or g.rank(node) <= HEADS:
            continue
        read, same = _followed(flow, node)
        if read:
            whole.append((i, node.name))
        passed += [(at, i) for at, value in outputs if value in same]
    return Held(tuple(whole), tuple(dict.fromkeys(written)), tuple(returned), tuple(passed))


def _outputs(output: fx.Node) -> list[tuple[int, fx.Node]]:
    """The values that a graph returns, with their positions."""
    values = output.args[0]
    found = values if isinstance(values, (tuple, list)) else (values,)
    return [(i, v) for i, v in enumerate(found) if isinstance(v, fx.Node)]


def _given(flow: Flow, user: fx.Node, value: object) -> Layout:
    """What a call gets of a value."""
    assert isinstance(value, fx.Node)
    return flow.wants.get((user, value), flow.layout(value))


def _followed(flow: Flow, start: fx.Node) -> tuple[bool, set[fx.Node]]:
    """Whether all heads of an input are read, and what is made of it head by head."""
    at = {start: HEADS}  # value -> the dimension of its heads
    todo = [start]
    while todo:
        node = todo.pop()
        for user in node.users:
            want = flow.wants.get((user, node))
            if user.op == "output" or user.target in READ_NOTHING or not g.is_tensor(user):
                continue
            if isinstance(want, Split) and want.dim == at[node]:
                continue
            if g.is_call(user, aten.copy_.default) and user.args[0] is node:
                continue
            if g.is_call(user, *WRITES) and user.args[0] is node and isinstance(flow.layout(user), Own):
                continue
            moved = _moved(user, node, at[node])
            if moved is None:
                return True, set(at)
            if user not in at:
                at[user] = moved
                todo.append(user)
    return False, set(at)


def _moved(user: fx.Node, node: fx.Node, heads: int) -> int | None:
    """The dimension of the heads in a result that is made head by head; None where heads meet."""
    rank = g.rank(node)
    if g.is_call(user, *KEEP_ALL) or (is_pointwise(user.target) and tensors(user) == [node]):
        return heads
    if g.is_call(user, *WRITES):
        return heads if user.args[0] is node else None
    if g.is_call(user, aten.permute.default):
        return [d % rank for d in user.args[1]].index(heads)  # type: ignore[union-attr, operator]  # ints
    if g.is_call(user, *ALONG_ANOTHER, aten.cat.default):
        dim = user.args[1] if len(user.args) > 1 else 0
        return heads if isinstance(dim, int) and dim % rank != heads else None
    return None
