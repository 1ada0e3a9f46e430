"""Experts on stacked weights: rows times the matrix that each chooses, MLPs of those, the routed sum."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from graphopt import graph as g
from graphopt import ops
from graphopt.rule import Float, Rule, Spec, T, Text, rule
from graphopt.translate import Arguments, Translation

aten = torch.ops.aten


# ------------------------------------------------------------------------------------ products, row by row


def grouped_product(x: str, weight: str) -> Arguments:
    """grouped_mm(x, weight, cumsum(histc(ids, E, 0, E - 1))) -> expert_matmul(x, weight, ids), ids sorted"""

    def arguments(node: fx.Node) -> Mapping[str, object] | str:
        names = g.argument_names(node.target)
        for other in ("bias", "out_dtype"):
            if other in names and g.arg(node, other) is not None:
                return f"{other} is given"
        matrices = g.arg(node, weight)
        assert isinstance(matrices, fx.Node)
        if g.rank(matrices) != 3:
            return f"the weight has {g.rank(matrices)} dimensions, not 3"
        ids = _counted(g.arg(node, "offs"), g.shape(matrices)[0])
        return ids if isinstance(ids, str) else {"x": g.arg(node, x), "weight": matrices, "ids": ids}

    return arguments


def _counted(ends: object, experts: object) -> fx.Node | str:
    """The sorted ids whose groups end at `ends`: cumsum(histc(float(sort(ids)), E, 0, E - 1)); or why not."""
    if not g.is_call(ends, aten.cumsum.default):
        return "the ends of the groups are no cumsum"
    counts = ends.args[0]  # type: ignore[attr-defined]  # a node
    if not g.is_call(counts, aten.histc.default) or not isinstance(experts, int):
        return "the sizes of the groups are no histc over the experts"
    bounds = tuple(g.arg(counts, name) for name in ("bins", "min", "max"))
    if bounds != (experts, 0, experts - 1):
        return f"histc counts {bounds}, not (bins, min, max) = ({experts}, 0, {experts - 1})"
    ids = counts.args[0]
    if g.is_call(ids, aten.to.dtype):
        ids = ids.args[0]
    sorted_values = isinstance(ids, fx.Node) and ids.target is operator.getitem and ids.args[1] == 0
    if not sorted_values or not g.is_call(ids.args[0], aten.sort.default):
        return "the ids that are counted are not sorted"
    if g.arg(ids.args[0], "descending") or g.rank(ids) != 1 or g.dtype(ids) != torch.int64:
        return "the ids that are counted are not one ascending int64 row"
    return ids


def batched_product(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """weight[ids] @ x, weights [E, out, in]"""
    return torch.bmm(weight[ids], x.unsqueeze(-1)).squeeze(-1)


def batched_transposed_product(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """x @ weight[ids], weights [E, in, out]"""
    return torch.bmm(x.unsqueeze(1), weight[ids]).squeeze(1)


def biased_product(x: Tensor, weight: Tensor, ids: Tensor, bias: Tensor) -> Tensor:
    """expert_matmul(x, weight, ids) + bias[ids]"""
    return ops.expert_matmul(x, weight, ids) + bias[ids]


# ------------------------------------------------------------------------------------------- MLPs, row by row


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def plain_expert_rows(
    x: Tensor, ids: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    kind: str,
) -> Tensor:  # fmt: skip
    """down(act(up(x)))"""
    h = ops.activation(ops.expert_matmul(x, up, ids, up_bias), kind)
    return ops.expert_matmul(h, down, ids, down_bias)


def gated_expert_rows(
    x: Tensor, ids: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    kind: str,
) -> Tensor:  # fmt: skip
    """down(act(gate(x)) * up(x)): one product gives gate, then up"""
    gate, up = _halves(ops.expert_matmul(x, up, ids, up_bias))
    return ops.expert_matmul(ops.gated_activation(gate, up, kind), down, ids, down_bias)


def clamped_expert_rows(
    x: Tensor, ids: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    kind: str, limit: float,
) -> Tensor:  # fmt: skip
    """As the gated ones, gate at most `limit` and up between - `limit` and `limit` (DeepSeek V4)"""
    gate, up = _halves(ops.expert_matmul(x, up, ids, up_bias))
    h = ops.gated_activation(gate.clamp(max=limit), up.clamp(-limit, limit), kind)
    return ops.expert_matmul(h, down, ids, down_bias)


def shifted_expert_rows(
    x: Tensor, ids: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    kind: str, limit: float, up_offset: float,
) -> Tensor:  # fmt: skip
    """As the clamped ones, with an offset on up (MiniMax M3)"""
    gate, up = _halves(ops.expert_matmul(x, up, ids, up_bias))
    h = ops.gated_activation(gate.clamp(max=limit), up.clamp(-limit, limit) + up_offset, kind)
    return ops.expert_matmul(h, down, ids, down_bias)


def gpt_oss_expert_rows(
    x: Tensor, ids: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    kind: str, limit: float, up_offset: float,
) -> Tensor:  # fmt: skip
    """As the shifted ones, gate and up in turns"""
    both = ops.expert_matmul(x, up, ids, up_bias)
    gate, up = both[..., ::2], both[..., 1::2]
    h = ops.gated_activation(gate.clamp(max=limit), up.clamp(-limit, limit) + up_offset, kind)
    return ops.expert_matmul(h, down, ids, down_bias)


def inkling_expert_rows(
    x: Tensor, ids: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    gate_softcap: float, up_softcap: float,
) -> Tensor:  # fmt: skip
    """SwiGLU in fp32, silu's linear factor and up each softcapped (Inkling 2)"""
    gate, up = (h.float() for h in _halves(ops.expert_matmul(x, up, ids, up_bias)))
    capped = torch.tanh(gate / gate_softcap) * gate_softcap
    h = capped * torch.sigmoid(gate) * (torch.tanh(up / up_softcap) * up_softcap)
    return ops.expert_matmul(h.to(x.dtype), down, ids, down_bias)


