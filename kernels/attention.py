"""Attention on CPU: torch's flash kernel where it is good, two products around a softmax where it is not.

Masks come as one additive `bias` that all layers share: `lowering/masks` builds it from causal, offset,
window and padding.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from graphopt.attention_cases import case
from graphopt.graph import arg, dtype, number, shape
from graphopt.kernel import Kernel, Tensor
from graphopt.ops.define import wide

HALF = frozenset({torch.float16, torch.bfloat16})


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool = False,
    offset: int = 0,
    offset_tensor: torch.Tensor | None = None,
    window: int | None = None,
    key_padding: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    empty_rows_mean: bool = False,
) -> torch.Tensor:
    """torch's kernel, groups read in place (one query on 1024 keys: 169 us; on repeated k and v 4750)."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, bias, 0.0, causal, scale=scale, enable_gqa=grouped)


def one_query(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool = False,
    offset: int = 0,
    offset_tensor: torch.Tensor | None = None,
    window: int | None = None,
    key_padding: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    empty_rows_mean: bool = False,
) -> torch.Tensor:
    """One query in half precision: the heads of a group become the rows that torch's kernel wants.

    With one row it does not use the matrix units: 32 heads of 64 on 1024 keys in bf16 take 1510 us, with 8
    kv heads folded 148 us; without groups, products in fp32 take 310.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    if kv_heads == heads:
        scores = torch.matmul(q.to(torch.float32) * scale, k.to(torch.float32).transpose(2, 3))
        return torch.matmul(_softmax(scores, bias).to(q.dtype), v)
    if bias is not None and bias.dim() > 2 and bias.shape[-3] != 1:
        bias = bias[(None,) * (4 - bias.dim())]
        bias = bias.reshape(bias.shape[0], kv_heads, heads // kv_heads, bias.shape[3])
    folded = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    out = F.scaled_dot_product_attention(folded, k, v, bias, 0.0, scale=scale)
    return out.reshape(batch, heads, 1, v.shape[3])


def composed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool = False,
    offset: int = 0,
    offset_tensor: torch.Tensor | None = None,
    window: int | None = None,
    key_padding: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    empty_rows_mean: bool = False,
) -> torch.Tensor:
    """What torch's kernel does not know: softcap and sinks. Scores in fp32; v is read in its own dtype."""
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    rows = heads // kv_heads * queries
    grouped = q.reshape(batch, kv_heads, rows, head_dim).to(wide(q.dtype))
    scores = torch.matmul(grouped, k.to(grouped.dtype).transpose(2, 3)).mul_(scale)
    if softcap is not None:
        scores = scores.mul_(1.0 / softcap).tanh_().mul_(softcap)
    scores = scores.view(batch, heads, queries, keys)
    if sinks is None:
        weights = _softmax(scores, bias)
    else:
        if bias is not None:
            scores = scores.add_(bias)
        column = sinks.to(scores.dtype).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        weights = torch.softmax(torch.cat((scores, column), -1), -1).narrow(-1, 0, keys)
    weights = weights.to(v.dtype).reshape(batch, kv_heads, rows, keys)
    return torch.matmul(weights, v).view(batch, heads, queries, v.shape[3])


