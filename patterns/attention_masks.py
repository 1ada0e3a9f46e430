"""Masks and biases as models spell them: what is added to attention's logits, or hides some of them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt import graph as g
from graphopt import ops
from graphopt.binding import Binding
from graphopt.patterns.attention_scores import ARGUMENTS, BEFORE_MASK, HALF, MASK, MASKED, QK
from graphopt.rule import Float, T, rule


def added_mask(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """scores + mask"""
    return ops.attention_scores(q, k, 1.0) + mask


def subtracted_mask(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """scores - mask (XLNet)"""
    return ops.attention_scores(q, k, 1.0) - mask


def subtracted_from_bias(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """scores + bias - mask (Funnel)"""
    return ops.attention_scores(q, k, 1.0, bias) - mask


def floored_scores(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """max(scores + bias, lowest) (XGLM): one -inf less"""
    scores = ops.attention_scores(q, k, 1.0, bias)
    return scores.clamp_min(torch.finfo(scores.dtype).min)


def floored_filled_scores(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """max(where(seen, scores, lowest), lowest)"""
    scores = ops.attention_scores(q, k, 1.0, seen, None, True)
    return scores.clamp_min(torch.finfo(scores.dtype).min)


def widened_scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """half scores + a mask in fp32 (MPT)"""
    return ops.attention_scores(q, k, 1.0) + mask


def narrow_mask(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """scores in fp32 + a half mask (GPT-J)"""
    return ops.attention_scores(q, k, 1.0) + mask


def added_nothing(q: Tensor, k: Tensor) -> Tensor:
    """scores + 0: a bias that this model does not have (DeBERTa)"""
    return ops.attention_scores(q, k, 1.0) + 0


def added_to_bias(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """scores + bias + mask: a position's bias, then a mask (T5, Bloom)"""
    return ops.attention_scores(q, k, 1.0, bias) + mask


