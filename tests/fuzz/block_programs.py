"""Norms, activations, linears and caches as they are written and as they are almost written."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.fuzz.script import Script

SIZES = ((4, 4, 4), (2, 3, 8), (1, 1, 6), (3, 1, 4), (2, 0, 4), (2, 5, 1))  # batch, length, width
OTHER = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}


def block(s: Script) -> object:
    """A residual, a norm, an MLP and a residual"""
    x = s.input("x", *s.vary("sizes", *SIZES))
    if s.pick("x lies", "plain", "turned") == "turned":
        x = x.mT.contiguous().mT
    total = added(s, "residual", x)
    h = normed(s, "norm", total)
    out = projected(s, "mlp", h)
    if s.vary("residual behind", True, False) and out.shape[-1] == total.shape[-1]:
        out = out + total
    also = s.pick("also given", "nothing", "total", "h")
    return out if also == "nothing" else (out, total if also == "total" else h)


def norm_of_norm(s: Script) -> object:
    """Two norms with a residual between them"""
    x = s.input("x", *s.vary("sizes", *SIZES))
    h = normed(s, "first", x)
    total = added(s, "residual", h)
    return normed(s, "second", total), total


def siblings(s: Script) -> object:
    """Projections of one input that may be merged, and what becomes of each"""
    batch, length, width = s.vary("sizes", *SIZES)
    x = s.input("x", batch, length, width)
    first = linear(s, "one", x, s.vary("width one", 4, 8, 1))
    second = linear(s, "two", s.pick("reads", x, x * 1.0, x + 1.0), s.vary("width two", 4, 6, 8))
    third = linear(s, "three", x, s.vary("width three", 4, 8, 1))
    if s.pick("tied", False, True):
        third = F.linear(x, s.weight("one weight", 1))
    use = s.vary("then", "given", "gated", "joined", "split", "summed")
    if use == "gated":
        return F.silu(first) * second, third
    if use == "joined":
        return torch.cat([first, second, third], -1)
    if use == "split":
        return [part + 1 for part in second.chunk(2, -1)], first, third
    return (first + third, second) if use == "summed" else (first, second, third)


def written_cache(s: Script) -> object:
    """A cache that is written or grown, then attended to"""
    batch, heads, length, width = s.vary("sizes", (4, 4, 4, 4), (2, 2, 3, 8), (1, 2, 1, 4))
    room = s.vary("room", length, length + 3)
    cache = s.input("cache", batch, heads, room, width)
    new = s.input("new", batch, heads, length, width)
    q = s.input("q", batch, heads, length, width)
    how = s.pick("grown by", "index_copy", "cat", "cat in front", "cat of heads", "index", "add")
    position = s.pick("position", 0, 1) + torch.arange(length)
    if how == "index_copy":
        keys = cache.index_copy(s.pick("written along", 2, 1), position, new)
    elif how == "cat":
        keys = torch.cat([cache, new], 2)
    elif how == "cat in front":
        keys = torch.cat([new, cache], 2)
    elif how == "cat of heads":
        keys = torch.cat([cache, new], 1).unflatten(1, (2, heads)).sum(1)
    elif how == "index":
        keys = cache.clone()
        keys[:, :, position] = new
    else:
        keys = cache.index_add(2, position, new)
    scores = q @ keys.mT * 0.5
    seen = torch.arange(keys.shape[2]) <= torch.arange(length)[:, None] + s.pick("past", room, 0, 2)
    out = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ keys
    return (s.pick("gives", True, False) and (out, keys)) or out


def added(s: Script, name: str, x: Tensor) -> Tensor:
    """x and a residual, or almost."""
    how = s.pick(name, "sum", "none", "alpha", "difference", "itself", "broadcast", "number", "other dtype")
    if how == "none":
        return x
    if how == "itself":
        return x + x
    if how == "number":
        return x + 0.5
    shape = (1, 1, x.shape[-1]) if how == "broadcast" else x.shape
    other = s.input(f"{name} y", *shape, dtype=OTHER.get(s.dtype) if how == "other dtype" else None)
    if how == "alpha":
        return torch.add(x, other, alpha=2)
    return x - other if how == "difference" else s.pick(f"{name} order", x + other, other + x)


def normed(s: Script, name: str, x: Tensor) -> Tensor:
    """A norm over the last dimension, or almost."""
    how = s.vary(name, "rms", "layer", "torch layer", "torch rms", "none")
    width = x.shape[-1]
    eps = s.pick(f"{name} eps", 1e-2, 1e-6, 0.0)
    if how == "none":
        return x
    if how == "torch layer":
        weights = s.vary(f"{name} affine", True, False)
        w, b = (s.weight(f"{name} {p}", width) for p in "wb") if weights else (None, None)
        return F.layer_norm(x, (width,), w, b, eps)
    if how == "torch rms":
        return F.rms_norm(x, (width,), s.weight(f"{name} w", width), s.pick(f"{name} torch eps", eps, None))
    over = s.pick(f"{name} over", -1, 2, 1, 0)
    h = x.float() if s.vary(f"{name} wide", True, False) and x.dtype != torch.float64 else x
    if how == "layer":
        h = h - h.mean(s.pick(f"{name} centred over", over, -1, 1), keepdim=True)
    kind = s.vary(f"{name} square", "pow", "times", "var", "abs", "other")
    squares = {
        "pow": lambda: h.pow(2).mean(over, keepdim=True),
        "times": lambda: (h * h).mean(over, keepdim=True),
        "var": lambda: x.to(h.dtype).var(
            over, keepdim=True, unbiased=s.pick(f"{name} unbiased", False, True)
        ),
        "abs": lambda: h.abs().mean(over, keepdim=True),
        "other": lambda: s.input(f"{name} other", *x.shape).to(h.dtype).pow(2).mean(over, keepdim=True),
    }
    square = squares[kind]()
    if s.pick(f"{name} of a sum", False, True):
        square = square * x.shape[over]
    root = s.vary(f"{name} root", "rsqrt", "sqrt", "pow", "eps outside")
    if root == "rsqrt":
        h = h * torch.rsqrt(square + eps)
    elif root == "sqrt":
        h = h / torch.sqrt(square + eps)
    elif root == "pow":
        h = h * (square + eps).pow(s.pick(f"{name} power", -0.5, -1.0))
    else:
        h = h / (torch.sqrt(square) + eps)
    return _weighted(s, name, h, x)


def _weighted(s: Script, name: str, h: Tensor, x: Tensor) -> Tensor:
    """The scale and shift of a norm, before or after the cast back."""
    width, length = x.shape[-1], x.shape[-2]
    shape = s.pick(f"{name} weight shape", (width,), (1,), (length, width), (1, 1, width), (length, 1))
    dtype = s.vary(f"{name} weight dtype", s.dtype, OTHER.get(s.dtype, s.dtype))
    w = s.weight(f"{name} w", *shape, dtype=dtype)
    how = s.pick(f"{name} weighted", "after", "before", "offset", "not", "divided", "minus")
    results = {
        "after": lambda: w * h.to(x.dtype),
        "before": lambda: (w.float() * h).to(x.dtype),
        "offset": lambda: (h * (1.0 + w.float())).to(x.dtype),
        "not": lambda: h.to(x.dtype),
        "divided": lambda: h.to(x.dtype) / (w.abs() + 1),
        "minus": lambda: (h * (1.0 - w.float())).to(x.dtype),
    }
    out = results[how]()
    return out + s.weight(f"{name} b", width) if s.vary(f"{name} biased", False, True) else out


def projected(s: Script, name: str, x: Tensor) -> Tensor:
    """An MLP, gated or not, or almost."""
    inner = s.pick(f"{name} inner", 6, 4, 1)
    gate = linear(s, f"{name} gate", x, inner)
    how = s.vary(f"{name} is", "gated", "plain", "halves", "own gate", "late", "thin gate")
    if how == "plain":
        h = activated(s, name, gate)
    elif how == "halves":
        parts = linear(s, f"{name} both", x, 2 * inner).chunk(2, -1)
        h = activated(s, name, parts[s.pick(f"{name} first", 0, 1)]) * parts[1]
    elif how == "own gate":
        h = activated(s, name, gate) * gate
    elif how == "thin gate":
        h = activated(s, name, linear(s, f"{name} thin", x, 1)) * gate
    else:
        up = linear(s, f"{name} up", x, inner)
        h = activated(s, name, gate * up) if how == "late" else activated(s, name, gate) * up
    return linear(s, f"{name} down", h, x.shape[-1])


def activated(s: Script, name: str, x: Tensor) -> Tensor:
    """An activation, or almost."""
    root = math.sqrt(2 / math.pi)
    factor = s.pick(f"{name} factor", 0.5, 1.0)
    shift = s.pick(f"{name} shift", 1.0, 0.5)
    cube = s.pick(f"{name} cube", 0.044715, 0.0447, 0.04)
    power = s.pick(f"{name} exponent", 3.0, 2.0, 3)
    forms = {
        "silu": lambda: F.silu(x),
        "hand silu": lambda: x * torch.sigmoid(x),
        "scaled sigmoid": lambda: x * torch.sigmoid(s.pick(f"{name} 1.7", 1.702, 1.7, 1.0) * x),
        "gelu": lambda: F.gelu(x, approximate=s.pick(f"{name} approximate", "none", "tanh")),
        "erf": lambda: x * factor * (shift + torch.erf(x / math.sqrt(2.0))),
        "erf rounded": lambda: x * factor * (shift + torch.erf(x / 1.4142)),
        "tanh": lambda: factor * x * (shift + torch.tanh(root * (x + cube * torch.pow(x, power)))),
        "tanh of a product": lambda: factor * x * (shift + torch.tanh(x * root * (1.0 + cube * x * x))),
        "relu": lambda: F.relu(x),
        "relu2": lambda: F.relu(x).pow(s.pick(f"{name} power", 2, 3)),
        "relu product": lambda: F.relu(x) * x,
        "other's sigmoid": lambda: x * torch.sigmoid(x.flip(-1)),
        "none": lambda: x,
        "hardswish": lambda: F.hardswish(x),
        "softplus": lambda: F.softplus(x),
    }
    return forms[s.vary(f"{name} activation", *forms)]()


def linear(s: Script, name: str, x: Tensor, features: int) -> Tensor:
    """A projection in its spellings."""
    inner = x.shape[-1]
    how = s.vary(f"{name} spelled", "linear", "matmul", "conv1d", "addmm", "einsum", "sliced", "batched")
    biased = s.vary(f"{name} bias", False, True)
    if how == "conv1d":
        weight = s.weight(f"{name} turned", inner, features)
        flat = torch.addmm(s.weight(f"{name} b", features), x.reshape(-1, inner), weight)
        return flat.reshape(*x.shape[:-1], features)
    if how == "addmm":
        weight = s.weight(f"{name} turned", inner, features)
        bias = s.weight(f"{name} b", *s.pick(f"{name} bias shape", (features,), (1,), (1, features)))
        scale = {"beta": s.pick(f"{name} beta", 1, 2), "alpha": s.pick(f"{name} alpha", 1, 0.5)}
        return torch.addmm(bias, x.reshape(-1, inner), weight, **scale).reshape(*x.shape[:-1], features)
    if how == "batched":
        out = x @ s.weight(f"{name} stack", x.shape[0], inner, features)
    elif how == "sliced":
        whole = s.weight(f"{name} whole", 2 * features, inner)
        out = F.linear(x, whole[s.pick(f"{name} rows", slice(features), slice(0, None, 2))])
    else:
        weight = s.weight(f"{name} weight", features, inner)
        if how == "matmul":
            out = x @ (weight.t() if s.pick(f"{name} turn", True, False) else weight)
        elif how == "einsum":
            out = torch.einsum("...i,oi->...o", x, weight)
        else:
            return F.linear(x, weight, s.weight(f"{name} b", features) if biased else None)
    return out + s.weight(f"{name} b", out.shape[-1]) if biased else out
