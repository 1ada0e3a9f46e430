"""Experts on CPU: rows sorted by the expert that they choose, two ATen products for each that is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from graphopt.kernel import Case, Kernel, Tensor, never
from graphopt.ops.define import wide
from graphopt.ops.mlp import ACTIVATIONS


def _hit(ids: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that is chosen, with the places of the flat ids that choose it; others are left out."""
    values, order = torch.sort(ids.reshape(-1))
    ends = torch.searchsorted(values, torch.arange(experts + 1)).tolist()
    for e in range(experts):
        if ends[e] < ends[e + 1]:
            yield e, order[ends[e] : ends[e + 1]]


def _of(x: torch.Tensor | None, e: int) -> torch.Tensor | None:
    return None if x is None else x[e]


def expert_matmul(
    x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x[s] @ weight[ids[s]] + bias[ids[s]]; `x`, `weight` and `bias` of one dtype."""
    result = x.new_zeros((x.shape[0], weight.shape[2]))
    for e, rows in _hit(ids, weight.shape[0]):
        result[rows] = F.linear(x[rows], weight[e].mT, _of(bias, e))
    return result


def experts(
    x: torch.Tensor,
    ids: torch.Tensor | None,
    routing: torch.Tensor | None,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: str,
    gated: bool = True,
    interleaved: bool = False,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    limit: float | None = None,
    up_offset: float = 0.0,
    scale_input: bool = False,
    gate_softcap: float | None = None,
    up_softcap: float | None = None,
) -> torch.Tensor:
    """Routed MLPs: each chosen expert sees its rows once; the k results of a row are summed in fp32."""

    def expert(rows: torch.Tensor, e: int) -> torch.Tensor:
        h = F.linear(rows.to(x.dtype), gate_up[e], _of(gate_up_bias, e))
        if gated:
            h = _gated(h, kind, interleaved, limit, up_offset, gate_softcap, up_softcap)
        else:
            h = ACTIVATIONS[kind](h)
        return F.linear(h, down[e], _of(down_bias, e))

    if ids is None:
        return _summed(x, routing, down, expert, scale_input)
    tokens, chosen = ids.shape
    result = x.new_zeros((tokens * chosen, down.shape[1]))
    for e, places in _hit(ids, down.shape[0]):
        rows = x[places if chosen == 1 else places // chosen]
        if scale_input and routing is not None:
            rows = rows * routing.reshape(-1, 1)[places]
        result[places] = expert(rows, e)
    result = result.view(tokens, chosen, down.shape[1])
    if routing is not None and not scale_input:
        result = result * routing.unsqueeze(-1)
    return result.sum(1).to(x.dtype)


def _summed(
    x: torch.Tensor,
    routing: torch.Tensor | None,
    down: torch.Tensor,
    expert: Callable[[torch.Tensor, int], torch.Tensor],
    scale_input: bool,
) -> torch.Tensor:
    """Every row through every expert, summed in fp32 (fp64 for fp64)."""
    result = x.new_zeros((x.shape[0], down.shape[1]), dtype=wide(x.dtype))
    for e in range(down.shape[0]):
        share = 1 if routing is None else routing[:, e : e + 1]
        result += expert(x * share, e) if scale_input else expert(x, e) * share
    return result.to(x.dtype)


def _gated(
    h: torch.Tensor,
    kind: str,
    interleaved: bool,
    limit: float | None,
    up_offset: float,
    gate_softcap: float | None,
    up_softcap: float | None,
) -> torch.Tensor:
    """act(gate) * up, of halves or in turns; cut off, capped and shifted where asked for."""
    half = h.shape[-1] // 2
    gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else (h[..., :half], h[..., half:])
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if up_softcap is not None:
        up = torch.tanh(up / up_softcap) * up_softcap
    if up_offset != 0:
        up = up + up_offset
    if gate_softcap is not None:
        return torch.tanh(gate / gate_softcap).mul_(gate_softcap).mul_(torch.sigmoid(gate)).mul_(up)
    return ACTIVATIONS[kind](gate).mul_(up)


def _weights(experts: int, rows: int, inner: int, width: int, out: int) -> tuple[Tensor, Tensor]:
    return Tensor((experts, rows, width), scale=width**-0.5), Tensor((experts, out, inner), scale=inner**-0.5)


def _ids(tokens: int, chosen: int, experts: int) -> Tensor:
    return Tensor((tokens, chosen), dtype=torch.int64, below=experts)


PRODUCT_CASES = (
    Case("tidy", (Tensor((16, 64)), Tensor((4, 64, 32), scale=0.125), Tensor((16,), torch.int64, below=4))),
    Case(
        "ugly",
        (
            Tensor((7, 51)),
            Tensor((5, 51, 123), scale=0.14),
            Tensor((7,), torch.int64, below=3),
            Tensor((5, 123)),
        ),
    ),
    Case("one row", (Tensor((1, 24)), Tensor((8, 24, 10), scale=0.2), Tensor((1,), torch.int64, below=8))),
    Case("no rows", (Tensor((0, 24)), Tensor((8, 24, 10)), Tensor((0,), torch.int64, below=8))),
)
CASES = (
    Case("tidy", (Tensor((16, 64)), _ids(16, 2, 8), Tensor((16, 2)), *_weights(8, 64, 32, 64, 64), "silu")),
    Case(
        "ugly, biases",
        (
            *(Tensor((7, 51)), _ids(7, 3, 5), Tensor((7, 3)), *_weights(5, 26, 13, 51, 123), "gelu"),
            *(True, False, Tensor((5, 26)), Tensor((5, 123))),
        ),
    ),
    Case(
        "in turns, with a limit",
        (
            *(Tensor((6, 24)), _ids(6, 2, 4), Tensor((6, 2)), *_weights(4, 20, 10, 24, 24), "quick_gelu"),
            *(True, True, Tensor((4, 20)), Tensor((4, 24)), 1.5, 1.0),
        ),
    ),
    Case("not gated", (Tensor((5, 24)), _ids(5, 2, 4), None, *_weights(4, 10, 10, 24, 24), "relu2", False)),
    Case(
        "every expert, scaled input",
        (
            *(Tensor((6, 24)), None, Tensor((6, 4)), *_weights(4, 20, 10, 24, 24), "silu"),
            *(True, False, None, None, None, 0.0, True),
        ),
    ),
    Case(
        "every expert",
        (
            *(Tensor((5, 24)), None, Tensor((5, 4)), *_weights(4, 20, 10, 24, 24), "gelu"),
            True,
            False,
            Tensor((4, 20)),
            Tensor((4, 24)),
        ),
    ),
    Case(
        "softcaps",
        (
            *(Tensor((6, 24)), _ids(6, 2, 4), Tensor((6, 2)), *_weights(4, 20, 10, 24, 24), "silu"),
            *(True, False, None, None, None, 0.0, False, 1.5, 2.5),
        ),
    ),
    Case(
        "scaled input",
        (
            *(Tensor((7, 24)), _ids(7, 2, 4), Tensor((7, 2)), *_weights(4, 20, 10, 24, 24), "silu"),
            *(True, False, None, None, None, 0.0, True),
        ),
    ),
    Case("one token", (Tensor((1, 24)), _ids(1, 1, 4), Tensor((1, 1)), *_weights(4, 20, 10, 24, 24), "silu")),
    Case("no tokens", (Tensor((0, 24)), _ids(0, 2, 4), Tensor((0, 2)), *_weights(4, 20, 10, 24, 24), "silu")),
)

KERNELS = (
    Kernel("experts", "experts_sorted", experts, never, "cpu", CASES, CASES),
    Kernel(
        "expert_matmul", "expert_matmul_sorted", expert_matmul, never, "cpu", PRODUCT_CASES, PRODUCT_CASES
    ),
)
