"""Norms as people write them: RMSNorm (Zhang & Sennrich 2019), LayerNorm (Ba et al. 2016), and residuals."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt import ops
from graphopt.rule import Float, T, rule


def llama_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x_fp32 * rsqrt(mean(x_fp32^2) + eps)).to(x.dtype)"""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def t5_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As Llama's, but x itself is multiplied, so the product is promoted and not the factor."""
    h = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def gemma_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """(x_fp32 * rsqrt(...) * (offset + weight_fp32)).to(x.dtype): scaled before the cast, by 1 + w."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (weight.float() + offset)).to(x.dtype)


def fp32_scaled_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(weight_fp32 * x_fp32 * rsqrt(...)).to(x.dtype): scaled before the cast, without an offset."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * weight.float()).to(x.dtype)


def bare_rms_norm(x: Tensor, eps: float) -> Tensor:
    """Without a weight."""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def unit_norm(x: Tensor, eps: float) -> Tensor:
    """(x_fp32 * rsqrt(sum(x_fp32^2) + eps)).to(x.dtype): rows of length 1 (nGPT, Dory)"""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + eps)).to(x.dtype)


def divided_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """weight * (x_fp32 / sqrt(mean(x_fp32^2) + eps)).to(x.dtype), or without a weight."""
    h = x.float()
    h = (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return h if weight is None else weight * h


def half_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) in half precision all the way (ImageGPT), or without a weight."""
    h = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return h if weight is None else weight * h


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x * weight + bias, each where there is one."""
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def hand_layer_norm_var(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, with torch's biased variance."""
    centred = x - x.mean(-1, keepdim=True)
    return _affine(centred / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps), weight, bias)


def hand_layer_norm_var_rsqrt(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) * rsqrt(var + eps) * weight + bias"""
    centred = x - x.mean(-1, keepdim=True)
    return _affine(centred * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + eps), weight, bias)


def hand_layer_norm_pow(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias"""
    centred = x - x.mean(-1, keepdim=True)
    return _affine(centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps), weight, bias)


def hand_layer_norm_rsqrt(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) * rsqrt(mean((x - mean)^2) + eps) * weight + bias"""
    centred = x - x.mean(-1, keepdim=True)
    return _affine(centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps), weight, bias)


def cohere_layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(weight_fp32 * layer_norm(x_fp32)).to(x.dtype)"""
    h = x.float()
    return (weight.float() * hand_layer_norm_rsqrt(h, None, None, eps)).to(x.dtype)


def residual_rms_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """s = x + residual; rms_norm(s), s"""
    total = x + residual
    return ops.rms_norm(total, None, 1e-6), total


def residual_layer_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """s = x + residual; layer_norm(s), s"""
    total = x + residual
    return ops.layer_norm(total, None, None, 1e-6), total


def _unit_norm(x: Tensor, eps: float) -> Tensor:
    """The mean is the sum over n: with eps / n, what has a root mean square of 1 has the length sqrt(n)."""
    n = x.shape[-1]
    weight = torch.rsqrt(
        torch.full((n,), n, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    )
    return ops.rms_norm(x, weight, eps / n, 0.0, False)


RMS = ("weight", "eps", "weight_offset", "cast_before_scale")
LAYER = ("weight", "bias", "eps")
_EPS = Float(1e-5)

_HAND_LAYER_NORMS = (
    hand_layer_norm_var,
    hand_layer_norm_var_rsqrt,
    hand_layer_norm_pow,
    hand_layer_norm_rsqrt,
)

RULES = (
    # Before the RMS norms: a layer norm is an RMS norm of the centred row.
    rule(
        cohere_layer_norm,
        lambda x, weight, eps: ops.layer_norm(x, weight, None, eps),
        x=T("... n"),
        weight=T("n", "W"),
        eps=_EPS,
    ),
    *(
        rule(
            hand_written,
            lambda x, weight, bias, eps: ops.layer_norm(x, weight, bias, eps),
            x=T("... n"),
            weight=T("n", optional=True),
            bias=T("n", optional=True),
            eps=_EPS,
        )
        for hand_written in _HAND_LAYER_NORMS
    ),
    rule(
        divided_rms_norm,
        lambda x, weight, eps: ops.rms_norm(x, weight, eps, 0.0, True),
        x=T("... n"),
        weight=T("n", "W", optional=True),
        eps=_EPS,
    ),
    *(
        rule(
            half_rms_norm,
            lambda x, weight, eps: ops.rms_norm(x, weight, eps, 0.0, True),
            x=T("... n", half),
            weight=T("n", half, optional=True),
            eps=_EPS,
        )
        for half in ("bfloat16", "float16")
    ),
    rule(
        llama_rms_norm,
        lambda x, weight, eps: ops.rms_norm(x, weight, eps, 0.0, True),
        x=T("... n"),
        weight=T("n", "W"),
        eps=_EPS,
    ),
    rule(
        t5_rms_norm,
        lambda x, weight, eps: ops.rms_norm(x, weight, eps, 0.0, True),
        x=T("... n"),
        weight=T("n", "W"),
        eps=_EPS,
    ),
    rule(
        gemma_rms_norm,
        lambda x, weight, eps, offset: ops.rms_norm(x, weight, eps, offset, False),
        x=T("... n"),
        weight=T("n", "W"),
        eps=_EPS,
        offset=Float(1.0),
    ),
    rule(
        fp32_scaled_rms_norm,
        lambda x, weight, eps: ops.rms_norm(x, weight, eps, 0.0, False),
        x=T("... n"),
        weight=T("n", "W"),
        eps=_EPS,
    ),
    rule(unit_norm, _unit_norm, x=T("... n"), eps=_EPS),
    rule(bare_rms_norm, lambda x, eps: ops.rms_norm(x, None, eps), x=T("... n"), eps=_EPS),
    rule(
        residual_rms_norm,
        lambda x, residual: ops.add_rms_norm(x, residual, None, 1e-6),
        carry=RMS,
        x=T("... n"),
        residual=T("...|1 n"),
    ),
    rule(
        residual_layer_norm,
        lambda x, residual: ops.add_layer_norm(x, residual, None, None, 1e-6),
        carry=LAYER,
        x=T("... n"),
        residual=T("...|1 n"),
    ),
)
