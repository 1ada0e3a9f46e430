"""Scaled dot-product attention with everything that models put between the two products."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from graphopt.ops.define import differ, op, require_floating, require_rank, require_size, wide


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset_tensor: Tensor | None,
    window: int | None,
    key_padding: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Raise ValueError for what does not fit together; symbolic sizes and scalars are let through."""
    require_floating("attention", q=q, k=k, v=v)
    require_rank("attention", 4, q=q, k=k, v=v)
    (batch, heads, queries, head_dim), (_, kv_heads, keys, _) = q.shape, k.shape
    for name, x in (("k", k), ("v", v)):
        require_size("attention", f"batch of {name}", x.shape[0], batch)
        require_size("attention", f"number of heads of {name}", x.shape[1], kv_heads)
        require_size("attention", f"length of {name}", x.shape[2], keys)
    require_size("attention", "head_dim of k", k.shape[3], head_dim)
    if isinstance(heads, int) and isinstance(kv_heads, int) and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"attention: {heads} query heads are no multiple of {kv_heads} kv heads")
    if isinstance(window, int) and window < 1:
        raise ValueError(f"attention: window {window} < 1")
    if isinstance(softcap, (int, float)) and softcap <= 0:
        raise ValueError(f"attention: softcap {softcap} is not positive")
    if offset_tensor is not None:
        if offset_tensor.is_floating_point() or offset_tensor.dtype == torch.bool:
            raise ValueError(f"attention: offset_tensor is {offset_tensor.dtype}; it must be an integer")
        require_size("attention", "number of elements of offset_tensor", offset_tensor.numel(), 1)
    if sinks is not None:
        require_rank("attention", 1, sinks=sinks)
        require_size("attention", "size of sinks", sinks.shape[0], heads)
    if key_padding is not None:
        require_rank("attention", 2, key_padding=key_padding)
        if key_padding.is_floating_point():
            raise ValueError(f"attention: key_padding is {key_padding.dtype}; pass an additive mask as bias")
        require_size("attention", "batch of key_padding", key_padding.shape[0], batch)
        require_size("attention", "length of key_padding", key_padding.shape[1], keys)
    if bias is not None:
        _check_bias(bias, (batch, heads, queries, keys))


def _check_bias(bias: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the bias is bool or floating and broadcasts to the scores' shape."""
    if bias.dtype != torch.bool and not bias.is_floating_point():
        raise ValueError(f"attention: bias is {bias.dtype}; it must be bool or floating")
    if bias.dim() > 4:
        raise ValueError(f"attention: bias has {bias.dim()} dimensions; it must have at most 4")
    for dim in range(-bias.dim(), 0):
        if differ(bias.shape[dim], 1):
            require_size("attention", f"size of bias in dimension {dim}", bias.shape[dim], shape[dim])


@functools.wraps(_check)  # for its parameters
def _attention_lse_fake(*args: Any) -> tuple[Tensor, Tensor]:
    _check(*args)
    q, v = args[0], args[2]
    rows = q.shape[:3]
    return q.new_empty((*rows, v.shape[3])), q.new_empty(rows, dtype=wide(q.dtype))


@functools.wraps(_check)
def _attention_fake(*args: Any) -> Tensor:
    return _attention_lse_fake(*args)[0]


@op(fake=_attention_fake)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = False,
    offset: int = 0,
    offset_tensor: Tensor | None = None,
    window: int | None = None,
    key_padding: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    empty_rows_mean: bool = False,
) -> Tensor:
    """softmax(softcap(q @ k^T * scale) + bias, over the keys that a query sees) @ v.

    q [B, H, Q, D], k [B, Hk, K, D], v [B, Hk, K, Dv] -> [B, H, Q, Dv]; G = H // Hk query heads share a kv
    head: head h reads h // G. Query i, at position p = i + offset + offset_tensor, sees key j iff all of
    these hold:
      causal:       j <= p
      window:       j > p - window (it limits the past alone, and does not need causal)
      key_padding:  key_padding[b, j], bool or 0/1 integers [B, K]
      bias:         bias[b, h, i, j], where bias is bool
    bias broadcasts to [B, H, Q, K]; a floating one is added. softcap c: s -> c * tanh(s / c), before the
    bias. sinks [H]: one more logit a head, which takes weight and gives nothing.

    A row that sees no key gives zeros, or with `empty_rows_mean` the mean of all K rows of v: what an
    additive mask of finfo.min gives in eager (with sinks zeros too: the sink then takes all the weight).
    Computed in fp32 (fp64 for fp64), returned in q's dtype.

    Source: Vaswani et al. 2017, section 3.2; groups: Ainslie et al. 2023; softcap: Gemma Team 2024 (Gemma 2);
    window: Beltagy et al. 2020 (Longformer), Mistral; sinks: Xiao et al. 2023, gpt-oss; SDPA in torch.
    Raises ValueError where a shape, dtype or limit does not fit.
    """
    _check(q, k, v, offset_tensor, window, key_padding, bias, softcap, sinks)
    scores = _scores(q, k, scale, softcap, bias)
    seen = _seen(q, k, causal, offset, offset_tensor, window, key_padding, bias)
    return _mixed(scores, seen, v, sinks, empty_rows_mean)[0].to(q.dtype)


