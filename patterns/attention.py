"""Attention spelled out with softmax, scale, softcap, mask and repeated kv heads (torch's SDPA: `torch_ops`).

The spelled-out form grows: matmul(q, k^T) becomes `attention_scores`, which swallows a scale, a softcap and a
mask, until softmax and v make it `attention`. So each rule is one small equation, in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt import graph as g
from graphopt import ops
from graphopt.binding import Binding
from graphopt.rule import Float, T, rule

aten = torch.ops.aten

# -------------------------------------------------------------------------------------------- spelled out


def product_scores(q: Tensor, k: Tensor) -> Tensor:
    """q @ k^T"""
    return q @ k.transpose(2, 3)


def multiplied_scores(q: Tensor, k: Tensor, scale: float, factor: float) -> Tensor:
    """scores * factor"""
    return ops.attention_scores(q, k, scale) * factor


def divided_scores(q: Tensor, k: Tensor, scale: float, divisor: float) -> Tensor:
    """scores / divisor"""
    return ops.attention_scores(q, k, scale) / divisor


def scaled_query_scores(q: Tensor, k: Tensor, scale: float, factor: float) -> Tensor:
    """(q * factor) @ k^T"""
    return ops.attention_scores(q * factor, k, scale)


def divided_query_scores(q: Tensor, k: Tensor, scale: float, divisor: float) -> Tensor:
    """(q / divisor) @ k^T"""
    return ops.attention_scores(q / divisor, k, scale)


def gemma_softcap(q: Tensor, k: Tensor, scale: float, cap: float) -> Tensor:
    """tanh(scores) * cap, when the scores have already swallowed their division by cap"""
    return torch.tanh(ops.attention_scores(q, k, scale)) * cap


def added_mask(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """scores + mask"""
    return ops.attention_scores(q, k, 1.0) + mask


def filled_mask(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """scores.masked_fill(hidden, lowest)"""
    scores = ops.attention_scores(q, k, 1.0)
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


def infinite_mask(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """scores.masked_fill(hidden, -inf)"""
    return ops.attention_scores(q, k, 1.0).masked_fill(hidden, float("-inf"))


def shown_mask(q: Tensor, k: Tensor, seen: Tensor, fill: float) -> Tensor:
    """where(seen, scores, fill)"""
    return torch.where(seen, ops.attention_scores(q, k, 1.0), fill)


def hidden_mask(q: Tensor, k: Tensor, hidden: Tensor, fill: float) -> Tensor:
    """where(hidden, fill, scores)"""
    return torch.where(hidden, fill, ops.attention_scores(q, k, 1.0))


def low_filled_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, fill: float) -> Tensor:
    """softmax(scores.masked_fill(hidden, -1e9)) @ v

    One rule down to v: as scores, a fill of -1e9 is not the fill of the lowest number.
    """
    return torch.softmax(ops.attention_scores(q, k, 1.0).masked_fill(hidden, fill), dim=-1) @ v


def upcast_low_filled_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, fill: float) -> Tensor:
    """softmax(scores.masked_fill(hidden, -1e9), dtype=float32).to(q.dtype) @ v"""
    scores = ops.attention_scores(q, k, 1.0).masked_fill(hidden, fill)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(scores) @ v"""
    return torch.softmax(ops.attention_scores(q, k, 1.0), dim=-1) @ v


