"""Attention as it is written and as it is almost written, with what stands before and behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.fuzz.script import Script

# Batch, query heads, kv heads, queries, keys, head_dim. At equal sizes a wrong axis, too, runs in eager.
SIZES = (
    (4, 4, 4, 4, 4, 4),
    (2, 6, 2, 3, 5, 8),
    (1, 4, 1, 1, 7, 6),
    (3, 4, 4, 5, 5, 1),
    (4, 4, 2, 4, 4, 4),
    (1, 1, 1, 1, 1, 4),
    (2, 2, 2, 2, 2, 2),
    (2, 2, 1, 0, 3, 4),
)


def spelled_attention(s: Script) -> object:
    """softmax(mask(softcap(q k^T * scale))) v in its parts"""
    batch, heads, kv_heads, queries, keys, width = s.vary("sizes", *SIZES)
    q = layout(s, "q", (batch, heads, queries, width))
    k = layout(s, "k", (batch, kv_heads, keys, width))
    v = k if s.pick("v is k", False, True) else layout(s, "v", (batch, kv_heads, keys, width))
    if s.vary("rotated", False, True):
        q, k = rotated(s, q, k)
    q = scaled(s, "q scale", q)
    k, v = repeated(s, "k", k, heads), repeated(s, "v", v, heads)
    turned = s.pick("k turned by", "transpose", "permute", "cycle", "view", "not")
    k = {
        "transpose": lambda: k.transpose(2, 3),
        "permute": lambda: k.permute(0, 1, 3, 2),
        "cycle": lambda: k.permute(0, 2, 3, 1),
        "view": lambda: k.reshape(*k.shape[:2], k.shape[3], k.shape[2]),
        "not": lambda: k,
    }[turned]()
    product = s.pick("product", "matmul", "einsum", "baddbmm")
    if product == "matmul":
        scores = torch.matmul(q, k)
    elif product == "einsum":
        scores = torch.einsum("bhqd,bhdk->bhqk", q, k)
    else:
        flat = torch.zeros(1, 1, 1, dtype=q.dtype)
        alpha = s.pick("alpha", 0.5, 1.0)
        scores = torch.baddbmm(flat, q.flatten(0, 1), k.flatten(0, 1), beta=0, alpha=alpha)
        scores = scores.unflatten(0, q.shape[:2])
    scores = scaled(s, "scale", scores)
    if s.vary("softcap", False, True):
        cap = s.pick("cap", 5.0, -5.0, 0.25)
        scores = s.pick("squash", torch.tanh, torch.sigmoid)(scores / cap) * s.pick("uncap", cap, 5.0, 2.0)
    scores = masked(s, "mask", scores)
    if s.pick("two masks", False, True):
        scores = masked(s, "mask 2", scores)
    weights = weighed(s, scores)
    if s.pick("weights scaled", False, True):
        weights = weights * 0.5
    out = weights @ v
    return finished(s, out, scores, weights)


def fused_attention(s: Script) -> object:
    """torch's own operator, called in every way"""
    batch, heads, kv_heads, queries, keys, width = s.vary("sizes", *SIZES)
    q = layout(s, "q", (batch, heads, queries, width))
    k = layout(s, "k", (batch, kv_heads, keys, width))
    v = layout(s, "v", (batch, kv_heads, keys, s.pick("v width", width, 3)))
    q = scaled(s, "q scale", q)
    gqa = s.vary("enable_gqa", True, False)
    if not gqa:
        k, v = repeated(s, "k", k, heads), repeated(s, "v", v, heads)
    mask = None
    causal = s.vary("is_causal", False, True)
    if not causal and s.pick("has mask", True, False):
        shape = mask_shape(s, "mask", (batch, heads, queries, keys))
        kind = s.vary("mask kind", torch.bool, s.dtype)
        mask = s.input("mask", *shape, dtype=kind)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=s.pick("scale", None, 0.3, 1.0), enable_gqa=gqa
    )
    return finished(s, out, q, k)


