"""Layers drawn node by node."""

from __future__ import annotations

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from tests.graphs import Builder, calls

aten = torch.ops.aten
LINEAR = ops.linear.overload
NORM = ops.rms_norm.overload


def linear(
    build: Builder,
    x: fx.Node,
    name: str,
    rows: int,
    columns: int,
    bias: bool = False,
    path: str | None = None,
) -> fx.Node:
    w = build.weight(f"{name}.weight", rows, columns)
    b = build.weight(f"{name}.bias", rows) if bias else None
    return build.call(LINEAR, x, w, b, path=name if path is None else path)


def mlp(build: Builder, x: fx.Node, name: str, wide: int, width: int = 6, bias: bool = False) -> fx.Node:
    up = linear(build, x, f"{name}.up", wide, width, bias)
    return linear(build, build.call(ops.activation.overload, up, "silu"), f"{name}.down", width, wide, bias)


def weights_of(gm: fx.GraphModule) -> list[tuple[int, ...]]:
    """The shapes of the linears' weights."""
    return [tuple(map(int, g.shape(n.args[1]))) for n in calls(gm, LINEAR)]  # type: ignore[arg-type]  # nodes


def attention_of(build: Builder, q: fx.Node, k: fx.Node, v: fx.Node, width: int) -> fx.Node:
    out = build.call(ops.attention.overload, q, k, v, 0.3, True, path="block.attn")
    b, h, s, d = map(int, g.shape(out))
    laid = build.call(aten.permute.default, out, [0, 2, 1, 3])
    return linear(build, build.call(aten.reshape.default, laid, [b, s, h * d]), "block.o", width, h * d, True)


def heads(build: Builder, x: fx.Node, count: int, dim: int) -> fx.Node:
    b, s, _ = g.shape(x)
    split = build.call(aten.reshape.default, x, [b, s, count, dim])
    return build.call(aten.permute.default, split, [0, 2, 1, 3])


def grouped(query_heads: int, kv_heads: int, dim: int) -> fx.GraphModule:
    """Attention of a block with fewer kv heads than query heads."""
    build = Builder()
    x = build.input("x", 2, 5, 6)
    counts = {"q": query_heads, "k": kv_heads, "v": kv_heads}
    q, k, v = (
        heads(build, linear(build, x, f"block.{n}", count * dim, 6), count, dim)
        for n, count in counts.items()
    )
    return build.done(attention_of(build, q, k, v, 6))
