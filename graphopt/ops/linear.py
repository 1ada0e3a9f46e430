"""Linear layers, alone and with what follows them elementwise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.ops.define import op, require_floating, require_rank, require_size, wide
from graphopt.ops.mlp import act, require_kind


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless x [..., in], weight [out, in] and bias [out] fit."""
    require_floating(name, x=x, weight=weight)
    require_rank(name, 2, weight=weight)
    if x.dim() == 0:
        raise ValueError(f"{name}: x has 0 dimensions; it must have at least 1")
    require_size(name, "last size of x", x.shape[-1], weight.shape[1])
    if bias is not None:
        require_rank(name, 1, bias=bias)
        require_size(name, "size of bias", bias.shape[0], weight.shape[0])


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check("linear", x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@op(fake=_linear_fake)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight^T + bias.

    x [..., in], weight [out, in], bias [out] or None -> [..., out], in x's dtype: torch.nn.functional.linear.
    Raises ValueError where the sizes do not fit, RuntimeError where the dtypes do not.
    """
    _check("linear", x, weight, bias)
    return F.linear(x, weight, bias)


def _linear_epilogue_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    y = _linear_fake(x, weight, bias)
    if activation is not None:
        require_kind(activation)
    y = y if gate is None else y * gate
    return y if residual is None else y + residual


@op(fake=_linear_epilogue_fake)
def linear_epilogue(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """act(x @ weight^T + bias) * gate + residual; each part may be None.

    x [..., in], weight [out, in], bias [out]; gate and residual broadcast to [..., out]; activation is a kind
    of `graphopt.ops.activation`. The product is rounded to x's dtype; the rest is computed in fp32 (fp64 for
    fp64) and rounded once to torch's promotion of the product, gate and residual.

    Source: CUTLASS' epilogues; the linear + pointwise fusions of torch.ao and oneDNN.
    Raises ValueError where the sizes do not fit and for an unknown activation.
    """
    _check("linear_epilogue", x, weight, bias)
    y = F.linear(x, weight, bias)
    dtype = y.dtype
    for operand in (gate, residual):
        if operand is not None and operand.dim():  # a tensor without dimensions promotes nothing
            dtype = torch.promote_types(dtype, operand.dtype)
    y = y.to(wide(dtype))
    if activation is not None:
        y = act(y, activation)
    if gate is not None:
        y = y * gate.to(y.dtype)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.to(dtype)
