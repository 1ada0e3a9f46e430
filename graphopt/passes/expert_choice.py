"""Which experts have a share in a row: routing weights that are put into nothing at the places of a choice.

    f(scatter(fill, -1, ids, w))     is f(w) at ids, and 0 elsewhere if f(fill) is

Pure: graphs are read, never edited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.passes.expert_lists import fill_of
from graphopt.passes.expert_terms import chosen_once, same_lead

aten = torch.ops.aten
# What a share that is nowhere else may go through, elementwise or along the experts: what a fill becomes.
KEEPS: dict[object, Callable[[float], float | None]] = {
    aten.to.dtype: lambda fill: fill,
    aten.sigmoid.default: lambda fill: 0.0 if fill == -math.inf else None,
    aten.softmax.int: lambda fill: 0.0 if fill == -math.inf else None,
    aten.mul.Tensor: lambda fill: 0.0 if fill == 0 else None,
    aten.div.Tensor: lambda fill: 0.0 if fill == 0 else None,
}


def path_of(routing: fx.Node) -> list[fx.Node] | None:
    """The scatter that routing weights come from, and what they go through after; None if they do not."""
    if g.is_call(routing, aten.scatter.src):
        return [routing]
    if not g.is_call(routing, *KEEPS):
        return None
    read = routing.args[:2] if g.is_call(routing, aten.mul.Tensor) else routing.args[:1]
    paths = (path_of(a) for a in read if isinstance(a, fx.Node) and g.is_tensor(a))
    path = next((p for p in paths if p is not None), None)
    return None if path is None else [*path, routing]


def nowhere(path: Sequence[fx.Node]) -> str | None:
    """Why a row might have a share in experts that are not among its ids, or twice in one."""
    scatter, *steps = path
    base, dim, ids, source = (scatter.args[i] for i in range(4))
    assert isinstance(base, fx.Node) and isinstance(ids, fx.Node) and isinstance(source, fx.Node)
    fill = fill_of(base)
    if fill is None:
        return f"{base.name}, into which shares are put, is not filled with one value"
    if dim not in (-1, g.rank(scatter) - 1) or not g.same_shape(g.shape(ids), g.shape(source)):
        return f"{scatter.name} puts shares elsewhere than in a row's experts"
    if not same_lead(ids, scatter) or not chosen_once(ids):
        return "nothing says that a row chooses an expert once only"
    inner = scatter
    for step in steps:
        if not same_lead(step, inner) or not g.same_size(g.shape(step)[-1], g.shape(inner)[-1]):
            return f"{step.name} has another shape than the routing weights"
        if g.is_call(step, aten.softmax.int) and step.args[1] not in (-1, g.rank(step) - 1):
            return f"{step.name} is not along the experts"
        other = next((a for a in step.args[:2] if isinstance(a, fx.Node) and a is not inner), None)
        if other is not None and g.rank(other) and not _fits(other, step):
            return f"{other.name} is no number, column or number for each expert"
        kept = KEEPS[step.target](fill)
        if kept is None:
            return f"{fill} does not stay nothing in {g.op_name(step)}"
        fill, inner = kept, step
    return None if fill == 0 else f"where there is no share stands {fill}"


def _fits(other: fx.Node, step: fx.Node) -> bool:
    """Whether an operand is [..., 1], or as large as the routing weights."""
    column = g.rank(other) == g.rank(step) and g.shape(other)[-1] == 1 and same_lead(other, step)
    return column or g.same_shape(g.shape(other), g.shape(step))


def silent(node: fx.Node) -> str | None:
    """Why an expert that is given no share might still add something: only f(0) is 0 on the input's side."""
    if not g.arg(node, "scale_input"):
        return None
    for bias in ("gate_up_bias", "down_bias"):
        if g.arg(node, bias) is not None:
            return f"{bias} is added to what is scaled to nothing"
    kind, offset = str(g.arg(node, "kind")), g.arg(node, "up_offset")
    if g.arg(node, "gated"):
        return None if offset == 0 else f"{offset} is added to up, which is scaled to nothing"
    zero = float(ops.activation.reference(torch.zeros(1, device="cpu"), kind))
    return None if zero == 0 else f"{kind} makes {zero} of nothing"