def _softmax(scores: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """softmax(scores + bias), with zeros in the rows that the bias hides whole (-inf everywhere)."""
    if bias is None:
        return torch.softmax(scores, -1)
    weights = torch.softmax(scores.add_(bias), -1)
    if bias.shape[-1] == 0:
        return weights
    # On the bias, which all heads share: torch's safe softmax looks at every score and takes three times as
    # long.
    return weights.masked_fill_(torch.isneginf(bias.amax(-1, True)), 0.0)


# ----------------------------------------------------------------------------------------------- refusals


def _needs_mask(node: fx.Node, causal_too: bool) -> str | None:
    """What must have been made a bias before: `lowering/masks` does."""
    for name in ("offset_tensor", "window", "key_padding"):
        if arg(node, name) is not None:
            return f"{name} is no part of a mask tensor yet"
    bias = arg(node, "bias")
    if isinstance(bias, fx.Node) and dtype(bias) == torch.bool:
        return "bias is torch.bool, not additive"
    if not arg(node, "causal"):
        return None
    if causal_too:
        return "causal is no part of a mask tensor yet"
    if number(arg(node, "offset")) != 0:
        return f"causal with offset {number(arg(node, 'offset'))} != 0"
    return "causal beside a bias" if bias is not None else None


def _unknown_parts(node: fx.Node) -> str | None:
    for name in ("softcap", "sinks"):
        if arg(node, name) is not None:
            return f"{name} is not None"
    return None


def _mixed_dtypes(node: fx.Node) -> str | None:
    q, k, v = node.args[:3]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    if dtype(k) != dtype(q) or dtype(v) != dtype(q):
        return f"q is {dtype(q)}, k {dtype(k)}, v {dtype(v)}"
    return None


def sdpa_refuses(node: fx.Node) -> str | None:
    """Softcap, sinks, and masks that are not one additive bias (a plain causal triangle it has itself)."""
    bias, q = arg(node, "bias"), node.args[0]
    assert isinstance(q, fx.Node)
    if isinstance(bias, fx.Node) and dtype(bias) not in (dtype(q), torch.float32, torch.bool):
        return f"bias is {dtype(bias)}, q is {dtype(q)}"
    return _unknown_parts(node) or _mixed_dtypes(node) or _needs_mask(node, causal_too=False)


def one_query_refuses(node: fx.Node) -> str | None:
    """More queries than one, and full precision."""
    q = node.args[0]
    assert isinstance(q, fx.Node)
    queries = shape(q)[2]
    if not isinstance(queries, int) or queries != 1:
        return f"{queries} queries, not 1"
    if dtype(q) not in HALF:
        return f"dtype {dtype(q)} is not half"
    return sdpa_refuses(node) or _needs_mask(node, causal_too=True)


def composed_refuses(node: fx.Node) -> str | None:
    """Masks that are not one additive bias."""
    return _mixed_dtypes(node) or _needs_mask(node, causal_too=True)


# -------------------------------------------------------------------------------------------------- cases


PLAIN = (
    case("tidy", queries=8, keys=8),
    case("ugly", heads=6, kv_heads=3, queries=5, keys=11, dim=20, batch=3),
    case("one head of 8", heads=8, kv_heads=1, queries=3, keys=9),
    case("wide values", value_dim=24),
    case("contiguous", layout="contiguous"),
    case("sliced", layout="sliced"),
    case("one batch, one head", heads=1, kv_heads=1, batch=1),
    case("one query", heads=4, kv_heads=2, queries=1, keys=13),
    case("one query, no groups", queries=1, keys=13),
    case("one key", keys=1),
    case("no query", queries=0),
    case("no batch", batch=0),
    case("bias", bias=Tensor((2, 1, 7, 7))),
    case("bias of heads", heads=4, kv_heads=2, bias=Tensor((1, 4, 7, 7))),
    case("bias of heads, one query", heads=4, kv_heads=2, queries=1, keys=9, bias=Tensor((1, 4, 1, 9))),
    case("bias of heads without a batch", heads=4, kv_heads=2, bias=Tensor((4, 1, 7))),
    case("bias of heads without a batch, one query", heads=4, kv_heads=2, queries=1, bias=Tensor((4, 1, 7))),
    case("bias of heads alone, one query", heads=4, kv_heads=1, queries=1, bias=Tensor((4, 1, 1))),
    case("bias of rows", heads=4, kv_heads=2, bias=Tensor((7, 7))),
    case("bias of keys, one query", heads=4, kv_heads=2, queries=1, keys=9, bias=Tensor((2, 1, 1, 9))),
    *(case(f"head_dim {d}", heads=2, kv_heads=2, queries=5, keys=6, dim=d) for d in (64, 80, 96, 128, 256)),
    *(case(f"groups of {g}", heads=8, kv_heads=8 // g, queries=5, keys=6) for g in (1, 4, 8)),
)
CAUSAL = (
    case("causal", causal=True),
    case("causal, more keys", heads=4, kv_heads=2, keys=11, causal=True),
    case("causal, fewer keys", keys=3, causal=True),
)
PARTS = (
    case("softcap", heads=4, kv_heads=2, softcap=3.0),
    case("sinks", heads=4, kv_heads=2, sinks=Tensor((4,))),
    case("softcap, sinks and bias", softcap=5.0, sinks=Tensor((4,)), bias=Tensor((1, 1, 7, 7))),
    case("one query, softcap", heads=4, kv_heads=1, queries=1, keys=9, softcap=2.0),
)

KERNELS = (
    Kernel(
        "attention", "attention_one_query", one_query, one_query_refuses, "cpu", PLAIN
    ),  # before sdpa: it is a special case
    Kernel("attention", "attention_sdpa", sdpa, sdpa_refuses, "cpu", PLAIN + CAUSAL, PLAIN + CAUSAL),
    Kernel(
        "attention", "attention_composed", composed, composed_refuses, "cpu", PLAIN + PARTS, PLAIN + PARTS
    ),
)
