"""Weights in fewer bits: how they are packed, and the linear that reads them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.ops.define import op, require_floating, require_rank, require_size, wide

INT8_MAX = 127


def _check_groups(name: str, weight: Tensor, group: int) -> None:
    """Raise ValueError unless the weight is [N, K] and the group divides K."""
    require_rank(name, 2, weight=weight)
    if group < 1 or (isinstance(weight.shape[1], int) and weight.shape[1] % group):
        raise ValueError(f"{name}: group {group} does not divide K {weight.shape[1]}")


def _scales_int8_fake(weight: Tensor, group: int) -> Tensor:
    require_floating("scales_int8", weight=weight)
    _check_groups("scales_int8", weight, group)
    return weight.new_empty((weight.shape[0], weight.shape[1] // group))


@op(fake=_scales_int8_fake)
def scales_int8(weight: Tensor, group: int) -> Tensor:
    """max |weight| / 127 over each group along K: [N, K] -> [N, K / group], in the weight's dtype.

    A group of zeros has scale 0. Source: symmetric group-wise quantization, Dettmers et al. 2022, section 2.
    Raises ValueError unless the group divides K.
    """
    require_floating("scales_int8", weight=weight)
    _check_groups("scales_int8", weight, group)
    n, k = weight.shape
    h = weight.reshape(n, k // group, group).abs().amax(-1)
    return (h.to(wide(weight.dtype)) / INT8_MAX).to(weight.dtype)


def _pack_int8_fake(weight: Tensor, scales: Tensor) -> Tensor:
    require_rank("pack_int8", 2, weight=weight, scales=scales)
    require_size("pack_int8", "rows of scales", scales.shape[0], weight.shape[0])
    return weight.new_empty(weight.shape, dtype=torch.int8)


@op(fake=_pack_int8_fake)
def pack_int8(weight: Tensor, scales: Tensor) -> Tensor:
    """round(weight / scale) as int8, -127 .. 127: weight [N, K], scales [N, K / group] -> [N, K].

    The division is by the scale as it is kept, so that its own rounding adds no error. Where the scale is
    0, so is the result. Raises ValueError where sizes do not fit.
    """
    require_rank("pack_int8", 2, weight=weight, scales=scales)
    require_size("pack_int8", "rows of scales", scales.shape[0], weight.shape[0])
    _check_groups("pack_int8", weight, weight.shape[1] // scales.shape[1])
    dtype = wide(weight.dtype)
    step = scales.to(dtype).unsqueeze(-1)
    h = weight.to(dtype).reshape(*scales.shape, -1) / torch.where(step == 0, 1.0, step)
    return h.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8).reshape(weight.shape)


def dequantized(packed: Tensor, scales: Tensor) -> Tensor:
    """packed * scale in fp32 (fp64 for fp64 scales): the weight a quantized linear stands for, [N, K]."""
    dtype = wide(scales.dtype)
    h = packed.to(dtype).reshape(*scales.shape, -1) * scales.to(dtype).unsqueeze(-1)
    return h.reshape(packed.shape)


def _check_linear(name: str, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for what does not fit together."""
    require_floating(name, x=x, scales=scales)
    require_rank(name, 2, packed=packed, scales=scales)
    if packed.dtype != torch.int8:
        raise ValueError(f"{name}: packed is {packed.dtype}; it must be int8")
    require_size(name, "last size of x", x.shape[-1], packed.shape[1])
    require_size(name, "rows of scales", scales.shape[0], packed.shape[0])
    _check_groups(name, packed, packed.shape[1] // scales.shape[1])
    if bias is not None:
        require_rank(name, 1, bias=bias)
        require_size(name, "size of bias", bias.shape[0], packed.shape[0])


def _linear_int8_fake(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    _check_linear("linear_int8", x, packed, scales, bias)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@op(fake=_linear_int8_fake)
def linear_int8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x @ (packed * scales)^T + bias, weight-only: activations stay as they are.

    x [..., K], packed int8 [N, K], scales [N, K / group], bias [N] or None -> [..., N], in x's dtype;
    computed in fp32 (fp64 for fp64) and rounded once.

    Source: weight-only int8 of gpt-fast and torchao, with groups along K as in GPTQ.
    Raises ValueError where sizes or dtypes do not fit.
    """
    _check_linear("linear_int8", x, packed, scales, bias)
    dtype = torch.promote_types(wide(x.dtype), wide(scales.dtype))
    y = F.linear(x.to(dtype), dequantized(packed, scales).to(dtype))
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)