@op(fake=_attention_lse_fake)
def attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = False,
    offset: int = 0,
    offset_tensor: Tensor | None = None,
    window: int | None = None,
    key_padding: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    empty_rows_mean: bool = False,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the log of each row's sum of exponentials: (out [B, H, Q, Dv], lse [B, H, Q]).

    lse is fp32 (fp64 for fp64), counts the sink, and is -inf for a row without key and sink, also under
    `empty_rows_mean`: parts of a key range merge with weights exp(lse_part - lse_all).

    Source: Dao 2023 (FlashAttention-2), section 3.1; cascade attention in FlashInfer.
    Raises what `attention` raises.
    """
    _check(q, k, v, offset_tensor, window, key_padding, bias, softcap, sinks)
    scores = _scores(q, k, scale, softcap, bias)
    seen = _seen(q, k, causal, offset, offset_tensor, window, key_padding, bias)
    out, logits = _mixed(scores, seen, v, sinks, empty_rows_mean)
    return out.to(q.dtype), torch.logsumexp(logits, -1)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None, bias: Tensor | None) -> Tensor:
    """The logits [B, H, Q, K] before any key is hidden."""
    dtype = wide(q.dtype)
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    # The heads of a group become rows of one product, so that k is read as it is and never repeated.
    grouped = q.to(dtype).reshape(batch, kv_heads, heads // kv_heads * queries, head_dim)
    scores = (grouped @ k.to(dtype).transpose(-1, -2)).reshape(batch, heads, queries, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + bias.to(dtype)
    return scores


def _seen(
    q: Tensor,
    k: Tensor,
    causal: bool,
    offset: int,
    offset_tensor: Tensor | None,
    window: int | None,
    key_padding: Tensor | None,
    bias: Tensor | None,
) -> Tensor | None:
    """True where a query sees a key, broadcasting to [B, H, Q, K]; None where all see all."""
    position = torch.arange(q.shape[2], device=q.device).unsqueeze(1) + offset
    if offset_tensor is not None:
        position = position + offset_tensor.reshape(())
    key = torch.arange(k.shape[2], device=q.device)
    terms = []
    if causal:
        terms.append(key <= position)
    if window is not None:
        terms.append(key > position - window)
    if key_padding is not None:
        terms.append(key_padding.to(torch.bool)[:, None, None, :])
    if bias is not None and bias.dtype == torch.bool:
        terms.append(bias)
    seen = None
    for term in terms:
        seen = term if seen is None else seen & term
    return seen


def _mixed(
    scores: Tensor, seen: Tensor | None, v: Tensor, sinks: Tensor | None, empty_rows_mean: bool
) -> tuple[Tensor, Tensor]:
    """The weighted mean of v [B, H, Q, Dv], and the logits that its weights come from, sink included."""
    weights, logits = _weights(scores, seen, sinks, empty_rows_mean)
    batch, heads, queries, keys = scores.shape
    kv_heads = v.shape[1]
    grouped = weights.reshape(batch, kv_heads, heads // kv_heads * queries, keys)
    return (grouped @ v.to(scores.dtype)).reshape(batch, heads, queries, v.shape[3]), logits


def _weights(
    scores: Tensor, seen: Tensor | None, sinks: Tensor | None, empty_rows_mean: bool
) -> tuple[Tensor, Tensor]:
    """softmax over the keys that are seen [B, H, Q, K], and the logits behind it, sink included."""
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    batch, heads, queries, keys = scores.shape
    logits = scores
    if sinks is not None:
        sink = sinks.to(scores.dtype)[None, :, None, None].expand(batch, heads, queries, 1)
        logits = torch.cat((scores, sink), -1)
    empty = torch.isneginf(scores).all(-1, keepdim=True)  # softmax alone would make these rows nan
    if empty_rows_mean and sinks is None:
        return torch.softmax(logits.masked_fill(empty, 0.0), -1), logits
    return torch.softmax(logits, -1).narrow(-1, 0, keys).masked_fill(empty, 0.0), logits
