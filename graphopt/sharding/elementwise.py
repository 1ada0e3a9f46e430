"""What elementwise calls and products do to layouts: broadcasting, sums of terms, contractions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.sharding.flow import Flow, Outcome, Rule, tensors
from graphopt.sharding.layout import PARTIAL, REPLICATED, Layout, Own, Partial, Replicated, Split, total
from graphopt.sharding.rules import unknown
from graphopt.torch_private import OpOverload

aten = torch.ops.aten
OURS = (ops.activation.overload, ops.gated_activation.overload)
SUMS = (aten.add.Tensor, aten.sub.Tensor)
PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)


# ---------------------------------------------------------------------------------------------- elementwise


def is_pointwise(target: object) -> bool:
    """Whether an operator works element by element, with broadcasting."""
    if not isinstance(target, OpOverload) or g.is_mutable(target) or g.is_random(target):
        return False
    return target in OURS or target is aten.to.dtype or torch.Tag.pointwise in target.tags


def pointwise(flow: Flow, node: fx.Node) -> Outcome:
    """f(x, y): shared as its operands are; sums of terms and scaled terms are terms."""
    operands = tensors(node)
    haves = [flow.layout(x) for x in operands]
    if any(isinstance(h, Partial) for h in haves):
        if linear_in_terms(node, haves):
            return PARTIAL
        for operand in operands:
            if isinstance(flow.layout(operand), Partial):
                flow.full(node, operand, "")
    leader = next(((x, h) for x, h in zip(operands, haves, strict=True) if isinstance(h, (Split, Own))), None)
    if leader is None:
        return REPLICATED
    x, have = leader
    assert isinstance(have, (Split, Own))
    if isinstance(have, Own) and len(operands) == 1:
        return have
    back = have.dim - g.rank(x)  # counted from the end, as broadcasting does
    for operand in operands:
        dim = g.rank(operand) + back
        if dim < 0 or (g.shape(operand)[dim] == 1 and total(have.segments) != 1):
            flow.full(node, operand, f"{g.op_name(node)} spreads it over a shared dimension")
        else:
            flow.split(node, operand, dim, have.segments, f"{g.op_name(node)} of values shared differently")
    return Split(g.rank(node) + back, have.segments)


def linear_in_terms(node: fx.Node, haves: Sequence[Layout]) -> bool:
    """Whether f(sum of x_r) is the sum of f(x_r)."""
    operands = tensors(node)
    terms = [x for x, have in zip(operands, haves, strict=True) if isinstance(have, Partial)]
    if g.is_call(node, aten.neg.default):
        return True
    if g.is_call(node, *SUMS):
        wholes = [x for x in node.args[:2] if not g.is_tensor(x)]  # Python's sum() begins with 0
        return all(x == 0 for x in wholes) and len(terms) == len(operands)
    if not g.is_call(node, *PRODUCTS) or len(terms) != 1 or node.args[0] is node.args[1]:
        return False
    if any(not isinstance(have, (Partial, Replicated)) for have in haves):
        return False
    return g.is_call(node, aten.mul.Tensor) or node.args[0] is terms[0]


# ------------------------------------------------------------------------------------------------- products


def matmul(flow: Flow, node: fx.Node) -> Outcome:
    """x @ y: shared by batch or heads, by one side's own dimension, or summed over the one in common."""
    x, y = node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(y, fx.Node)
    ranks = g.rank(x), g.rank(y)
    if min(ranks) < 2:
        return unknown(flow, node)
    for operand in (x, y):
        if isinstance(flow.layout(operand), Partial):
            flow.full(node, operand, "")
    haves = [flow.layout(x), flow.layout(y)]
    back = [h.dim - r if isinstance(h, Split) else None for h, r in zip(haves, ranks, strict=True)]
    one, two = haves
    if any(isinstance(h, Own) for h in haves) or back == [None, None]:
        return unknown(flow, node)
    if back == [-1, -2] and isinstance(one, Split):
        flow.split(node, y, ranks[1] - 2, one.segments)
        return PARTIAL if flow.contracts(node, one.segments) else unknown(flow, node)
    if back == [-2, None] or back == [None, -1]:
        have = one if isinstance(one, Split) else two
        assert isinstance(have, Split)
        return Split(g.rank(node) + (have.dim - (ranks[0] if have is one else ranks[1])), have.segments)
    leader = one if isinstance(one, Split) else two
    at = next(b for b in back if b is not None)
    if at >= -2 or any(b not in (None, at) for b in back) or not isinstance(leader, Split):
        return unknown(flow, node)
    for operand, rank in zip((x, y), ranks, strict=True):
        if rank + at < 0 or (g.shape(operand)[rank + at] == 1 and total(leader.segments) != 1):
            flow.full(node, operand, "a product spreads it over a shared dimension")
        else:
            flow.split(node, operand, rank + at, leader.segments)
    return Split(g.rank(node) + at, leader.segments)


PRODUCT_RULES: Mapping[object, Rule] = {aten.matmul.default: matmul, aten.bmm.default: matmul}
