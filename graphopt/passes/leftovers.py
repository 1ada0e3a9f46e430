"""Scores and weights that became no attention go back to what they were: matmul, mul, tanh, add, softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.observe import Observer, Refused, emit
from graphopt.rewrite import Refusal, fake_result
from graphopt.torch_private import OpOverload

aten = torch.ops.aten
RULE = "attention_scores"
PRODUCTS = (aten.matmul.default, aten.baddbmm.default, aten.einsum.default)
ELEMENTWISE = (
    *(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.tanh.default),
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther),
    *(aten.to.dtype, aten.reshape.default, aten.clamp_min.default, aten.cat.default),
)


def dissolve_scores(gm: fx.GraphModule, observers: Sequence[Observer]) -> int:
    """attention_scores(q, k, scale, bias, softcap) -> softcap(q @ k^T * scale) + bias, in ATen; how many.

    `attention_weights` is the softmax of that. The ops are half of something: no kernel has them, and left in
    the graph they would count as recognised. Each is reported with what reads it, which is what no rule could
    swallow. The caller recompiles the module.
    """
    for node in list(gm.graph.nodes):
        if g.is_call(node, ops.attention_weights.overload):
            node.replace_all_uses_with(_softmax(node))
            gm.graph.erase_node(node)
    left = [n for n in gm.graph.nodes if g.is_call(n, ops.attention_scores.overload)]
    for node in left:
        readers = ", ".join(f"{g.op_name(u)} ({u.name})" for u in node.users) or "nobody"
        reason = f"no attention: the scores are read by {readers}"
        emit(observers, Refused(Refusal(RULE, node.name, g.module_path(node), g.source(node), reason, 1)))
        node.replace_all_uses_with(_spelled(node))
        gm.graph.erase_node(node)
    return len(left)


def report_products(gm: fx.GraphModule, observers: Sequence[Observer]) -> None:
    """Name each product under a softmax that no rule took for scores; its sizes and dtypes say why."""
    for node in gm.graph.nodes:
        product = _product(node) if g.is_call(node, aten.softmax.int) else None
        if product is None:
            continue
        operands = [f"{list(g.shape(x))} {g.dtype(x)}" for x in product.all_input_nodes if g.is_tensor(x)]
        reason = (
            f"no attention: {product.name}, a product of {' and '.join(operands)}, is none of a head's scores"
        )
        place = g.module_path(product), g.source(product)
        emit(observers, Refused(Refusal(RULE, product.name, *place, reason, 1)))


def _product(softmax: fx.Node) -> fx.Node | None:
    """The product behind a softmax, through what only changes its elements."""
    layer = list(softmax.all_input_nodes)
    for _ in range(10):
        found = next((n for n in layer if g.is_call(n, *PRODUCTS)), None)
        if found is not None:
            return found
        layer = [i for n in layer if g.is_call(n, *ELEMENTWISE) for i in n.all_input_nodes]
    return None


def _softmax(node: fx.Node) -> fx.Node:
    """attention_weights(q, k, …, sinks) -> softmax(attention_scores(q, k, …)), with a column of sinks."""
    given = {n: g.arg(node, n) for n in g.argument_names(node.target)}
    sinks = given.pop("sinks")
    names = g.argument_names(ops.attention_scores.overload)
    with node.graph.inserting_before(node):
        scores = _call(node, ops.attention_scores.overload, *(given[n] for n in names))
        if not isinstance(sinks, fx.Node):
            return _call(node, aten.softmax.int, scores, -1, None)
        batch, heads, queries, keys = (_size(node, scores, d) for d in range(4))
        column = _call(node, aten.reshape.default, sinks, [1, heads, 1, 1])
        column = _call(node, aten.expand.default, column, [batch, heads, queries, 1], implicit=False)
        both = _call(node, aten.cat.default, [scores, column], -1)
        weights = _call(node, aten.softmax.int, both, -1, None)
        return _call(node, aten.slice.Tensor, weights, -1, 0, keys, 1)


def _size(node: fx.Node, x: fx.Node, dim: int) -> object:
    """A size as an argument: the literal, or a node that holds it."""
    size = g.shape(x)[dim]
    return size if isinstance(size, int) else _call(node, aten.sym_size.int, x, dim)


def _call(node: fx.Node, target: OpOverload, *args: object, **kwargs: object) -> fx.Node:
    """A call that stands for a node, at the graph's current place."""
    new = node.graph.create_node("call_function", target, args, kwargs, name=g.base_name(target))  # type: ignore[arg-type]  # nodes and literals
    g.copy_provenance(new, node)
    if (origin := g.origin(node)) is not None:
        new.meta["origin"] = origin
    g.set_val(new, fake_result(new))
    return new


def _spelled(node: fx.Node) -> fx.Node:
    """The scores as the program had them, step by step in the dtype of q."""
    q, k, scale, bias, softcap, lowest = (g.arg(node, n) for n in g.argument_names(node.target))
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node)

    def call(target: OpOverload, *args: object, **kwargs: object) -> fx.Node:
        return _call(node, target, *args, **kwargs)

    with node.graph.inserting_before(node):
        dims, x = [0, 1, 3, 2], k
        if g.is_call(k, aten.permute.default):
            dims, x = [k.args[1][d] for d in dims], k.args[0]  # type: ignore[index, assignment, misc]  # ints, a node
        keys = x if dims == [0, 1, 2, 3] else call(aten.permute.default, x, dims)
        scores = call(aten.matmul.default, q, keys)
        if scale != 1.0:
            scores = call(aten.mul.Tensor, scores, scale)
        if softcap is not None:
            scores = call(aten.tanh.default, call(aten.div.Tensor, scores, softcap))
            scores = call(aten.mul.Tensor, scores, softcap)
        if not isinstance(bias, fx.Node):
            return scores
        if g.dtype(bias) != torch.bool:
            total = call(aten.add.Tensor, scores, bias, alpha=1)
            return total if g.dtype(total) == g.dtype(q) else call(aten.to.dtype, total, g.dtype(q))
        fill = torch.finfo(g.dtype(q)).min if lowest else float("-inf")
        negated = g.is_call(bias, aten.logical_not.default)
        hidden = bias.args[0] if negated else call(aten.logical_not.default, bias)
        return call(aten.masked_fill.Scalar, scores, hidden, fill)
