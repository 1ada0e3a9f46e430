"""RMS norm and residual add + RMS norm, on CPU by torch's own kernels."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from graphopt.graph import arg, dtype, is_tensor, number
from graphopt.kernel import Case, Kernel, Tensor, never
from graphopt.ops.define import wide

# F.rms_norm is one call but several passes. Up to this many elements calls cost more than passes (8.3
# against 9.4 us for 1 x 2048 in fp32); beyond, vector_norm's single pass wins (97 against 77 us for 256 x
# 2048; bf16 720 against 290).
FEW = 8192


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_scale: bool = True,
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, x [..., D]; rounded once, whichever way eager rounds."""
    if x.numel() <= FEW:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=wide(x.dtype))
    inverse = norm.mul_(norm).mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    if x.dtype == inverse.dtype:
        y = x * inverse
        return y if weight is None else y.mul_(weight)
    y = x.to(inverse.dtype).mul_(inverse).to(x.dtype)
    return y if weight is None else y.mul_(weight)


def refuses(node: fx.Node) -> str | None:
    """Mixed dtypes and shifted weights: F.rms_norm knows neither."""
    weight = arg(node, "weight")
    if not is_tensor(weight):
        return None
    offset = number(arg(node, "weight_offset"))
    if offset != 0:
        return f"weight_offset {offset} != 0"
    if dtype(weight) != dtype(node.args[0]):  # type: ignore[arg-type]  # both are nodes
        return f"weight is {dtype(weight)}, x is {dtype(node.args[0])}"  # type: ignore[arg-type]  # both are nodes
    return None


def rms_norm_mixed(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_scale: bool = True,
) -> torch.Tensor:
    """The reference's arithmetic with the intermediates written in place: any dtypes, any offset."""
    h = x.to(wide(x.dtype))
    inverse = (h * h).mean(-1, keepdim=True).add_(eps).rsqrt_()
    h = h * inverse if h is x else h.mul_(inverse)
    if weight is None:
        return h.to(x.dtype)
    if cast_before_scale:
        return (weight + weight_offset if weight_offset else weight) * h.to(x.dtype)
    scale = weight.to(h.dtype)
    return h.mul_(scale + weight_offset if weight_offset else scale).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_scale: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """total = x + residual -> (rms_norm(total), total)."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def add_refuses(node: fx.Node) -> str | None:
    """As `refuses`, and sums of two dtypes."""
    x, residual = node.args[0], node.args[1]
    if dtype(x) != dtype(residual):  # type: ignore[arg-type]  # both are nodes
        return f"residual is {dtype(residual)}, x is {dtype(x)}"  # type: ignore[arg-type]  # both are nodes
    return refuses(node)


def add_rms_norm_mixed(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_scale: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` for any dtypes and offsets."""
    total = x + residual
    return rms_norm_mixed(total, weight, eps, weight_offset, cast_before_scale), total


CASES = (
    Case("tidy", (Tensor((2, 8, 64)), Tensor((64,)), 1e-6)),
    Case("ugly", (Tensor((3, 7, 123)), Tensor((123,)), 1e-5, 0.0, False)),
    Case("large", (Tensor((2, 64, 512)), Tensor((512,)), 1e-6)),
    Case("no weight", (Tensor((2, 5, 48)), None, 1e-6)),
    Case("one row", (Tensor((1, 1, 96)), Tensor((96,)), 1e-6)),
    Case("one column", (Tensor((3, 1)), Tensor((1,)), 1e-6)),
    Case("heads", (Tensor((2, 4, 5, 16), layout="transposed"), Tensor((16,)), 1e-6)),
    Case("sliced", (Tensor((2, 5, 24), layout="sliced"), Tensor((24,)), 1e-6)),
    Case("expanded", (Tensor((300, 64), layout="expanded"), Tensor((64,)), 1e-6)),
    Case("no rows", (Tensor((0, 5, 24)), Tensor((24,)), 1e-6)),
    Case("16k", (Tensor((2, 16384)), Tensor((16384,)), 1e-6)),
)
MIXED = (
    Case("shifted", (Tensor((2, 7, 48)), Tensor((48,)), 1e-6, 1.0, False)),
    Case("shifted, cast before", (Tensor((2, 7, 48)), Tensor((48,)), 1e-6, 1.0, True)),
    Case("fp32 weight", (Tensor((2, 7, 48)), Tensor((48,), torch.float32), 1e-6)),
    Case("fp32 weight, cast after", (Tensor((2, 7, 48)), Tensor((48,), torch.float32), 1e-6, 1.0, False)),
)
ADD_CASES = tuple(case.with_residual() for case in CASES)
ADD_MIXED = tuple(case.with_residual() for case in MIXED)

KERNELS = (
    Kernel("rms_norm", "rms_norm_torch", rms_norm, refuses, "cpu", CASES, CASES),
    Kernel("rms_norm", "rms_norm_mixed", rms_norm_mixed, never, "cpu", CASES + MIXED, CASES + MIXED),
    Kernel("add_rms_norm", "add_rms_norm_torch", add_rms_norm, add_refuses, "cpu", ADD_CASES, ADD_CASES),
    Kernel("add_rms_norm", "add_rms_norm_mixed", add_rms_norm_mixed, never, "cpu", ADD_CASES + ADD_MIXED),
)
