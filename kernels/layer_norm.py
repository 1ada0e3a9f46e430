"""Layer norm and residual add + layer norm, on CPU by torch's fused kernel."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.graph import arg, argument_names, dtype
from graphopt.kernel import Case, Kernel, Tensor


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension; statistics in fp32."""
    return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """total = x + residual -> (layer_norm(total), total)."""
    total = x + residual
    return torch.layer_norm(total, total.shape[-1:], weight, bias, eps), total


def refuses(node: fx.Node) -> str | None:
    """Dtypes that torch's kernel does not mix."""
    x = arg(node, "x")
    assert isinstance(x, fx.Node)
    for name in argument_names(node.target)[1:-1]:
        other = arg(node, name)
        if isinstance(other, fx.Node) and dtype(other) != dtype(x):
            return f"{name} is {dtype(other)}, x is {dtype(x)}"
    return None


CASES = (
    Case("tidy", (Tensor((2, 8, 64)), Tensor((64,)), Tensor((64,)), 1e-5)),
    Case("ugly", (Tensor((3, 7, 123)), Tensor((123,)), Tensor((123,)), 1e-12)),
    Case("no bias", (Tensor((2, 5, 48)), Tensor((48,)), None, 1e-5)),
    Case("no weight", (Tensor((2, 5, 48)), None, None, 1e-5)),
    Case("bias alone", (Tensor((2, 5, 48)), None, Tensor((48,)), 1e-5)),
    Case("one row", (Tensor((1, 96)), Tensor((96,)), Tensor((96,)), 1e-5)),
    Case("one column", (Tensor((3, 1)), Tensor((1,)), Tensor((1,)), 1e-5)),
    Case("heads", (Tensor((2, 4, 5, 16), layout="transposed"), Tensor((16,)), Tensor((16,)), 1e-5)),
    Case("sliced", (Tensor((2, 5, 24), layout="sliced"), Tensor((24,)), Tensor((24,)), 1e-5)),
    Case("no rows", (Tensor((0, 5, 24)), Tensor((24,)), Tensor((24,)), 1e-5)),
    Case("16k", (Tensor((2, 16384)), Tensor((16384,)), Tensor((16384,)), 1e-5)),
)
ADD_CASES = tuple(case.with_residual() for case in CASES)

KERNELS = (
    Kernel("layer_norm", "layer_norm_torch", layer_norm, refuses, "cpu", CASES, CASES),
    Kernel("add_layer_norm", "add_layer_norm_torch", add_layer_norm, refuses, "cpu", ADD_CASES, ADD_CASES),
)