def layout(s: Script, name: str, shape: tuple[int, ...]) -> Tensor:
    """A [batch, heads, length, width] tensor, in memory as models have it."""
    batch, heads, length, width = shape
    how = s.vary(f"{name} lies", "plain", "split heads", "packed", "expanded", "sliced", "turned")
    if how == "split heads":
        return s.input(name, batch, length, heads * width).view(batch, length, heads, width).transpose(1, 2)
    if how == "packed":
        packed = s.input(f"packed {name}", batch, length, 3, heads, width)
        return packed[:, :, s.vary(f"{name} part", 0, 1, 2)].transpose(1, 2)
    if how == "expanded":
        return s.input(name, 1, heads, length, width).expand(batch, -1, -1, -1)
    if how == "sliced":
        return s.input(name, batch, heads, length + 2, width * 2)[:, :, 1:-1, ::2]
    if how == "turned":
        return s.input(name, width, length, heads, batch).permute(3, 2, 1, 0)
    return s.input(name, *shape)


def scaled(s: Script, name: str, x: Tensor) -> Tensor:
    """x times or over a number, or a tensor of them."""
    usual = s.vary(f"{name}d", "not", "times", "over")
    how = s.pick(name, usual, "by head", "by column", "twice", "plus")
    number = s.pick(f"{name} is", 0.35, 2.0, -0.5, 0.0, 8) if how != "not" else 1.0
    if how == "times":
        return x * number
    if how == "over":
        return x / (number or 2.0)
    if how == "by head":
        return x * s.input(f"{name} heads", x.shape[1], 1, 1)
    if how == "by column":
        return x * s.input(f"{name} columns", x.shape[-1])
    if how == "twice":
        return x * number / 2.0
    return x + number if how == "plus" else x


def repeated(s: Script, name: str, x: Tensor, heads: int) -> Tensor:
    """kv heads as many as query heads; the right way is to repeat each, not all of them in a row."""
    groups = heads // x.shape[1]
    batch, kv_heads, length, width = x.shape
    how = s.vary("heads repeated by", "expand", "repeat_interleave", "not")
    if s.pick(f"{name} repeated otherwise", False, True):
        how = s.pick(f"{name} by", "tile", "expand in front", "repeat_interleave")
    if how == "expand":
        return x[:, :, None].expand(batch, kv_heads, groups, length, width).reshape(batch, -1, length, width)
    if how == "repeat_interleave":
        return x.repeat_interleave(groups, dim=1)
    if how == "tile":
        return x.repeat(1, groups, 1, 1)
    if how == "expand in front":
        return x[:, None].expand(batch, groups, kv_heads, length, width).reshape(batch, -1, length, width)
    return x


def mask_shape(s: Script, name: str, full: Sequence[int]) -> tuple[int, ...]:
    """A shape that broadcasts to the scores."""
    batch, heads, queries, keys = full
    shapes = {
        "bqk": (batch, 1, queries, keys),
        "bk": (batch, 1, 1, keys),
        "qk": (queries, keys),
        "bhqk": (batch, heads, queries, keys),
        "k": (keys,),
        "h": (heads, 1, 1),
        "q": (queries, 1),
        "hqk": (heads, queries, keys),
        "1": (1,),
    }
    return shapes[s.vary(f"{name} shape", *shapes)]


def masked(s: Script, name: str, scores: Tensor) -> Tensor:
    """Scores with some keys hidden, or almost."""
    queries, keys = scores.shape[-2:]
    lowest = torch.finfo(scores.dtype).min
    how = s.vary(name, "none", "causal", "added", "filled", "where", "window", "padding", "times")
    fill = s.vary(f"{name} fill", lowest, -torch.inf, -1e9, -1e4, 0.0) if how != "none" else 0.0
    rows, columns = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    late = s.pick(f"{name} shift", keys - queries, 0, 1, -1) if how in ("causal", "window") else 0
    if how in ("causal", "window"):
        seen = columns <= rows + late
        if how == "window":
            seen = seen & (columns > rows + late - s.pick(f"{name} width", 3, 1, 64))
        if s.pick(f"{name} turned round", False, True):
            seen = ~seen
        if s.pick(f"{name} with tril", False, True):
            seen = torch.ones(queries, keys, dtype=torch.bool).tril(late)
        seen = seen | (columns == 0)
    elif how == "padding":
        seen = s.input(f"{name} tokens", scores.shape[0], keys, dtype=torch.bool)[:, None, None, :]
        if s.pick(f"{name} at queries", False, True) and queries == keys:
            seen = (seen.mT | (columns == 0)) & (seen | (rows < 0))
            seen = seen | (columns == 0)
    elif how == "added":
        return scores + s.input(name, *mask_shape(s, name, scores.shape))
    elif how == "times":
        return scores * s.input(name, *mask_shape(s, name, scores.shape))
    elif how == "none":
        return scores
    else:
        seen = s.input(name, *mask_shape(s, name, scores.shape), dtype=torch.bool)
    if how == "where":
        return torch.where(seen, scores, fill)
    form = s.vary(f"{name} as", "filled", "where", "added", "hidden")
    if form == "added":
        zero = torch.zeros(seen.shape, dtype=scores.dtype)
        return scores + zero.masked_fill(~seen, fill)
    if form == "hidden":
        return torch.where(~seen, torch.tensor(fill, dtype=scores.dtype), scores)
    return scores.masked_fill(~seen, fill) if form == "filled" else torch.where(seen, scores, fill)


