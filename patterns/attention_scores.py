"""Attention logits as models spell them: products, scales, softcaps, masks and biases before the softmax.

matmul(q, k^T) becomes `attention_scores`, which swallows what is done to it, one small rule each and in any
order, until a softmax makes it `attention_weights` (patterns/attention.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt import graph as g
from graphopt import ops
from graphopt.binding import Binding
from graphopt.rule import Float, Int, T, rule

aten = torch.ops.aten

# ------------------------------------------------------------------------------------------------- products


def product_scores(q: Tensor, keys: Tensor) -> Tensor:
    """q @ keys, where keys are k^T, however they came to be that"""
    return q @ keys


def shared_key_scores(q: Tensor, keys: Tensor) -> Tensor:
    """q @ keys of the one kv head that all query heads share (Falcon)"""
    return q @ keys


def flat_scores(q: Tensor, k: Tensor) -> Tensor:
    """q @ k^T of heads that are rows of the batch"""
    return torch.bmm(q, k.transpose(1, 2))


def flat_product_scores(q: Tensor, keys: Tensor) -> Tensor:
    """q @ keys, where keys are k^T, of heads that are rows of the batch"""
    return torch.bmm(q, keys)


def bloom_scores(bias: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """bias + scale * q @ k^T of heads that are rows of the batch (ALiBi)"""
    return torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=scale)


def empty_sum_scores(empty: Tensor, q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """0 * empty + scale * q @ keys of heads that are rows of the batch (GPT-2 in fp32)"""
    return torch.baddbmm(empty, q, keys, beta=0.0, alpha=scale)


def unflattened_scores(q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
    """Heads that were rows of the batch become heads."""
    return ops.attention_scores(q, k, 1.0).reshape(b, h, q.shape[2], k.shape[2])


def unflattened_biased_scores(q: Tensor, k: Tensor, bias: Tensor, b: int, h: int) -> Tensor:
    """Heads that were rows of the batch become heads, as does a bias for each."""
    return ops.attention_scores(q, k, 1.0, bias).reshape(b, h, q.shape[2], k.shape[2])


def flat_added_bias(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """scores + bias of heads that are rows of the batch (DeBERTa-v2's disentangled positions)"""
    _, n, s, _ = q.shape
    return ops.attention_scores(q, k, 1.0).reshape(n, s, k.shape[2]) + bias


def upcast_scores(q: Tensor, k: Tensor) -> Tensor:
    """scores.to(float32)"""
    return ops.attention_scores(q, k, 1.0).to(torch.float32)


# ---------------------------------------------------------------------------------------- scale and softcap


def multiplied_scores(q: Tensor, k: Tensor, scale: float, factor: float) -> Tensor:
    """scores * factor"""
    return ops.attention_scores(q, k, scale) * factor


def divided_scores(q: Tensor, k: Tensor, scale: float, divisor: float) -> Tensor:
    """scores / divisor"""
    return ops.attention_scores(q, k, scale) / divisor


def multiplied_biased_scores(q: Tensor, k: Tensor, bias: Tensor, scale: float, factor: float) -> Tensor:
    """(scores + bias) * factor (Falcon with ALiBi)"""
    return ops.attention_scores(q, k, scale, bias) * factor


def divided_biased_scores(q: Tensor, k: Tensor, bias: Tensor, scale: float, divisor: float) -> Tensor:
    """(scores + bias) / divisor"""
    return ops.attention_scores(q, k, scale, bias) / divisor


def scaled_query_scores(q: Tensor, k: Tensor, scale: float, factor: float) -> Tensor:
    """(q * factor) @ k^T"""
    return ops.attention_scores(q * factor, k, scale)


def divided_query_scores(q: Tensor, k: Tensor, scale: float, divisor: float) -> Tensor:
    """(q / divisor) @ k^T"""
    return ops.attention_scores(q / divisor, k, scale)


def gemma_softcap(q: Tensor, k: Tensor, scale: float, cap: float) -> Tensor:
    """tanh(scores) * cap, when the scores have already swallowed their division by cap"""
    return torch.tanh(ops.attention_scores(q, k, scale)) * cap


# --------------------------------------------------------------------------------------------------- guards

AROUND = (  # what may stand between a product and its softmax
    *(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.tanh.default),
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.clamp_min.default),
    *(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf),
    *(aten.to.dtype, aten.reshape.default, aten.cat.default),  # cat: a column of sinks
)
PRODUCTS = (aten.matmul.default, aten.baddbmm.default)


def _feeds_softmax(binding: Binding) -> str | None:
    """A product with a transpose is attention only if a softmax follows."""
    readers = [u for node in binding.nodes.values() for u in node.users if g.is_call(node, *PRODUCTS)]
    for _ in range(10):
        if any(g.is_call(u, aten.softmax.int) for u in readers):
            return None
        readers = [r for u in dict.fromkeys(readers) if g.is_call(u, *AROUND) for r in u.users]
    return "no softmax follows the product"


def _positive(binding: Binding) -> str | None:
    """The op takes no other cap; one that is a node is known at run time only."""
    cap = binding.number("cap")
    return f"the softcap {cap} is not positive" if isinstance(cap, (int, float)) and cap <= 0 else None


# ---------------------------------------------------------------------------------------------------- rules

