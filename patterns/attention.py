"""Attention spelled out, from the softmax to v and its neighbours (torch's SDPA: `torch_ops`).

softmax(attention_scores) becomes `attention_weights`, and with v `attention`, which then swallows repeated
heads and casts around it. What models do to the scores is in patterns/attention_scores.py and
patterns/attention_masks.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphopt import ops
from graphopt.binding import Binding
from graphopt.patterns.attention_masks import BOOL, lowered, representable
from graphopt.patterns.attention_scores import MASK, MASKED
from graphopt.rule import Float, T, rule

# -------------------------------------------------------------------------------------------------- weights


def softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(scores)"""
    return torch.softmax(ops.attention_scores(q, k, 1.0), dim=-1)


def upcast_softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(scores, dtype=float32).to(q.dtype)"""
    return torch.softmax(ops.attention_scores(q, k, 1.0), dim=-1, dtype=torch.float32).to(q.dtype)


def flat_softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(scores) of heads that are rows of the batch"""
    (b, h, s, _), t = q.shape, k.shape[2]
    return torch.softmax(ops.attention_scores(q, k, 1.0).reshape(b * h, s, t), dim=-1)


def upcast_flat_softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(scores, dtype=float32).to(q.dtype) of heads that are rows of the batch"""
    (b, h, s, _), t = q.shape, k.shape[2]
    scores = ops.attention_scores(q, k, 1.0).reshape(b * h, s, t)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)


def centred_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(scores - the largest of each row)"""
    scores = ops.attention_scores(q, k, 1.0)
    return torch.softmax(scores - scores.max(dim=-1, keepdim=True).values, dim=-1)


def low_filled_weights(q: Tensor, k: Tensor, hidden: Tensor, fill: float) -> Tensor:
    """softmax(scores.masked_fill(hidden, -1e9))

    One rule over the softmax: as scores, a fill of -1e9 is not the fill of the lowest number.
    """
    return torch.softmax(ops.attention_scores(q, k, 1.0).masked_fill(hidden, fill), dim=-1)


def upcast_low_filled_weights(q: Tensor, k: Tensor, hidden: Tensor, fill: float) -> Tensor:
    """softmax(scores.masked_fill(hidden, -1e9), dtype=float32).to(q.dtype)"""
    scores = ops.attention_scores(q, k, 1.0).masked_fill(hidden, fill)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)


def low_filled_biased_weights(q: Tensor, k: Tensor, bias: Tensor, hidden: Tensor, fill: float) -> Tensor:
    """softmax((scores + bias).masked_fill(hidden, -1e9)) (MPT in bf16: it fills fp32 with bf16's lowest)"""
    return torch.softmax(ops.attention_scores(q, k, 1.0, bias).masked_fill(hidden, fill), dim=-1)


def gpt_oss_weights(q: Tensor, k: Tensor, sinks: Tensor) -> Tensor:
    """softmax over scores and a column of sinks, without that column; the largest logit is 0"""
    logits = _with_sinks(q, k, sinks)
    return torch.softmax(logits - logits.max(dim=-1, keepdim=True).values, dim=-1)[..., :-1]


def sink_weights(q: Tensor, k: Tensor, sinks: Tensor) -> Tensor:
    """softmax over scores and a column of sinks, without that column"""
    return torch.softmax(_with_sinks(q, k, sinks), dim=-1)[..., :-1]


def _with_sinks(q: Tensor, k: Tensor, sinks: Tensor) -> Tensor:
    b, h, s, _ = q.shape
    return torch.cat((ops.attention_scores(q, k, 1.0), sinks.reshape(1, h, 1, 1).expand(b, h, s, 1)), dim=-1)


# -------------------------------------------------------------------------------------------------- values


def weighted_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """weights @ v"""
    return ops.attention_weights(q, k, 1.0) @ v


def shared_weighted_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """weights @ v of the one kv head that all query heads share"""
    return ops.attention_weights(q, k, 1.0) @ v


def flat_weighted_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """weights @ v of heads that are rows of the batch"""
    (b, h, s, _), t = q.shape, k.shape[2]
    return torch.bmm(ops.attention_weights(q, k, 1.0).reshape(b * h, s, t), v)