def added_to_filled(q: Tensor, k: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
    """where(seen, scores, lowest) + mask (GPT-Neo)"""
    return ops.attention_scores(q, k, 1.0, seen, None, True) + mask


def filled_mask(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """scores.masked_fill(hidden, lowest)"""
    scores = ops.attention_scores(q, k, 1.0)
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


def filled_biased_scores(q: Tensor, k: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    """(scores + bias).masked_fill(hidden, lowest) (MPT)"""
    scores = ops.attention_scores(q, k, 1.0, bias)
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


def infinite_mask(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """scores.masked_fill(hidden, -inf)"""
    return ops.attention_scores(q, k, 1.0).masked_fill(hidden, float("-inf"))


def infinite_biased_scores(q: Tensor, k: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    """(scores + bias).masked_fill(hidden, -inf)"""
    return ops.attention_scores(q, k, 1.0, bias).masked_fill(hidden, float("-inf"))


def shown_mask(q: Tensor, k: Tensor, seen: Tensor, fill: float) -> Tensor:
    """where(seen, scores, fill)"""
    return torch.where(seen, ops.attention_scores(q, k, 1.0), fill)


def hidden_mask(q: Tensor, k: Tensor, hidden: Tensor, fill: float) -> Tensor:
    """where(hidden, fill, scores)"""
    return torch.where(hidden, fill, ops.attention_scores(q, k, 1.0))


# --------------------------------------------------------------------------------------------------- guards


def representable(binding: Binding) -> str | None:
    """masked_fill raises for a number that where() rounds to an infinity."""
    fill, scores = binding.number("fill"), binding.leaves["q"]
    assert isinstance(scores, fx.Node)
    largest = torch.finfo(g.dtype(scores)).max
    if not isinstance(fill, (int, float)):
        return f"the fill {fill} is known at run time only"
    if abs(fill) <= largest or fill == float("-inf"):
        return None
    return f"the fill {fill} is beyond {g.dtype(scores)}'s {-largest}"


# ---------------------------------------------------------------------------------------------------- rules

BOOL = T("...|1 s|1 t", "bool")
_FILL = Float(-1e4)


def _lowest(dtype: torch.dtype) -> float:
    """A dtype's lowest number, by which its masks hide; for fp16, whose does not swallow a score, fp32's."""
    return torch.finfo(torch.float32 if dtype == torch.float16 else dtype).min


def lowered(bias: Tensor, hidden: Tensor) -> Tensor:
    """A bias that also hides, in a dtype whose lowest number swallows every score."""
    wide = bias.to(torch.promote_types(bias.dtype, torch.float32))
    return wide.masked_fill(hidden, _lowest(bias.dtype))


def _lowered_too(mask: Tensor, hidden: Tensor) -> Tensor:
    """mask + (lowest where hidden): -inf where both hide, which in eager are lower than what one hides."""
    wide = mask.to(torch.promote_types(mask.dtype, torch.float32))
    return wide + hidden.to(wide.dtype) * _lowest(mask.dtype)


RULES = (
    rule(
        added_mask,
        lambda q, k, mask: ops.attention_scores(q, k, 1.0, mask),
        MASKED,
        carry=BEFORE_MASK,
        mask=MASK,
    ),
    rule(
        subtracted_mask,
        lambda q, k, mask: ops.attention_scores(q, k, 1.0, -mask),
        MASKED,
        carry=BEFORE_MASK,
        mask=MASK,
    ),
    rule(
        subtracted_from_bias,
        lambda q, k, bias, mask: ops.attention_scores(q, k, 1.0, bias - mask),
        MASKED,
        carry=BEFORE_MASK,
        bias=MASK,
        mask=MASK,
    ),
    # Not of fp16, whose lowest number does not swallow a score: rows without keys are means in eager only.
    *(
        rule(
            floored_scores,
            lambda q, k, bias: ops.attention_scores(q, k, 1.0, bias.clamp_min(torch.finfo(bias.dtype).min)),
            carry=BEFORE_MASK,
            q=T("... s d", wide),
            k=T("... t d", wide),
            bias=T("...|1 s|1 t", wide),
        )
        for wide in ("float64", "float32", "bfloat16")
    ),
    rule(
        floored_filled_scores,
        lambda q, k, seen: ops.attention_scores(q, k, 1.0, seen, None, True),
        MASKED,
        carry=BEFORE_MASK,
        seen=BOOL,
    ),
    rule(added_nothing, lambda q, k: ops.attention_scores(q, k, 1.0), QK, carry=ARGUMENTS),
    *(
        rule(
            widened_scores,
            lambda q, k, mask: ops.attention_scores(q.to(torch.float32), k.to(torch.float32), 1.0) + mask,
            carry=ARGUMENTS[:3],
            q=T("... s d", half),
            k=T("... t d", half),
            mask=T("...|1 s|1 t", "float32"),
        )
        for half in HALF
    ),
    *(
        rule(
            narrow_mask,
            lambda q, k, mask: ops.attention_scores(q, k, 1.0) + mask.to(torch.float32),
            carry=ARGUMENTS,
            q=T("... s d", "float32"),
            k=T("... t d", "float32"),
            mask=T("...|1 s|1 t", half),
        )
        for half in HALF
    ),
    rule(
        added_to_bias,
        lambda q, k, bias, mask: ops.attention_scores(q, k, 1.0, bias + mask),
        MASKED,
        carry=BEFORE_MASK,
        bias=MASK,
        mask=MASK,
    ),
    rule(
        added_to_filled,
        lambda q, k, seen, mask: ops.attention_scores(q, k, 1.0, _lowered_too(mask, ~seen)),
        MASKED,
        carry=BEFORE_MASK,
        seen=BOOL,
        mask=MASK,
    ),
    rule(
        filled_mask,
        lambda q, k, hidden: ops.attention_scores(q, k, 1.0, ~hidden, None, True),
        MASKED,
        carry=BEFORE_MASK,
        hidden=BOOL,
    ),
    rule(
        filled_biased_scores,
        lambda q, k, bias, hidden: ops.attention_scores(q, k, 1.0, lowered(bias, hidden)),
        MASKED,
        carry=BEFORE_MASK,
        bias=MASK,
        hidden=BOOL,
    ),
    rule(
        infinite_mask,
        lambda q, k, hidden: ops.attention_scores(q, k, 1.0, ~hidden),
        MASKED,
        carry=BEFORE_MASK,
        hidden=BOOL,
    ),
    rule(
        infinite_biased_scores,
        lambda q, k, bias, hidden: ops.attention_scores(q, k, 1.0, bias.masked_fill(hidden, float("-inf"))),
        MASKED,
        carry=BEFORE_MASK,
        bias=MASK,
        hidden=BOOL,
    ),
    rule(
        shown_mask,
        lambda q, k, seen, fill: ops.attention_scores(q, k, 1.0).masked_fill(~seen, fill),
        MASKED,
        carry=BEFORE_MASK,
        guard=representable,
        seen=BOOL,
        fill=_FILL,
    ),
    rule(
        hidden_mask,
        lambda q, k, hidden, fill: ops.attention_scores(q, k, 1.0).masked_fill(hidden, fill),
        MASKED,
        carry=BEFORE_MASK,
        guard=representable,
        hidden=BOOL,
        fill=_FILL,
    ),
)
