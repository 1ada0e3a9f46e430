"""Mixtures of experts: a product with a matrix that each row chooses, and routed MLPs on stacked weights."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.ops.define import op, require_floating, require_rank, require_size, wide
from graphopt.ops.mlp import act, require_kind


def _require_ids(name: str, ids: Tensor, rank: int, rows: int) -> None:
    """Raise ValueError unless ids are int64 of that rank, one entry (or row) for each row of x."""
    if ids.dtype != torch.int64:
        raise ValueError(f"{name}: ids is {ids.dtype}; it must be torch.int64")
    require_rank(name, rank, ids=ids)
    require_size(name, "rows of ids", ids.shape[0], rows)


def _empty(sizes: Callable[..., tuple[int, int]]) -> Callable[..., Tensor]:
    """The fake of an op whose result has x's dtype and these sizes of the arguments."""

    @functools.wraps(sizes)  # for the names of the arguments
    def fake(x: Tensor, *others: object) -> Tensor:
        return x.new_empty(sizes(x, *others))

    return fake


def _product_sizes(x: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """[S, N]. Raises ValueError for what does not fit together."""
    name = "expert_matmul"
    require_floating(name, x=x, weight=weight)
    require_rank(name, 2, x=x)
    require_rank(name, 3, weight=weight)
    _require_ids(name, ids, 1, x.shape[0])
    require_size(name, "last size of x", x.shape[1], weight.shape[1])
    if bias is not None:
        require_rank(name, 2, bias=bias)
        require_size(name, "experts of bias", bias.shape[0], weight.shape[0])
        require_size(name, "last size of bias", bias.shape[1], weight.shape[2])
    return x.shape[0], weight.shape[2]


@op(fake=_empty(_product_sizes))
def expert_matmul(x: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[s] @ weight[ids[s]] + bias[ids[s]]: each row is multiplied with the matrix that it chooses.

    x [S, K], weight [E, K, N], ids [S] int64, bias [E, N] or None -> [S, N], in x's dtype; computed in fp32
    (fp64 for fp64). A row whose id is outside 0 .. E - 1 gives zeros. Every row is multiplied with every
    matrix and the right product kept: E times the work of a kernel, but no size depends on the values.

    Source: torch._grouped_mm (rows sorted by id), batched_mm_experts_forward in transformers.
    Raises ValueError where ranks or sizes do not fit, or ids are not int64.
    """
    sizes = _product_sizes(x, weight, ids, bias)
    dtype = wide(x.dtype)
    h = x.to(dtype)
    result = h.new_zeros(sizes)
    for e in range(weight.shape[0]):
        y = h @ weight[e].to(dtype)
        if bias is not None:
            y = y + bias[e].to(dtype)
        result = torch.where((ids == e).unsqueeze(-1), y, result)
    return result.to(x.dtype)


def _experts_sizes(
    x: Tensor,
    ids: Tensor | None,
    routing: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    kind: str,
    gated: bool,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_softcap: float | None,
) -> tuple[int, int]:
    """[T, N]. Raises ValueError for what does not fit together."""
    name = "experts"
    require_kind(kind)
    if gate_softcap is not None and not (gated and kind == "silu"):
        raise ValueError(f"{name}: gate_softcap is for a gated silu, not for {kind}")
    require_floating(name, x=x, gate_up=gate_up, down=down)
    require_rank(name, 2, x=x)
    require_rank(name, 3, gate_up=gate_up, down=down)
    if ids is not None:
        _require_ids(name, ids, 2, x.shape[0])
    if routing is not None:
        require_floating(name, routing=routing)
        require_rank(name, 2, routing=routing)
        require_size(name, "rows of routing", routing.shape[0], x.shape[0])
        columns = down.shape[0] if ids is None else ids.shape[1]
        require_size(name, "columns of routing", routing.shape[1], columns)
    require_size(name, "last size of gate_up", gate_up.shape[2], x.shape[1])
    require_size(name, "experts of down", down.shape[0], gate_up.shape[0])
    require_size(name, "rows of gate_up", gate_up.shape[1], down.shape[2] * (2 if gated else 1))
    for which, bias, weight in (("gate_up_bias", gate_up_bias, gate_up), ("down_bias", down_bias, down)):
        if bias is not None:
            require_rank(name, 2, **{which: bias})
            require_size(name, f"experts of {which}", bias.shape[0], weight.shape[0])
            require_size(name, f"last size of {which}", bias.shape[1], weight.shape[1])
    return x.shape[0], down.shape[1]


@op(fake=_empty(_experts_sizes))
def experts(
    x: Tensor,
    ids: Tensor | None,
    routing: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    kind: str,
    gated: bool = True,
    interleaved: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float | None = None,
    up_offset: float = 0.0,
    scale_input: bool = False,
    gate_softcap: float | None = None,
    up_softcap: float | None = None,
) -> Tensor:
    """sum over j of routing[t, j] * f_e(x[t]), f_e(x) = down_e(act(gate_e(x)) * up_e(x)), e = ids[t, j].

    x [T, H], ids [T, k] int64, routing [T, k] or None (all 1), gate_up [E, 2 * I, H] (rows of gate, then rows
    of up; `interleaved`: in turns; not `gated`: [E, I, H], act(up(x)) alone), down [E, N, I], biases [E, 2 *
    I] and [E, N] -> [T, N], in x's dtype; computed in fp32 (fp64 for fp64). `limit` cuts gate off above and
    up on both sides, `up_offset` is added to up after that. An id outside 0 .. E - 1 adds nothing. Without
    ids every row goes through every expert, routing is [T, E]. `scale_input`: f_e(routing[t, j] * x[t]). A
    softcap c makes c * tanh(x / c) of up, and of what silu multiplies with sigmoid(gate).

    Every row goes through every expert and the chosen ones are kept: E / k times the work of a kernel, but no
    size depends on the values, so that it can be captured in a CUDA graph.

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks"; MixtralExperts, GptOssExperts (the
    limit), Llama4TextMoe (the scaled input) and Inkling2Experts (softcaps) in transformers; fused_moe in
    vLLM. Raises ValueError where ranks or sizes do not fit, ids are not int64, the kind is unknown or has no
    softcap.
    """
    sizes = _experts_sizes(x, ids, routing, gate_up, down, kind, gated, gate_up_bias, down_bias, gate_softcap)
    dtype = wide(x.dtype)
    h = x.to(dtype)
    result = h.new_zeros(sizes)

    def expert(rows: Tensor, e: int) -> Tensor:
        y = F.linear(rows, gate_up[e].to(dtype), None if gate_up_bias is None else gate_up_bias[e].to(dtype))
        y = expert_activation(y, kind, gated, interleaved, limit, up_offset, gate_softcap, up_softcap)
        return F.linear(y, down[e].to(dtype), None if down_bias is None else down_bias[e].to(dtype))

    for e in range(down.shape[0]):
        mine, shares = _shares(h, ids, routing, e)
        if not scale_input:
            y = expert(h, e) * torch.where(mine, shares, 0.0).sum(-1, keepdim=True)
            result = torch.where(mine.any(-1, keepdim=True), result + y, result)
            continue
        for j in range(mine.shape[1]):
            chosen, share = mine[:, j : j + 1], shares[:, j : j + 1]
            result = torch.where(chosen, result + expert(h * share, e), result)
    return result.to(x.dtype)


def _shares(h: Tensor, ids: Tensor | None, routing: Tensor | None, e: int) -> tuple[Tensor, Tensor]:
    """Which of its choices each row of h gives an expert, [T, k], and the routing weights of them."""
    mine = torch.ones_like(h[:, :1], dtype=torch.bool) if ids is None else ids == e
    if routing is None:
        return mine, torch.ones_like(mine, dtype=h.dtype)
    return mine, (routing[:, e : e + 1] if ids is None else routing).to(h.dtype)


def expert_activation(
    h: Tensor,
    kind: str,
    gated: bool,
    interleaved: bool,
    limit: float | None,
    up_offset: float,
    gate_softcap: float | None,
    up_softcap: float | None,
) -> Tensor:
    """What stands between an expert's two products, in h's dtype: h [.., 2 * I] (or [.., I]) -> [.., I]."""
    if not gated:
        return act(h, kind)
    half = h.shape[-1] // 2
    gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else (h[..., :half], h[..., half:])
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if up_softcap is not None:
        up = torch.tanh(up / up_softcap) * up_softcap
    if gate_softcap is not None:
        return torch.tanh(gate / gate_softcap) * gate_softcap * torch.sigmoid(gate) * (up + up_offset)
    return act(gate, kind) * (up + up_offset)
