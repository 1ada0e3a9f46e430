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


def token_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As Llama's, of [batch, length, heads, head_dim] (Gemma 4, the indexers of sparse attention)"""
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    turned_q, turned_k = q * c + _half_turned(q) * s, k * c + _half_turned(k) * s
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def backward_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As Llama's, by the negative angles: x * cos + cat(x[half:], -x[:half]) * sin (NanoChat)"""
    c, s, half = cos.unsqueeze(1), sin.unsqueeze(1), q.shape[-1] // 2
    turned_q = q * c + torch.cat((q[..., half:], -q[..., :half]), dim=-1) * s
    turned_k = k * c + torch.cat((k[..., half:], -k[..., :half]), dim=-1) * s
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def paired_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring pairs are rotated; cos and sin come with each angle twice."""
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    turned_q, turned_k = q * c + _pair_turned(q) * s, k * c + _pair_turned(k) * s
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def roformer_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring pairs; cos and sin have a dimension for the heads already"""
    return q * cos + _pair_turned(q) * sin, k * cos + _pair_turned(k) * sin


def upcast_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As Llama's, in fp32 whatever q is."""
    turned_q, turned_k = llama_rope(q.float(), k.float(), cos, sin)
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def cohere_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring pairs, in fp32 whatever q is; cos and sin are in the model's dtype."""
    turned_q, turned_k = paired_rope(q.float(), k.float(), cos, sin)
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def glm_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring pairs; of tables that hold each angle twice, the first half is spread over the pairs."""
    half = cos.shape[-1] // 2
    c, s = _spread(cos.unsqueeze(1)[..., :half]), _spread(sin.unsqueeze(1)[..., :half])
    turned_q, turned_k = q * c + _pair_turned(q) * s, k * c + _pair_turned(k) * s
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def ernie_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As GLM's, multiplied in fp32 whatever q is; turned before that."""
    half = cos.shape[-1] // 2
    c, s = _spread(cos.unsqueeze(1)[..., :half]), _spread(sin.unsqueeze(1)[..., :half])
    turned_q = q.float() * c + _pair_turned(q).float() * s
    turned_k = k.float() * c + _pair_turned(k).float() * s
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def _spread(half: Tensor) -> Tensor:
    return half.repeat_interleave(2, dim=-1)


def gptj_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring pairs of [batch, length, heads, head_dim], then heads first; each angle once in tables"""
    c, s = _spread(cos.unsqueeze(2)), _spread(sin.unsqueeze(2))
    turned_q, turned_k = q * c + _pair_turned(q) * s, k * c + _pair_turned(k) * s
    return turned_q.transpose(1, 2), turned_k.transpose(1, 2)


def gptj_partial_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """As GPT-J's, on the first 2 * r dimensions of a head, the others pass"""
    rotary = 2 * r
    c, s = _spread(cos.unsqueeze(2)), _spread(sin.unsqueeze(2))
    turned = [x[..., :rotary] * c + _pair_turned(x[..., :rotary]) * s for x in (q, k)]
    whole_q, whole_k = (torch.cat((t, x[..., rotary:]), -1) for t, x in zip(turned, (q, k), strict=True))
    return whole_q.transpose(1, 2), whole_k.transpose(1, 2)


def gpt_oss_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin) of two halves; cos and sin hold each angle once"""
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    half = cos.shape[-1]
    turned_q = _turned_halves(q[..., :half], q[..., half:], c, s)
    turned_k = _turned_halves(k[..., :half], k[..., half:], c, s)
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def _turned_halves(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def deepseek_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs are neighbours before and halves after; of tables with each angle twice, one half is read"""
    c, s = cos[..., : cos.shape[-1] // 2].unsqueeze(1), sin[..., : sin.shape[-1] // 2].unsqueeze(1)
    turned_q = _turned_halves(q[..., ::2], q[..., 1::2], c, s)
    turned_k = _turned_halves(k[..., ::2], k[..., 1::2], c, s)
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def token_deepseek_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As DeepSeek's, of [batch, length, heads, head_dim] (GLM's indexer)"""
    c, s = cos[..., : cos.shape[-1] // 2].unsqueeze(2), sin[..., : sin.shape[-1] // 2].unsqueeze(2)
    turned_q = _turned_halves(q[..., ::2], q[..., 1::2], c, s)
    turned_k = _turned_halves(k[..., ::2], k[..., 1::2], c, s)
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def _multiplied(pairs: Tensor, turn: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(3)


def complex_rope(q: Tensor, k: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring pairs as complex numbers, times exp(i * angle) of [batch or 1, length, pairs]

    q and k come as pairs already, [batch, heads, length, pairs, 2], in fp32 (DeepSeek-V2).
    """
    return _multiplied(q, turn.unsqueeze(1)), _multiplied(k, turn.unsqueeze(1))


