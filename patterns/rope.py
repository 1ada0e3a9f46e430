"""Rotary position embedding (Su et al. 2021): half-split, interleaved and partial, on q and k together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphopt import ops
from graphopt.binding import Binding
from graphopt.rule import Int, T, rule


def _half_turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _pair_turned(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def llama_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x * cos + cat(-x[half:], x[:half]) * sin for q and k; cos and sin [batch or 1, length, head_dim]

    Where cos and sin are wider than q, the result is cast back (OLMo 2).
    """
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    turned_q, turned_k = q * c + _half_turned(q) * s, k * c + _half_turned(k) * s
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def paired_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring pairs are rotated; cos and sin come with each angle twice."""
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    turned_q, turned_k = q * c + _pair_turned(q) * s, k * c + _pair_turned(k) * s
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def upcast_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As Llama's, in fp32 whatever q is."""
    turned_q, turned_k = llama_rope(q.float(), k.float(), cos, sin)
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def cohere_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring pairs, in fp32 whatever q is; cos and sin are in the model's dtype."""
    turned_q, turned_k = paired_rope(q.float(), k.float(), cos, sin)
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def partial_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary: int) -> tuple[Tensor, Tensor]:
    """Only the first `rotary` dimensions of a head are rotated, the others pass."""
    turned_q, turned_k = ops.rope(q[..., :rotary], k[..., :rotary], cos, sin, rotary)
    return torch.cat((turned_q, q[..., rotary:]), dim=-1), torch.cat((turned_k, k[..., rotary:]), dim=-1)


def _even(binding: Binding) -> str | None:
    """Two halves of an odd head differ in length; the op rotates pairs."""
    size = binding.number("d")
    even = size % 2 == 0 if isinstance(size, int) else getattr(size, "is_even", None)
    return None if even else f"head_dim {size} is {'odd' if even is False else 'not known to be even'}"


_TABLE = T("b|1 s d", "C")
_HEADS = {"q": T("b h s d"), "k": T("b hk s d"), "cos": _TABLE, "sin": _TABLE}


def _whole(interleaved: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda q, k, cos, sin: ops.rope(q, k, cos, sin, cos.shape[-1], interleaved)


RULES = (
    *(rule(pattern, _whole(False), _HEADS, guard=_even) for pattern in (llama_rope, upcast_rope)),
    *(rule(pattern, _whole(True), _HEADS) for pattern in (paired_rope, cohere_rope)),
    rule(
        partial_rope,
        lambda q, k, cos, sin, rotary: ops.rope(q, k, cos, sin, rotary),
        carry=("interleaved",),
        q=T("b h s d"),
        k=T("b hk s d"),
        cos=T("b|1 s rotary", "C"),
        sin=T("b|1 s rotary", "C"),
        rotary=Int(6),
    ),
)
