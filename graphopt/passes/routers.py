"""Which linears choose experts: found by where their outputs go, never by a name."""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops, torch_private

aten = torch.ops.aten
LINEAR = ops.linear.overload
CHOICES = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default,
           aten.argmax.default, aten.max.dim)  # fmt: skip
BETWEEN = (
    aten.softmax.int,
    aten.log_softmax.int,
    ops.activation.overload,
    ops.all_reduce.overload,
    ops.all_gather.overload,
    operator.getitem,
)
EXPERTS = 1024  # the most that a router chooses among; more are a vocabulary's tokens


def routers(graph: fx.Graph) -> dict[fx.Node, str]:
    """topk(softmax(linear(x, W))) -> {the linear: why it is a router}.

    Between a linear and the choice stand only elementwise operators, softmax, and views: a bias on the
    scores, groups of experts, a slice of a merged linear. A small error there picks another expert.
    """
    found: dict[fx.Node, str] = {}
    for choice in graph.nodes:
        if not g.is_call(choice, *CHOICES) or not g.is_tensor(choice.args[0]):
            continue
        scores = choice.args[0]
        assert isinstance(scores, fx.Node)
        dim = g.arg(choice, "dim")
        sizes = g.shape(scores)
        if not isinstance(dim, int) or not sizes or (isinstance(sizes[dim], int) and sizes[dim] > EXPERTS):
            continue
        for node in _linears_behind(scores):
            found.setdefault(node, f"router: {g.op_name(choice)} chooses among {sizes[dim]} of its outputs")
    return found


def _linears_behind(node: fx.Node) -> list[fx.Node]:
    """The linears that a value is made of elementwise."""
    seen, todo, found = {node}, [node], []
    while todo:
        node = todo.pop()
        if g.is_call(node, LINEAR):
            found.append(node)
        elif _passes_on(node):
            todo += [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)
    return found


def _passes_on(node: fx.Node) -> bool:
    """Whether a call gives each element on, changed or moved, by itself or (softmax) among its scores."""
    if not g.is_call(node) or g.is_call(node, *BETWEEN):
        return g.is_call(node)
    target = node.target
    if not isinstance(target, torch_private.OpOverload) or g.is_mutable(target):
        return False
    is_view = any(r.alias_info is not None for r in target._schema.returns)
    return is_view or torch.Tag.pointwise in target.tags