def _softcapped(
    x: Tensor, ids: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    gate_softcap: float, up_softcap: float,
) -> Tensor:  # fmt: skip
    up, down = up.transpose(1, 2), down.transpose(1, 2)
    return ops.experts(
        x, ids.unsqueeze(-1), None, up, down, "silu", True, False, up_bias, down_bias,
        gate_softcap=gate_softcap, up_softcap=up_softcap,
    )  # fmt: skip


def _rows(gated: bool, interleaved: bool = False) -> Callable[..., Tensor]:
    """The replacement: an expert for each row, so that ids have one column."""

    def experts(
        x: Tensor, ids: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
        kind: str, limit: float | None = None, up_offset: float = 0.0,
    ) -> Tensor:  # fmt: skip
        up, down = up.transpose(1, 2), down.transpose(1, 2)
        ids = ids.unsqueeze(-1)
        return ops.experts(
            x, ids, None, up, down, kind, gated, interleaved, up_bias, down_bias, limit, up_offset
        )

    return experts


# --------------------------------------------------------------------------------------------- the routed sum


def batched_routing(
    x: Tensor, ids: Tensor, routing: Tensor, gate_up: Tensor, down: Tensor, gated: bool = True
) -> Tensor:
    """Each row k times, an expert for each copy, the copies weighted and summed"""
    tokens, chosen = ids.shape
    rows = x.repeat_interleave(chosen, 0)
    y = ops.experts(rows, ids.reshape(-1, 1), None, gate_up, down, "silu", gated) * routing.reshape(-1, 1)
    return y.view(tokens, chosen, down.shape[1]).sum(1).to(x.dtype)


