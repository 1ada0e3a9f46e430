"""Weights in fewer bits: how they are packed, and the linear that reads them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.ops.define import op, require_floating, require_rank, require_size, wide
from graphopt.torch_private import FakeTensor

INT8_MAX = 127
TILE = 1 << 18  # elements that are packed at a time: what is computed on the way takes 1 MB, not the weight


def group_of(name: str, k: int, groups: int) -> int:
    """How many columns share a scale: K / groups, 1 where there are none. Raises ValueError for the rest."""
    if isinstance(k, int) and isinstance(groups, int) and (k % groups if groups else k):
        raise ValueError(f"{name}: {groups} groups do not divide K {k}")
    return k // groups if not isinstance(groups, int) or groups else 1


def _check_scaled(weight: Tensor, group: int) -> None:
    """Raise ValueError unless the weight is [N, K], floating, and the group divides K."""
    require_floating("scales_int8", weight=weight)
    require_rank("scales_int8", 2, weight=weight)
    if group < 1 or (isinstance(weight.shape[1], int) and weight.shape[1] % group):
        raise ValueError(f"scales_int8: group {group} does not divide K {weight.shape[1]}")


def _scales_int8_fake(weight: Tensor, group: int) -> Tensor:
    _check_scaled(weight, group)
    return weight.new_empty((weight.shape[0], weight.shape[1] // group))


@op(fake=_scales_int8_fake)
def scales_int8(weight: Tensor, group: int) -> Tensor:
    """max |weight| / 127 over each group along K: [N, K] -> [N, K / group], in the weight's dtype.

    A group of zeros has scale 0. In fp16, scales below its normal numbers are rounded up: they have few bits,
    and a scale that is too small would clip the largest weights.
    Source: symmetric group-wise quantization, Dettmers et al. 2022, section 2.
    Raises ValueError unless the group divides K and all values are finite.
    """
    _check_scaled(weight, group)
    n, k = weight.shape
    h = weight.reshape(n, k // group, group)
    largest = torch.maximum(h.amax(-1), -h.amin(-1))  # not of h.abs(): that is a second weight
    _require_finite(largest)
    scale = largest.to(wide(weight.dtype)) / INT8_MAX
    if weight.dtype == torch.float16:
        limits = torch.finfo(torch.float16)
        step = limits.tiny * limits.eps  # between the numbers below `tiny`
        scale = torch.where(scale < limits.tiny, (scale / step).ceil() * step, scale)
    return scale.to(weight.dtype)


def _require_finite(largest: Tensor) -> None:
    """Raise ValueError where a row has NaN or infinity; tensors without data pass."""
    if isinstance(largest, FakeTensor) or largest.is_meta:
        return
    bad = ~torch.isfinite(largest)
    if bad.any():
        row = int(bad.any(-1).nonzero()[0])
        raise ValueError(f"scales_int8: row {row} of the weight has NaN or infinity; they have no int8 form")


def _check_packed(name: str, weight: Tensor, scales: Tensor) -> int:
    """The group. Raises ValueError where weight or packed weight [N, K] and scales [N, groups] do not fit."""
    require_rank(name, 2, weight=weight, scales=scales)
    require_floating(name, scales=scales)
    require_size(name, "rows of scales", scales.shape[0], weight.shape[0])
    return group_of(name, weight.shape[1], scales.shape[1])


def _pack_int8_fake(weight: Tensor, scales: Tensor) -> Tensor:
    _check_packed("pack_int8", weight, scales)
    return weight.new_empty(weight.shape, dtype=torch.int8)


@op(fake=_pack_int8_fake)
def pack_int8(weight: Tensor, scales: Tensor) -> Tensor:
    """round(weight / scale) as int8, -127 .. 127: weight [N, K], scales [N, K / group] -> [N, K].

    The division is by the scale as it is kept, so that its own rounding adds no error. Where the scale is
    0, so is the result. Raises ValueError where sizes do not fit.
    """
    group = _check_packed("pack_int8", weight, scales)
    n, k = weight.shape
    if not (isinstance(n, int) and isinstance(k, int)) or n * k <= TILE:
        return _packed(weight, scales, group)
    rows = max(1, TILE // k)
    packed = weight.new_empty((n, k), dtype=torch.int8)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        packed[part] = _packed(weight[part], scales[part], group)
    return packed


def _packed(weight: Tensor, scales: Tensor, group: int) -> Tensor:
    """The packed weight, with temporaries of the weight's size in fp32."""
    dtype = wide(weight.dtype)
    step = scales.to(dtype).unsqueeze(-1)
    h = weight.to(dtype).reshape(*scales.shape, group) / torch.where(step == 0, 1.0, step)
    h = h.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8).reshape(weight.shape)
    return h.contiguous()  # a transposed weight is packed row by row too


def dequantized(packed: Tensor, scales: Tensor) -> Tensor:
    """packed * scale in fp32 (fp64 for fp64 scales): the weight a quantized linear stands for, [N, K]."""
    group = _check_packed("dequantized", packed, scales)
    dtype = wide(scales.dtype)
    h = packed.to(dtype).reshape(*scales.shape, group) * scales.to(dtype).unsqueeze(-1)
    return h.reshape(packed.shape)


def _check_linear(name: str, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for what does not fit together."""
    require_floating(name, x=x)
    if x.dim() == 0:
        raise ValueError(f"{name}: x has 0 dimensions; it must have at least 1")
    _check_packed(name, packed, scales)
    if packed.dtype != torch.int8:
        raise ValueError(f"{name}: packed is {packed.dtype}; it must be int8")
    require_size(name, "last size of x", x.shape[-1], packed.shape[1])
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
