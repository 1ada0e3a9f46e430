"""Experts that all rows go through: batched products of stacked weights, scaled on one side of the MLPs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphopt import ops
from graphopt.rule import Rule, Spec, T, Text, rule


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _stacked(rows: Tensor, tokens: int, gate_up: Tensor, down: Tensor, kind: str) -> Tensor:
    """The sum over experts of their MLPs, rows [e * t, h]: `tokens` for each"""
    gate, up = _halves(torch.bmm(rows.view(*gate_up.shape[:1], tokens, *gate_up.shape[1:2]), gate_up))
    return torch.bmm(ops.gated_activation(gate, up, kind), down).sum(0)


def llama4_experts(x: Tensor, routing: Tensor, gate_up: Tensor, down: Tensor, kind: str) -> Tensor:
    """A copy of all rows for each expert, scaled before the MLP"""
    scaled = x.repeat(gate_up.shape[0], 1) * routing.transpose(0, 1).reshape(-1, 1)
    return _stacked(scaled, x.shape[0], gate_up, down, kind)


def llama4_experts_of_one_row(x: Tensor, routing: Tensor, gate_up: Tensor, down: Tensor, kind: str) -> Tensor:
    """As above where there is one row: the scores of its experts stand in a column already"""
    return _stacked(x.repeat(gate_up.shape[0], 1) * routing.transpose(0, 1), 1, gate_up, down, kind)


def inkling_shared_expert(
    x: Tensor, routing: Tensor, gate: Tensor, up: Tensor, down: Tensor, kind: str
) -> Tensor:
    """One expert, scaled between the two products"""
    h = ops.gated_activation(torch.bmm(x, gate.mT), torch.bmm(x, up.mT), kind)
    return torch.bmm(h * routing.transpose(0, 1), down.mT).float().sum(0).to(x.dtype)


def inkling_shared_experts(
    x: Tensor, routing: Tensor, gate: Tensor, up: Tensor, down: Tensor, kind: str
) -> Tensor:
    """All experts on the same rows, scaled between the two products, summed in fp32"""
    return inkling_shared_expert(x.expand(gate.shape[0], -1, -1), routing, gate, up, down, kind)


def _scaled_before(x: Tensor, routing: Tensor, gate_up: Tensor, down: Tensor, kind: str) -> Tensor:
    return ops.experts(x, None, routing, gate_up.mT, down.mT, kind, scale_input=True)


def _scaled_between(x: Tensor, routing: Tensor, gate: Tensor, up: Tensor, down: Tensor, kind: str) -> Tensor:
    return ops.experts(x.squeeze(0), None, routing.squeeze(-1), torch.cat((gate, up), 1), down, kind)


_MIXED: Mapping[str, Spec] = {
    "x": T("t h"),
    "routing": T("t e"),
    "down": T("e n i"),
    "kind": Text("quick_gelu"),
}
_TRANSPOSED: Mapping[str, Spec] = {**_MIXED, "gate_up": T("e h 2*i"), "down": T("e i n")}
_SHARED: Mapping[str, Spec] = {**_MIXED, "x": T("1 t h"), "routing": T("t e 1")}

RULES: tuple[Rule, ...] = (
    rule(llama4_experts, _scaled_before, _TRANSPOSED),
    rule(llama4_experts_of_one_row, _scaled_before, {**_TRANSPOSED, "x": T("1 h"), "routing": T("1 e")}),
    rule(inkling_shared_experts, _scaled_between, _SHARED, gate=T("e i h"), up=T("e i h")),
    rule(
        inkling_shared_expert,
        _scaled_between,
        {**_SHARED, "routing": T("t 1 1"), "down": T("1 n i")},
        gate=T("1 i h"),
        up=T("1 i h"),
    ),
)