def upcast_softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(scores, dtype=float32).to(q.dtype) @ v"""
    return torch.softmax(ops.attention_scores(q, k, 1.0), dim=-1, dtype=torch.float32).to(q.dtype) @ v


# ---------------------------------------------------------------------------------------------- neighbours


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


def _feeds_softmax(binding: Binding) -> str | None:
    """A product with a transpose is attention only if a softmax follows."""
    readers = [
        u for node in binding.nodes.values() for u in node.users if g.is_call(node, aten.matmul.default)
    ]
    between = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.tanh.default, aten.to.dtype)
    masks = (
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.where.self,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
    )
    for _ in range(10):
        if any(g.is_call(u, aten.softmax.int) for u in readers):
            return None
        readers = [r for u in readers if g.is_call(u, *between, *masks) for r in u.users]
    return "no softmax follows the product"


def _positive(binding: Binding) -> str | None:
    """The op takes no other cap; one that is a node is known at run time only."""
    cap = binding.number("cap")
    return f"the softcap {cap} is not positive" if isinstance(cap, (int, float)) and cap <= 0 else None


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
    return "rows without a key are nan" if fill == float("-inf") else _representable(binding)


def _representable(binding: Binding) -> str | None:
    """masked_fill raises for a number that where() rounds to an infinity."""
    fill, scores = binding.number("fill"), binding.leaves["q"]
    assert isinstance(scores, fx.Node)
    largest = torch.finfo(g.dtype(scores)).max
    if not isinstance(fill, (int, float)):
        return f"the fill {fill} is known at run time only"
    if abs(fill) <= largest or fill == float("-inf"):
        return None
    return f"the fill {fill} is beyond {g.dtype(scores)}'s {-largest}"


LOW = -1e9
_QKV = {"q": T("b h s d"), "k": T("b h t d"), "v": T("b h t e")}
_QK = {"q": T("b h s d"), "k": T("b h t d")}
_MASKED = {"q": T("... s d"), "k": T("... t d")}  # leading b h, to which masks of any rank broadcast
_MASK = T("...|1 s|1 t")
_BOOL = T("...|1 s|1 t", "bool")
_SCALE = Float(0.3)
_FILL = Float(-1e4)
SCORES = ("scale", "bias", "softcap", "empty_rows_mean")
ALL = (
    "scale",
    "causal",
    "offset",
    "offset_tensor",
    "window",
    "key_padding",
    "bias",
    "softcap",
    "sinks",
    "empty_rows_mean",
)


def _whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.attention(q, k, v, 1.0)


RULES = (
    rule(product_scores, lambda q, k: ops.attention_scores(q, k, 1.0), _QK, guard=_feeds_softmax),
    rule(
        multiplied_scores,
        lambda q, k, scale, factor: ops.attention_scores(q, k, scale * factor),
        _QK,
        scale=_SCALE,
        factor=Float(0.7),
    ),
    rule(
        divided_scores,
        lambda q, k, scale, divisor: ops.attention_scores(q, k, scale / divisor),
        _QK,
        scale=_SCALE,
        divisor=Float(4.3),
    ),
    rule(
        scaled_query_scores,
        lambda q, k, scale, factor: ops.attention_scores(q, k, scale * factor),
        _QK,
        carry=SCORES[1:],
        scale=_SCALE,
        factor=Float(0.7),
    ),
    rule(
        divided_query_scores,
        lambda q, k, scale, divisor: ops.attention_scores(q, k, scale / divisor),
        _QK,
        carry=SCORES[1:],
        scale=_SCALE,
        divisor=Float(4.3),
    ),
    rule(
        gemma_softcap,
        lambda q, k, scale, cap: ops.attention_scores(q, k, scale * cap, None, cap),
        _QK,
        guard=_positive,
        scale=_SCALE,
        cap=Float(50.0),
    ),
    rule(
        added_mask,
        lambda q, k, mask: ops.attention_scores(q, k, 1.0, mask),
        _MASKED,
        carry=("scale", "softcap"),
        mask=_MASK,
    ),
    rule(
        filled_mask,
        lambda q, k, hidden: ops.attention_scores(q, k, 1.0, ~hidden, None, True),
        _MASKED,
        carry=("scale", "softcap"),
        hidden=_BOOL,
    ),
    rule(
        infinite_mask,
        lambda q, k, hidden: ops.attention_scores(q, k, 1.0, ~hidden),
        _MASKED,
        carry=("scale", "softcap"),
        hidden=_BOOL,
    ),
    rule(
        shown_mask,
        lambda q, k, seen, fill: ops.attention_scores(q, k, 1.0).masked_fill(~seen, fill),
        _MASKED,
        carry=("scale", "softcap"),
        guard=_representable,
        seen=_BOOL,
        fill=_FILL,
    ),
    rule(
        hidden_mask,
        lambda q, k, hidden, fill: ops.attention_scores(q, k, 1.0).masked_fill(hidden, fill),
        _MASKED,
        carry=("scale", "softcap"),
        guard=_representable,
        hidden=_BOOL,
        fill=_FILL,
    ),
    *(
        rule(
            pattern,
            lambda q, k, v, hidden, fill: ops.attention(q, k, v, 1.0, bias=~hidden, empty_rows_mean=True),
            _MASKED,
            carry=("scale", "softcap"),
            guard=_low,
            v=T("... t e"),
            hidden=_BOOL,
            fill=Float(-2e9),
        )
        for pattern in (low_filled_attention, upcast_low_filled_attention)
    ),
    rule(softmax_attention, _whole, _QKV, carry=SCORES),
    rule(upcast_softmax_attention, _whole, _QKV, carry=SCORES),
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
)