MASKED = {"q": T("... s d"), "k": T("... t d")}  # leading b h, to which masks of any rank broadcast
MASK = T("...|1 s|1 t")
QK = {"q": T("b h s d"), "k": T("b h t d")}
_FLAT = {"q": T("n s d"), "k": T("n t d")}
_SCALE = Float(0.3)
_FACTOR = Float(0.7)
_DIVISOR = Float(4.3)
HALF = ("bfloat16", "float16")
_ROWS = ("1", "s")  # of a bias: the same for all queries, or one each
# Without the last where a dtype changes: the lowest number of the one is not that of the other.
ARGUMENTS = ("scale", "bias", "softcap", "empty_rows_mean")
BEFORE_MASK = ("scale", "softcap")


def _flat(q: Tensor, k: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """Rows of [n, s, d] as the heads of one batch."""
    n, s, _ = q.shape
    bias = None if bias is None else bias[None]
    return ops.attention_scores(q[None], k[None], scale, bias).reshape(n, s, k.shape[1])


def _unflat(q: Tensor, k: Tensor, b: int, h: int, bias: Tensor | None = None) -> Tensor:
    """One batch of b * h heads as b batches of h."""
    (_, _, s, d), t = q.shape, k.shape[2]
    bias = None if bias is None else bias.reshape(b, h, *bias.shape[2:])
    return ops.attention_scores(q.reshape(b, h, s, d), k.reshape(b, h, t, d), 1.0, bias)


RULES = (
    rule(
        product_scores,
        lambda q, keys: ops.attention_scores(q, keys.transpose(2, 3), 1.0),
        guard=_feeds_softmax,
        q=T("b h s d"),
        keys=T("b h d t"),
    ),
    rule(
        shared_key_scores,
        lambda q, keys: ops.attention_scores(
            q, keys.transpose(2, 3).expand(q.shape[0], q.shape[1], keys.shape[3], q.shape[3]), 1.0
        ),
        guard=_feeds_softmax,
        q=T("b h s d"),
        keys=T("b 1 d t"),
    ),
    rule(flat_scores, _flat, _FLAT, guard=_feeds_softmax),
    rule(
        flat_product_scores,
        lambda q, keys: _flat(q, keys.transpose(1, 2)),
        guard=_feeds_softmax,
        q=T("n s d"),
        keys=T("n d t"),
    ),
    *(
        rule(
            bloom_scores,
            lambda bias, q, k, scale: _flat(q, k, scale, bias),
            _FLAT,
            guard=_feeds_softmax,
            bias=T(f"n {rows} t"),
            scale=_SCALE,
        )
        for rows in _ROWS
    ),
    rule(
        empty_sum_scores,
        lambda empty, q, keys, scale: _flat(q, keys.transpose(1, 2), scale),
        guard=_feeds_softmax,
        empty=T("n s t"),
        q=T("n s d"),
        keys=T("n d t"),
        scale=_SCALE,
    ),
    rule(
        unflattened_scores,
        _unflat,
        carry=BEFORE_MASK,
        q=T("1 b*h s d"),
        k=T("1 b*h t d"),
        b=Int(2),
        h=Int(4),
    ),
    *(
        rule(
            unflattened_biased_scores,
            lambda q, k, bias, b, h: _unflat(q, k, b, h, bias),
            carry=BEFORE_MASK,
            q=T("1 b*h s d"),
            k=T("1 b*h t d"),
            bias=T(f"1 b*h {rows} t"),
            b=Int(2),
            h=Int(4),
        )
        for rows in _ROWS
    ),
    *(
        rule(
            flat_added_bias,
            lambda q, k, bias: ops.attention_scores(q, k, 1.0, bias[None]).reshape(
                q.shape[1], q.shape[2], k.shape[2]
            ),
            carry=BEFORE_MASK,
            q=T("1 n s d"),
            k=T("1 n t d"),
            bias=T(f"n {rows} t"),
        )
        for rows in _ROWS
    ),
    *(
        rule(
            upcast_scores,
            lambda q, k: ops.attention_scores(q.to(torch.float32), k.to(torch.float32), 1.0),
            carry=ARGUMENTS[:3],
            q=T("b h s d", half),
            k=T("b h t d", half),
        )
        for half in HALF
    ),
    rule(
        multiplied_scores,
        lambda q, k, scale, factor: ops.attention_scores(q, k, scale * factor),
        QK,
        scale=_SCALE,
        factor=_FACTOR,
    ),
    rule(
        divided_scores,
        lambda q, k, scale, divisor: ops.attention_scores(q, k, scale / divisor),
        QK,
        scale=_SCALE,
        divisor=_DIVISOR,
    ),
    rule(
        multiplied_biased_scores,
        lambda q, k, bias, scale, factor: ops.attention_scores(q, k, scale * factor, bias * factor),
        MASKED,
        bias=MASK,
        scale=_SCALE,
        factor=_FACTOR,
    ),
    rule(
        divided_biased_scores,
        lambda q, k, bias, scale, divisor: ops.attention_scores(q, k, scale / divisor, bias / divisor),
        MASKED,
        bias=MASK,
        scale=_SCALE,
        divisor=_DIVISOR,
    ),
    rule(
        scaled_query_scores,
        lambda q, k, scale, factor: ops.attention_scores(q, k, scale * factor),
        QK,
        carry=ARGUMENTS[1:],
        scale=_SCALE,
        factor=_FACTOR,
    ),
    rule(
        divided_query_scores,
        lambda q, k, scale, divisor: ops.attention_scores(q, k, scale / divisor),
        QK,
        carry=ARGUMENTS[1:],
        scale=_SCALE,
        divisor=_DIVISOR,
    ),
    rule(
        gemma_softcap,
        lambda q, k, scale, cap: ops.attention_scores(q, k, scale * cap, None, cap),
        QK,
        guard=_positive,
        scale=_SCALE,
        cap=Float(50.0),
    ),
)
