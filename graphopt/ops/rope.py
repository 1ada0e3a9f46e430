"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ops.define import differ, op, require_floating, require_rank, require_size, wide


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> None:
    require_floating("rope", q=q, k=k, cos=cos, sin=sin)
    require_rank("rope", 4, q=q, k=k)
    require_rank("rope", 3, cos=cos, sin=sin)
    if isinstance(rotary_dim, int) and (rotary_dim < 0 or rotary_dim % 2):
        raise ValueError(f"rope: rotary_dim is {rotary_dim}; it must be even and not negative")
    for name, x in (("q", q), ("k", k)):
        if isinstance(rotary_dim, int) and isinstance(x.shape[-1], int) and rotary_dim > x.shape[-1]:
            raise ValueError(f"rope: rotary_dim {rotary_dim} > {x.shape[-1]}, the head_dim of {name}")
        for which, table in (("cos", cos), ("sin", sin)):
            if differ(table.shape[0], 1):
                require_size("rope", f"batch of {which}", table.shape[0], x.shape[0])
            require_size("rope", f"length of {which}", table.shape[1], x.shape[2])
            require_size("rope", f"last size of {which}", table.shape[2], rotary_dim)


def _rope_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    _check(q, k, cos, sin, rotary_dim)
    return q.new_empty(q.shape), k.new_empty(k.shape)


@op(fake=_rope_fake)
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """x -> x * cos + rotated(x) * sin, on the first `rotary_dim` columns of q and k; the others are copied.

    q [B, H, S, D], k [B, Hk, S, D], cos and sin [B or 1, S, rotary_dim]. Half-split (Llama): rotated(x) is
    cat(-x2, x1) of the two halves. Interleaved (GPT-J): each pair (x0, x1) becomes (-x1, x0), and cos and sin
    come repeated pairwise. Computed in fp32 (fp64 for fp64), each result in its input's dtype.

    Source: Su et al. 2021, "RoFormer", section 3.4.2; apply_rotary_pos_emb in transformers' Llama and GPT-J.
    Raises ValueError where ranks, lengths or batches do not fit, and where rotary_dim is odd or exceeds D.
    """
    _check(q, k, cos, sin, rotary_dim)
    return _rotate(q, cos, sin, rotary_dim, interleaved), _rotate(k, cos, sin, rotary_dim, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """One of the two results of `rope`."""
    dtype = wide(x.dtype)
    h = x[..., :rotary_dim].to(dtype)
    if interleaved:
        rotated = torch.stack((-h[..., 1::2], h[..., ::2]), -1).flatten(-2)
    else:
        half = rotary_dim // 2
        rotated = torch.cat((-h[..., half:], h[..., :half]), -1)
    turned = h * cos.to(dtype).unsqueeze(1) + rotated * sin.to(dtype).unsqueeze(1)
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), -1)  # a copy even where nothing is left over
