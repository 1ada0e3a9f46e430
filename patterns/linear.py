"""Linears spelled as products, and the flattening around GPT-2's Conv1D (its addmm is a linear already)."""

from __future__ import annotations

from torch import Tensor

from graphopt import ops
from graphopt.rule import Int, T, rule


def flattened_linear(x: Tensor, weight: Tensor, batch: int, length: int) -> Tensor:
    """linear(x [batch * length, k]) as [batch, length, n]: the flattening moves above it, where it cancels"""
    return ops.linear(x, weight, None).reshape(batch, length, weight.shape[0])


def falcon_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T"""
    return x @ weight.t()


RULES = (
    rule(
        falcon_linear,
        lambda x, weight: ops.linear(x, weight, None),
        x=T("... k"),
        weight=T("n k"),
    ),
    rule(
        flattened_linear,
        lambda x, weight, batch, length: ops.linear(x.reshape(batch, length, x.shape[1]), weight, None),
        carry=("bias",),
        x=T("batch*length k"),
        weight=T("n k"),
        batch=Int(3),
        length=Int(5),
    ),
)
