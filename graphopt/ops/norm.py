"""Normalisations over the last dimension, alone and after a residual add."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ops.define import op, require_floating, require_size, wide


def _check(name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> None:
    """Raise ValueError unless x has a last dimension and weight and bias are vectors of its size."""
    require_floating(name, x=x)
    if x.dim() == 0:
        raise ValueError(f"{name}: x has 0 dimensions; it must have at least 1")
    for which, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dim() != 1:
            raise ValueError(f"{name}: {which} has {tensor.dim()} dimensions; it must have 1")
        require_size(name, f"size of {which}", tensor.shape[0], x.shape[-1])


def _rms_norm_fake(x: Tensor, weight: Tensor | None, cast_before_scale: bool) -> Tensor:
    _check("rms_norm", x, weight)
    return weight * x if weight is not None and cast_before_scale else torch.empty_like(x)


@op(fake=_rms_norm_fake)
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float = 0.0, cast_before_scale: bool = True
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight_offset + weight), over the last dimension.

    x [..., D]; weight [D] or None (then `weight_offset` is not read). The mean is in fp32 (fp64 for fp64).
    `cast_before_scale` (Llama, T5): the normalised row is rounded to x's dtype, then scaled under torch's
    promotion, so that an fp32 weight gives an fp32 result. Without it (Gemma, with weight_offset=1) scaling
    is in fp32 and the result has x's dtype.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization"; LlamaRMSNorm and GemmaRMSNorm in
    transformers; torch.nn.functional.rms_norm.
    Raises ValueError where x is not floating or weight is no vector of D elements.
    """
    _check("rms_norm", x, weight)
    h = x.to(wide(x.dtype))
    h = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + eps)
    if weight is None:
        return h.to(x.dtype)
    if cast_before_scale:
        return _shifted(weight, weight_offset) * h.to(x.dtype)
    return (h * _shifted(weight.to(h.dtype), weight_offset)).to(x.dtype)


def _shifted(weight: Tensor, offset: float) -> Tensor:
    """offset + weight; the weight itself where the offset is literally zero (a SymFloat is never asked)."""
    return weight if isinstance(offset, (int, float)) and offset == 0 else offset + weight


def _add_rms_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, cast_before_scale: bool
) -> tuple[Tensor, Tensor]:
    _check("add_rms_norm", x, None)
    total = x + residual
    return _rms_norm_fake(total, weight, cast_before_scale), total


@op(fake=_add_rms_norm_fake)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_scale: bool = True,
) -> tuple[Tensor, Tensor]:
    """s = x + residual  ->  (rms_norm(s, weight, eps, ...), s).

    x and residual broadcast to [..., D] under torch's promotion; the sum is rounded before it is normalised,
    as in eager. Source: fused_add_rms_norm in vLLM. Raises what `rms_norm` raises.
    """
    _check("add_rms_norm", x, None)
    total = x + residual
    return rms_norm.reference(total, weight, eps, weight_offset, cast_before_scale), total


def _layer_norm_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    _check("layer_norm", x, weight, bias)
    return torch.empty_like(x)


@op(fake=_layer_norm_fake)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension; var is biased.

    x [..., D]; weight and bias [D] or None. Computed in fp32 (fp64 for fp64), returned in x's dtype.
    Written out because `aten.layer_norm` declares eps as float, which burns a symbolic eps in.

    Source: Ba, Kiros & Hinton 2016, "Layer Normalization"; torch.nn.functional.layer_norm.
    Raises ValueError where x is not floating or weight or bias is no vector of D elements.
    """
    _check("layer_norm", x, weight, bias)
    h = x.to(wide(x.dtype))
    h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + eps)
    if weight is not None:
        h = h * weight.to(h.dtype)
    if bias is not None:
        h = h + bias.to(h.dtype)
    return h.to(x.dtype)


def _add_layer_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check("add_layer_norm", x, None)
    total = x + residual
    return _layer_norm_fake(total, weight, bias), total


@op(fake=_add_layer_norm_fake)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """s = x + residual  ->  (layer_norm(s, weight, bias, eps), s).

    x and residual broadcast to [..., D] under torch's promotion.

    Source: SkipLayerNormalization in ONNX Runtime. Raises what `layer_norm` raises.
    """
    _check("add_layer_norm", x, None)
    total = x + residual
    return layer_norm.reference(total, weight, bias, eps), total