def complex_token_rope(q: Tensor, k: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """As DeepSeek-V2's, of [batch, length, heads, pairs, 2] (Llama 4)"""
    return _multiplied(q, turn.unsqueeze(2)), _multiplied(k, turn.unsqueeze(2))


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
_HEADS_LATER = {"q": T("b s h d"), "k": T("b s hk d"), "cos": _TABLE, "sin": _TABLE}
_HEADS = {"q": T("b h s d"), "k": T("b hk s d"), "cos": _TABLE, "sin": _TABLE}


def _whole(interleaved: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda q, k, cos, sin: ops.rope(q, k, cos, sin, cos.shape[-1], interleaved)


def _of_tokens(turned: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """What is turned with the heads first, of q and k that have the tokens first."""

    def tokens_first(q: Tensor, k: Tensor, **tables: Tensor) -> tuple[Tensor, Tensor]:
        turned_q, turned_k = turned(q.transpose(1, 2), k.transpose(1, 2), **tables)
        return turned_q.transpose(1, 2), turned_k.transpose(1, 2)

    return tokens_first


def _glm(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = _spread(cos[..., : cos.shape[-1] // 2]), _spread(sin[..., : sin.shape[-1] // 2])
    return ops.rope(q, k, cos, sin, q.shape[-1], True)


def _gptj(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rope(q.transpose(1, 2), k.transpose(1, 2), _spread(cos), _spread(sin), 2 * cos.shape[-1], True)


def _gpt_oss(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rope(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), q.shape[-1])


def _deepseek(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (torch.cat((x[..., ::2], x[..., 1::2]), -1) for x in (q, k))
    return _gpt_oss(q, k, cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2])


def _complex(q: Tensor, k: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = _spread(torch.real(turn)), _spread(torch.imag(turn))
    return ops.rope(q.flatten(3), k.flatten(3), cos, sin, cos.shape[-1], True)


_TURN = T("b|1 s r", "complex64")
_TOKENS = {"cos": T("b|1 s r"), "sin": T("b|1 s r")}
_ONCE = {"cos": T("b|1 s r", "C"), "sin": T("b|1 s r", "C")}

RULES = (
    *(rule(pattern, _whole(False), _HEADS, guard=_even) for pattern in (llama_rope, upcast_rope)),
    *(rule(pattern, _whole(True), _HEADS) for pattern in (paired_rope, cohere_rope)),
    rule(token_rope, _of_tokens(_whole(False)), _HEADS_LATER, guard=_even),
    rule(token_deepseek_rope, _of_tokens(_deepseek), _HEADS_LATER, guard=_even),
    rule(
        backward_rope,
        lambda q, k, cos, sin: ops.rope(q, k, cos, -sin, cos.shape[-1]),
        _HEADS,
        guard=_even,
    ),
    rule(
        roformer_rope,
        lambda q, k, cos, sin: ops.rope(q, k, cos[:, 0], sin[:, 0], cos.shape[-1], True),
        q=T("b h s d"),
        k=T("b hk s d"),
        cos=T("b|1 1 s d"),
        sin=T("b|1 1 s d"),
    ),
    *(rule(pattern, _glm, _HEADS, guard=_even) for pattern in (glm_rope, ernie_rope)),
    rule(deepseek_rope, _deepseek, _HEADS, guard=_even),
    rule(gpt_oss_rope, _gpt_oss, _ONCE, q=T("b h s 2*r"), k=T("b hk s 2*r")),
    rule(complex_rope, _complex, q=T("b h s r 2", "float32"), k=T("b hk s r 2", "float32"), turn=_TURN),
    rule(
        complex_token_rope,
        _of_tokens(_complex),
        q=T("b s h r 2", "float32"),
        k=T("b s hk r 2", "float32"),
        turn=_TURN,
    ),
    rule(gptj_rope, _gptj, _TOKENS, q=T("b s h 2*r"), k=T("b s hk 2*r")),
    rule(
        gptj_partial_rope,
        lambda q, k, cos, sin, r: _gptj(q, k, cos, sin),
        _TOKENS,
        q=T("b s h d"),
        k=T("b s hk d"),
        r=Int(3),
    ),
    # Half q and tables in fp32: what is turned is fp32, and so is the whole head.
    *(
        rule(
            gptj_partial_rope,
            lambda q, k, cos, sin, r: _gptj(q.float(), k.float(), cos, sin),
            q=T("b s h d", half),
            k=T("b s hk d", half),
            cos=T("b|1 s r", "float32"),
            sin=T("b|1 s r", "float32"),
            r=Int(3),
        )
        for half in ("bfloat16", "float16")
    ),
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