def zeroed_values(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """softmax(scores.masked_fill(hidden, -inf)).masked_fill(hidden, 0) @ v: rows without a key are 0"""
    return ops.attention_weights(q, k, 1.0, ~hidden).masked_fill(hidden, 0.0) @ v


def zeroed_biased_values(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    """softmax((scores + bias).masked_fill(hidden, -inf)).masked_fill(hidden, 0) @ v (CPM-Ant)"""
    hiding = bias.masked_fill(hidden, float("-inf"))
    return ops.attention_weights(q, k, 1.0, hiding).masked_fill(hidden, 0.0) @ v


def granite_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """softmax(scores) @ v * sigmoid(logsumexp(scores) - sink): a column of sinks, without the column"""
    scores = ops.attention_scores(q, k, 1.0)
    share = (torch.logsumexp(scores, dim=-1) - sinks.reshape(1, q.shape[1], 1)).to(torch.float32).sigmoid()
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v * share.unsqueeze(-1).to(q.dtype)


def narrowed_weighted_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """weights.to(v.dtype) @ v, where scores are fp32 and v is half (GPT-Neo, GPT-J)"""
    return ops.attention_weights(q, k, 1.0).to(v.dtype) @ v


def narrowed_shared_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """weights.to(v.dtype) @ v of the one kv head that all query heads share"""
    return ops.attention_weights(q, k, 1.0).to(v.dtype) @ v


def narrowed_softmax_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(scores.to(v.dtype)) @ v, where scores are fp32"""
    return torch.softmax(ops.attention_scores(q, k, 1.0).to(v.dtype), dim=-1) @ v


def narrowed_shared_softmax_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(scores.to(v.dtype)) @ v of one kv head, where scores are fp32 (Falcon with ALiBi)"""
    return torch.softmax(ops.attention_scores(q, k, 1.0).to(v.dtype), dim=-1) @ v


# ---------------------------------------------------------------------------------------------- neighbours


def wide_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """attention in fp32 of what is half, and half again"""
    return ops.attention(q.to(torch.float32), k.to(torch.float32), v.to(torch.float32), 1.0).to(q.dtype)


def repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each kv head repeated for the query heads that share it (repeat_kv)."""
    batch, kv_heads, length, k_dim = k.shape
    groups = q.shape[1] // kv_heads
    repeated_k = k[:, :, None].expand(batch, kv_heads, groups, length, k_dim)
    repeated_k = repeated_k.reshape(batch, q.shape[1], length, k_dim)
    v_dim = v.shape[3]
    repeated_v = v[:, :, None].expand(batch, kv_heads, groups, length, v_dim)
    repeated_v = repeated_v.reshape(batch, q.shape[1], length, v_dim)
    return ops.attention(q, repeated_k, repeated_v, 1.0)


def interleaved_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each kv head repeated by repeat_interleave."""
    groups = q.shape[1] // k.shape[1]
    return ops.attention(q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), 1.0)


def expanded_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One kv head expanded to the query heads."""
    b, h = q.shape[:2]
    expanded_k = k.expand(b, h, k.shape[2], k.shape[3])
    return ops.attention(q, expanded_k, v.expand(b, h, v.shape[2], v.shape[3]), 1.0)


# --------------------------------------------------------------------------------------------------- guards


def _low(binding: Binding) -> str | None:
    """exp(fill - largest score) has to be exactly 0, and a fill says nothing of the scores.

    Below -1e9 it is, unless a score is itself below -1e9 + 104 (fp32's exp is 0 from -104 on; fp64's from
    -745): products of rows with norms of 3e4. At -1e4 that takes norms of 100, which models have. A row
    without a key is the mean of v, as all its scores are the fill.
    """
    fill = binding.number("fill")
    if not isinstance(fill, (int, float)):
        return f"the fill {fill} is known at run time only"
    if fill > LOW:
        return f"the fill {fill} > {LOW}: a score may be as low"
    return "rows without a key are nan" if fill == float("-inf") else representable(binding)


# ---------------------------------------------------------------------------------------------------- rules

LOW = -1e9
_HALF = ("bfloat16", "float16")
_QK = {"q": T("b h s d"), "k": T("b h t d")}
SCORES = ("scale", "bias", "softcap", "empty_rows_mean")
WEIGHTS = (*SCORES, "sinks")
ALL = (*WEIGHTS, "causal", "offset", "offset_tensor", "window", "key_padding")


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return ops.attention_weights(q, k, 1.0)


def _flat_weights(q: Tensor, k: Tensor) -> Tensor:
    (b, h, s, _), t = q.shape, k.shape[2]
    return ops.attention_weights(q, k, 1.0).reshape(b * h, s, t)


def _sink_weights(q: Tensor, k: Tensor, sinks: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, sinks.dtype)
    return ops.attention_weights(q.to(wide), k.to(wide), 1.0, sinks=sinks)


def _sunk(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return ops.attention(q, k, v, 1.0, sinks=sinks)


def _shared_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.attention(q, k, v.expand(q.shape[0], q.shape[1], v.shape[2], v.shape[3]), 1.0)


def _flat_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (b, h, s, _), (_, t, e) = q.shape, v.shape
    return ops.attention(q, k, v.reshape(b, h, t, e), 1.0).reshape(b * h, s, e)


def _whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.attention(q, k, v, 1.0)


def _narrowed(values: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: values(q, k, v.to(q.dtype)).to(v.dtype)


RULES = (
    *(rule(pattern, _weights, _QK, carry=SCORES) for pattern in (softmax_weights, upcast_softmax_weights)),
    *(
        rule(pattern, _flat_weights, _QK, carry=SCORES)
        for pattern in (flat_softmax_weights, upcast_flat_softmax_weights)
    ),
    *(
        rule(
            pattern,
            lambda q, k, hidden, fill: ops.attention_weights(q, k, 1.0, ~hidden, empty_rows_mean=True),
            MASKED,
            carry=("scale", "softcap"),
            guard=_low,
            hidden=BOOL,
            fill=Float(-2e9),
        )
        for pattern in (low_filled_weights, upcast_low_filled_weights)
    ),
    rule(
        low_filled_biased_weights,
        lambda q, k, bias, hidden, fill: ops.attention_weights(q, k, 1.0, lowered(bias, hidden)),
        MASKED,
        carry=("scale", "softcap"),
        guard=_low,
        bias=MASK,
        hidden=BOOL,
        fill=Float(-2e9),
    ),
    *(
        rule(pattern, _sink_weights, _QK, carry=SCORES, sinks=T("h", "S"))
        for pattern in (gpt_oss_weights, sink_weights)
    ),
    rule(centred_weights, _weights, _QK, carry=SCORES),
    rule(
        zeroed_values,
        lambda q, k, v, hidden: ops.attention(q, k, v, 1.0, bias=~hidden),
        MASKED,
        carry=("scale", "softcap"),
        v=T("... t e"),
        hidden=BOOL,
    ),
    rule(
        zeroed_biased_values,
        lambda q, k, v, bias, hidden: ops.attention(
            q, k, v, 1.0, bias=bias.masked_fill(hidden, float("-inf"))
        ),
        MASKED,
        carry=("scale", "softcap"),
        v=T("... t e"),
        bias=MASK,
        hidden=BOOL,
    ),
    rule(granite_sinks, _sunk, _QK, carry=SCORES, v=T("b h t e"), sinks=T("h")),
    rule(weighted_values, _whole, _QK, carry=WEIGHTS, v=T("b h t e")),
    rule(shared_weighted_values, _shared_values, _QK, carry=WEIGHTS, v=T("b 1 t e")),
    rule(flat_weighted_values, _flat_values, _QK, carry=WEIGHTS, v=T("b*h t e")),
    *(
        rule(
            pattern,
            _narrowed(_whole if heads == "h" else _shared_values),
            carry=carry,
            q=T("b h s d", "float32"),
            k=T("b h t d", "float32"),
            v=T(f"b {heads} t e", half),
        )
        for half in _HALF
        for pattern, heads, carry in (
            (narrowed_weighted_values, "h", WEIGHTS),
            (narrowed_shared_values, "1", WEIGHTS),
            (narrowed_softmax_values, "h", SCORES[:3]),  # a half has another lowest number
            (narrowed_shared_softmax_values, "1", SCORES[:3]),
        )
    ),
    *(
        rule(
            wide_attention,
            _whole,
            carry=ALL,
            q=T("b h s d", half),
            k=T("b h t d", half),
            v=T("b h t e", half),
        )
        for half in _HALF
    ),
    *(
        rule(
            pattern,
            _whole,
            carry=ALL,
            q=T("b hk*g s d"),
            k=T("b hk t d"),
            v=T("b hk t e"),
        )
        for pattern in (repeated_heads, interleaved_heads)
    ),
    rule(expanded_head, _whole, carry=ALL, q=T("b h s d"), k=T("b 1 t d"), v=T("b 1 t e")),
)
