"""What one kernel does of a layer: a linear with all around it, and the writes of a token's key and value.

Made by `Fuse` for targets whose cost is the launch; defined by the vocabulary's own references.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.ops.cache import INDEX_DTYPES
from graphopt.ops.define import op, require_rank, require_size, wide
from graphopt.ops.mlp import act, require_kind
from graphopt.ops.norm import layer_norm, rms_norm
from graphopt.ops.quantized import linear_int8
from graphopt.ops.rope import rope

NORMS = ("rms", "layer")


def _normed(
    x: Tensor,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_scale: bool,
) -> Tensor:
    """The input of the product."""
    if norm is None:
        return x
    if norm == "rms":
        return rms_norm.reference(x, weight, eps, weight_offset, cast_before_scale)
    if norm == "layer":
        return layer_norm.reference(x, weight, bias, eps)
    raise ValueError(f"fused_linear: norm {norm!r} is not one of {', '.join(NORMS)}")


def _check(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    gated: bool,
    activation: str | None,
) -> int:
    """The number of output features. Raises ValueError for what does not fit together."""
    require_rank("fused_linear", 2, weight=weight)
    require_size("fused_linear", "last size of x", x.shape[-1], weight.shape[1])
    if bias is not None:
        require_rank("fused_linear", 1, bias=bias)
        require_size("fused_linear", "size of bias", bias.shape[0], weight.shape[0])
    if scales is not None:
        require_rank("fused_linear", 2, scales=scales)
        require_size("fused_linear", "rows of scales", scales.shape[0], weight.shape[0])
    if activation is not None:
        require_kind(activation)
    if not gated:
        return weight.shape[0]
    if activation is None:
        raise ValueError("fused_linear: gated without an activation")
    if isinstance(weight.shape[0], int) and weight.shape[0] % 2:
        raise ValueError(f"fused_linear: gated with {weight.shape[0]} rows; it takes gate and up, one length")
    return weight.shape[0] // 2


def _fused_linear_fake(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    norm: str | None,
    norm_weight: Tensor | None,
    cast_before_scale: bool,
    activation: str | None,
    gated: bool,
    residual: Tensor | None,
) -> Tensor:
    features = _check(x, weight, scales, bias, gated, activation)
    if norm not in (None, *NORMS):
        raise ValueError(f"fused_linear: norm {norm!r} is not one of {', '.join(NORMS)}")
    dtype = x.dtype
    if norm == "rms" and norm_weight is not None and cast_before_scale:
        dtype = torch.promote_types(dtype, norm_weight.dtype)
    y = x.new_empty((*x.shape[:-1], features), dtype=dtype)
    return y if residual is None else y + residual


@op(fake=_fused_linear_fake)
def fused_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_scale: bool,
    activation: str | None,
    gated: bool,
    residual: Tensor | None,
) -> Tensor:
    """act(norm(x) @ weight^T + bias) + residual; each part may be None.

    x [..., K]; weight [N, K] in x's dtype, or int8 with scales [N, K / group] (`linear_int8`); bias [N].
    norm: None, "rms" or "layer" over K, with what `rms_norm` or `layer_norm` take (for the other, and for
    None, these are None, 0.0 and True). With `gated` the weight's first N / 2 rows are the gate, the others
    up: act(gate) * up, [..., N / 2]. residual broadcasts to the result [..., N or N / 2].
    norm(x) and the product are rounded to x's dtype; what follows is computed in fp32 (fp64 for fp64) and
    rounded once to torch's promotion with residual.

    Source: CUTLASS' epilogues; the prologue: KERNELS for decoding, as in gpt-fast and megakernels.
    Raises ValueError where sizes do not fit, for an unknown norm or activation, and gated without one.
    """
    features = _check(x, weight, scales, bias, gated, activation)
    h = _normed(x, norm, norm_weight, norm_bias, eps, weight_offset, cast_before_scale)
    y = F.linear(h, weight, bias) if scales is None else linear_int8.reference(h, weight, scales, bias)
    rounded = y.dtype
    y = y.to(wide(rounded))
    if activation is not None and gated:
        y = act(y[..., :features], activation) * y[..., features:]
    elif activation is not None:
        y = act(y, activation)
    if residual is None:
        return y.to(rounded)
    dtype = torch.promote_types(rounded, residual.dtype) if residual.dim() else rounded
    return (y + residual.to(y.dtype)).to(dtype)


def _rms_norm_residual_fake(
    x: Tensor, weight: Tensor | None, cast_before_scale: bool, residual: Tensor
) -> Tensor:
    promotes = weight is not None and cast_before_scale
    return (x if weight is None or not promotes else x * weight) + residual


@op(fake=_rms_norm_residual_fake)
def rms_norm_residual(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_scale: bool,
    residual: Tensor,
) -> Tensor:
    """rms_norm(x, weight, eps, ...) + residual: a norm behind a block, as Gemma 2's.

    x and residual [..., D] of one shape. The normalised row is rounded to x's dtype before the sum, as in
    eager. Raises what `rms_norm` raises.
    """
    return rms_norm.reference(x, weight, eps, weight_offset, cast_before_scale) + residual


def _check_write(
    name: str,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor | None,
    start: Tensor | None,
) -> None:
    """Raise ValueError for what does not fit together."""
    require_rank(name, 4, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    for which, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        for dim, what in ((0, "batch"), (1, "number of heads"), (3, "head_dim")):
            require_size(name, f"{what} of {which}", new.shape[dim], cache.shape[dim])
        if new.dtype != cache.dtype:
            raise ValueError(f"{name}: {which} is {new.dtype}; it must be {cache.dtype}, as its cache")
    if (position is None) == (start is None):
        raise ValueError(f"{name}: give one of position and start")
    for which, index in (("position", position), ("start", start)):
        if index is not None and index.dtype not in INDEX_DTYPES:
            raise ValueError(f"{name}: {which} is {index.dtype}; it must be int64 or int32")
    if position is not None:
        require_rank(name, 1, position=position)
        require_size(name, "size of position", position.shape[0], k.shape[2])
    if start is not None:
        require_size(name, "number of elements of start", start.numel(), 1)


def _rows(k: Tensor, position: Tensor | None, start: Tensor | None) -> Tensor:
    """The cache rows of the new tokens, [S]."""
    if position is not None:
        return position.long()
    assert start is not None
    return k.new_ones(k.shape[2]).cumsum(0).long() - 1 + start.reshape(()).long()


def _cache_write_fake(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor | None, start: Tensor | None
) -> None:
    _check_write("cache_write", k, v, k_cache, v_cache, position, start)


@op(fake=_cache_write_fake, writes=("k_cache", "v_cache"))
def cache_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor | None, start: Tensor | None
) -> None:
    """k_cache[:, :, rows] = k; v_cache[:, :, rows] = v, in place; rows = position, or start + 0 .. S - 1.

    k, v [B, H, S, D], caches [B, H, L, D]; position int [S] or start, one int (int64 or int32).
    Raises ValueError where ranks, sizes or dtypes do not fit, or unless one of position and start is given.
    """
    _check_write("cache_write", k, v, k_cache, v_cache, position, start)
    rows = _rows(k, position, start)
    k_cache.index_copy_(2, rows, k)
    v_cache.index_copy_(2, rows, v)


def _check_norms(q_norm: Tensor | None, k_norm: Tensor | None) -> None:
    if (q_norm is None) != (k_norm is None):
        raise ValueError("rope_write: give both of q_norm and k_norm, or none")


def _rope_write_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    _check_norms(q_norm, k_norm)
    _check_write("rope_write", k, v, k_cache, v_cache, position, start)
    return q.new_empty(q.shape)


@op(fake=_rope_write_fake, writes=("k_cache", "v_cache"))
def rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_scale: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """`rope` of q and k, and `cache_write` of the rotated k and of v; returns the rotated q.

    With q_norm and k_norm [D] (both or none) q and k are first `rms_norm`ed over D, as in Qwen 3. Shapes as
    in `rope` and `cache_write`. Raises what these raise, and ValueError for one norm without the other.
    """
    _check_norms(q_norm, k_norm)
    _check_write("rope_write", k, v, k_cache, v_cache, position, start)
    if q_norm is not None:
        q = rms_norm.reference(q, q_norm, eps, weight_offset, cast_before_scale)
        k = rms_norm.reference(k, k_norm, eps, weight_offset, cast_before_scale)
    turned, key = rope.reference(q, k, cos, sin, rotary_dim, interleaved)
    cache_write.reference(key, v, k_cache, v_cache, position, start)
    return turned