def batched_routing_of_plain_experts(
    x: Tensor, ids: Tensor, routing: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """As the batched one, of experts without a gate"""
    return batched_routing(x, ids, routing, gate_up, down, False)


def grouped_routing(
    x: Tensor, ids: Tensor, routing: Tensor, gate_up: Tensor, down: Tensor, gated: bool = True
) -> Tensor:
    """As the batched one, the copies sorted by expert on the way there and put back after"""
    tokens, chosen = ids.shape
    sorted_ids, order = torch.sort(ids.reshape(-1))
    y = ops.experts(x[order // chosen], sorted_ids.unsqueeze(-1), None, gate_up, down, "silu", gated)
    y = y * routing.reshape(-1)[order].unsqueeze(-1)
    return y[torch.argsort(order)].view(tokens, chosen, down.shape[1]).sum(1).to(x.dtype)


def grouped_routing_of_plain_experts(
    x: Tensor, ids: Tensor, routing: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """As the grouped one, of experts without a gate"""
    return grouped_routing(x, ids, routing, gate_up, down, False)


def _routed(gated: bool) -> Callable[..., Tensor]:
    return lambda x, ids, routing, gate_up, down: ops.experts(x, ids, routing, gate_up, down, "silu", gated)


_ROWS: Mapping[str, Spec] = {
    "x": T("s h"),
    "ids": T("s", "int64", below="e"),
    "up_bias": T("e 2*i", optional=True),
    "up": T("e h 2*i"),
    "down": T("e i n"),
    "down_bias": T("e n", optional=True),
    "kind": Text("quick_gelu"),
}
_PLAIN: Mapping[str, Spec] = {**_ROWS, "up": T("e h i"), "up_bias": T("e i", optional=True)}
_LIMIT, _OFFSET = Float(7.0), Float(1.0)
_PRODUCT: Mapping[str, Spec] = {"x": T("s k"), "weight": T("e k n"), "ids": T("s", "int64", below="e")}
_ROUTED: Mapping[str, Spec] = {
    "x": T("t h"),
    "ids": T("t k", "int64", below="e"),
    "routing": T("t k", "W"),
    "gate_up": T("e 2*i h"),
    "down": T("e n i"),
}
_PLAIN_ROUTED: Mapping[str, Spec] = {**_ROUTED, "gate_up": T("e i h")}
_CARRIED = (
    *("kind", "interleaved", "gate_up_bias", "down_bias", "limit", "up_offset"),
    *("gate_softcap", "up_softcap"),
)


RULES: tuple[Rule | Translation, ...] = (
    Translation(
        "torch_grouped_mm", "aten::_grouped_mm", ops.expert_matmul.overload, grouped_product("self", "mat2")
    ),
    Translation(
        "grouped_mm_fallback",
        "transformers::grouped_mm_fallback",
        ops.expert_matmul.overload,
        grouped_product("input", "weight"),
    ),
    rule(
        batched_product,
        lambda x, weight, ids: ops.expert_matmul(x, weight.transpose(1, 2), ids),
        {**_PRODUCT, "weight": T("e n k")},
    ),
    rule(batched_transposed_product, lambda x, weight, ids: ops.expert_matmul(x, weight, ids), _PRODUCT),
    rule(biased_product, ops.expert_matmul, _PRODUCT, bias=T("e n")),
    rule(plain_expert_rows, _rows(False), _PLAIN),
    rule(gated_expert_rows, _rows(True), _ROWS),
    rule(clamped_expert_rows, _rows(True), _ROWS, limit=_LIMIT),
    rule(shifted_expert_rows, _rows(True), _ROWS, limit=_LIMIT, up_offset=_OFFSET),
    rule(gpt_oss_expert_rows, _rows(True, interleaved=True), _ROWS, limit=_LIMIT, up_offset=_OFFSET),
    rule(
        inkling_expert_rows,
        _softcapped,
        {name: spec for name, spec in _ROWS.items() if name != "kind"},
        gate_softcap=Float(4.0),
        up_softcap=Float(25.0),
    ),
    *(
        rule(routing, _routed(True), _ROUTED, carry=_CARRIED)
        for routing in (batched_routing, grouped_routing)
    ),
    *(
        rule(routing, _routed(False), _PLAIN_ROUTED, carry=_CARRIED)
        for routing in (batched_routing_of_plain_experts, grouped_routing_of_plain_experts)
    ),
)