def weighed(s: Script, scores: Tensor) -> Tensor:
    """softmax over the keys, or almost."""
    how = s.pick("softmax", s.vary("wide softmax", "plain", "upcast"), "sinks", "sigmoid", "log", "sum")
    over = s.pick("softmax over", -1, 3, 2, 1)
    if how == "upcast":
        return torch.softmax(scores, over, dtype=torch.float32).to(scores.dtype)
    if how == "sinks":
        sink = s.input("sinks", scores.shape[1]).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, sink], -1), over)[..., : scores.shape[-1]]
    if how == "sigmoid":
        return torch.sigmoid(scores)
    if how == "log":
        return torch.log_softmax(scores, over)
    if how == "sum":
        powers = torch.exp(scores - scores.amax(-1, keepdim=True)) if scores.shape[-1] else scores
        return powers / powers.sum(over, keepdim=True)
    return torch.softmax(scores, over)


def rotated(s: Script, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of q and k, or almost; the tables are as long as q."""
    batch, _, length, width = q.shape
    rotary = s.pick("rotary", width, width // 2)
    shape = s.pick("table batch", 1, batch), length, s.pick("table width", rotary, 1)
    cos, sin = s.input("cos", *shape), s.input("sin", *shape)
    if s.pick("tables swapped for k", False, True):
        return turned(s, q, cos, sin, rotary), turned(s, k, sin, cos, rotary)
    return turned(s, q, cos, sin, rotary), turned(s, k, cos, sin, rotary)


def turned(s: Script, x: Tensor, cos: Tensor, sin: Tensor, rotary: int) -> Tensor:
    """x * cos + turn(x) * sin on the first `rotary` columns."""
    axis = s.pick("table axis", 1, 2)
    c, n = cos.unsqueeze(axis), sin.unsqueeze(axis)
    x, rest = x[..., :rotary], x[..., rotary:]
    half = s.pick("half", x.shape[-1] // 2, 1)
    how = s.pick("turn", "halves", "pairs", "halves kept", "other sign", "pairs other sign", "rolled")
    turns = {
        "halves": lambda: torch.cat((-x[..., half:], x[..., :half]), -1),
        "halves kept": lambda: torch.cat((x[..., half:], x[..., :half]), -1),
        "other sign": lambda: torch.cat((x[..., half:], -x[..., :half]), -1),
        "pairs": lambda: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2),
        "pairs other sign": lambda: torch.stack((x[..., 1::2], -x[..., ::2]), -1).flatten(-2),
        "rolled": lambda: x.roll(1, -1),
    }
    y = x * c + turns[how]() * n
    if s.pick("rope subtracts", False, True):
        y = x * c - turns[how]() * n
    return torch.cat((y, rest), -1)


def finished(s: Script, out: Tensor, *inner: Tensor) -> object:
    """Heads side by side, and what else the program gives away."""
    how = s.vary("heads joined", "transpose", "not", "reshape", "permute")
    batch, _, queries, _ = out.shape
    if how == "transpose":
        out = out.transpose(1, 2).reshape(batch, queries, -1)
    elif how == "reshape":
        out = out.reshape(batch, queries, -1)
    elif how == "permute":
        out = out.permute(0, 3, 1, 2)
    also = s.pick("also given", -1, *range(len(inner)))
    return out if also < 0 else (out, inner[also])
