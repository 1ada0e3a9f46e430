"""Linear layers on CPU by oneDNN and MKL through torch, with what follows them written in place."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from graphopt.graph import arg, dtype, is_tensor, same_shape, shape
from graphopt.kernel import Case, Kernel, Tensor, never
from graphopt.ops.mlp import act


def linear_epilogue(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """act(x @ weight^T + bias) * gate + residual; the product's own memory takes gate and residual."""
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = act(y, activation)
    if gate is not None:
        y = y.mul_(gate)
    return y if residual is None else y.add_(residual)


def refuses(node: fx.Node) -> str | None:
    """Gates and residuals that do not fit into the product's memory."""
    x, weight = arg(node, "x"), arg(node, "weight")
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    product = (*shape(x)[:-1], shape(weight)[0])
    for name in ("gate", "residual"):
        other = arg(node, name)
        if not is_tensor(other):
            continue
        assert isinstance(other, fx.Node)
        if dtype(other) != dtype(x):
            return f"{name} is {dtype(other)}, x is {dtype(x)}"
        if not same_shape(shape(other), product):
            return f"{name} is {tuple(shape(other))}, the product is {product}"
    return None


CASES = (
    Case("tidy", (Tensor((2, 8, 64)), Tensor((32, 64), scale=0.125), Tensor((32,)))),
    Case("ugly", (Tensor((3, 7, 51)), Tensor((123, 51), scale=0.14), None)),
    Case("one row", (Tensor((1, 1, 64)), Tensor((96, 64), scale=0.125), None)),
    Case("4096 rows", (Tensor((4096, 16)), Tensor((8, 16), scale=0.25), Tensor((8,)))),
    Case("sliced", (Tensor((2, 5, 24), layout="sliced"), Tensor((10, 24), scale=0.2), Tensor((10,)))),
    Case("part of a merged weight", (Tensor((2, 5, 24)), Tensor((10, 24), layout="sliced", scale=0.2), None)),
    Case("one column", (Tensor((2, 5, 24)), Tensor((1, 24), scale=0.2), None)),
    Case("no rows", (Tensor((0, 5, 24)), Tensor((10, 24)), Tensor((10,)))),
)
_X, _W, _B, _Y = Tensor((2, 7, 24)), Tensor((10, 24), scale=0.2), Tensor((10,)), Tensor((2, 7, 10))
EPILOGUES = (
    Case("nothing", (_X, _W, _B, None, None, None)),
    Case("activation", (_X, _W, _B, "gelu", None, None)),
    Case("gate", (_X, _W, None, "silu", _Y, None)),
    Case("residual", (_X, _W, _B, None, None, _Y)),
    Case("all", (_X, _W, _B, "gelu_tanh", _Y, _Y)),
)

KERNELS = (
    Kernel("linear", "linear_torch", F.linear, never, "cpu", CASES, CASES),
    Kernel("linear_epilogue", "linear_epilogue_torch", linear_epilogue, refuses, "cpu", EPILOGUES, EPILOGUES),
)
