"""Scores that became no attention go back to what they were: attention_scores -> matmul, mul, tanh, add."""

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


def dissolve_scores(gm: fx.GraphModule, observers: Sequence[Observer]) -> int:
    """attention_scores(q, k, scale, bias, softcap) -> softcap(q @ k^T * scale) + bias, in ATen; how many.

    The op is half of something: no kernel has it, and left in the graph it would count as recognised. Each
    is reported with what reads it, which is what no rule could swallow. The caller recompiles the module.
    """
    left = [n for n in gm.graph.nodes if g.is_call(n, ops.attention_scores.overload)]
    for node in left:
        readers = ", ".join(f"{g.op_name(u)} ({u.name})" for u in node.users) or "nobody"
        reason = f"no attention: the scores are read by {readers}"
        emit(observers, Refused(Refusal(RULE, node.name, g.module_path(node), g.source(node), reason, 1)))
        node.replace_all_uses_with(_spelled(node))
        gm.graph.erase_node(node)
    return len(left)


def _spelled(node: fx.Node) -> fx.Node:
    """The scores as the program had them, step by step in the dtype of q."""
    q, k, scale, bias, softcap, lowest = (g.arg(node, n) for n in g.argument_names(node.target))
    assert isinstance(q, fx.Node)

    def call(target: OpOverload, *args: object, **kwargs: object) -> fx.Node:
        new = node.graph.create_node("call_function", target, args, kwargs, name=g.base_name(target))  # type: ignore[arg-type]  # nodes and literals
        g.copy_provenance(new, node)
        if (origin := g.origin(node)) is not None:
            new.meta["origin"] = origin
        g.set_val(new, fake_result(new))
        return new

    with node.graph.inserting_before(node):
        scores = call(aten.matmul.default, q, call(aten.permute.default, k, [0, 1, 3, 2]))
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
