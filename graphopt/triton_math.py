"""What Triton kernels share: activations in fp32, sums and scalings of norms, and how launchers walk rows.

No libdevice (the interpreter has none): tanh and sigmoid are made of exp.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import fx

from graphopt.graph import arg, dtype, is_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what kernels take; fp64 they would have to round

# -------------------------------------------------------------------------------------------- activations


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); x fp32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """2 * sigmoid(2x) - 1; x fp32. Absolute error 1e-7: exp overflows to inf, and 1 / inf is 0."""
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation of that kind (`graphopt.ops.mlp.ACTIVATIONS`; "" is none), elementwise; x fp32."""
    if KIND == "silu":
        x = x * sigmoid(x)
    elif KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == "quick_gelu":
        x = x * sigmoid(1.702 * x)
    elif KIND == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # not tl.maximum, which makes a nan 0
    elif KIND == "relu2":
        x = tl.where(x < 0.0, 0.0, x)
        x = x * x
    elif KIND == "sigmoid":
        x = sigmoid(x)
    elif KIND == "tanh":
        x = tanh(x)
    else:
        tl.static_assert(KIND == "", "unknown activation")
    return x


# -------------------------------------------------------------------------------------------------- norms


@triton.jit
def row_total(x_ptr, residual_ptr, total_ptr, x_at, residual_at, kept):
    """x, or x + residual rounded to the total's dtype where there is a total; fp32, 0 where not kept."""
    x = tl.load(x_ptr + x_at, mask=kept, other=0.0).to(tl.float32)
    if total_ptr is not None:
        x += tl.load(residual_ptr + residual_at, mask=kept, other=0.0).to(tl.float32)
        x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def rms_scaled(
    h, weight, weight_offset, DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr, CAST_BEFORE_SCALE: tl.constexpr
):
    """What `rms_norm` makes of a normalised row h and its weight, both fp32, with all its roundings; fp32.

    DTYPE is the row's before it was raised. Two different ones of fp32, fp16 and bf16 promote to fp32.
    """
    if not CAST_BEFORE_SCALE:
        return (h * (weight + weight_offset)).to(DTYPE).to(tl.float32)
    h = h.to(DTYPE).to(tl.float32) * (weight + weight_offset).to(WEIGHT_DTYPE).to(tl.float32)
    if WEIGHT_DTYPE == DTYPE:
        h = h.to(DTYPE).to(tl.float32)
    return h


# ---------------------------------------------------------------------------------------------- launchers


def dtype_refusal(node: fx.Node) -> str | None:
    """Why kernels that compute in fp32 do not take a call: the first floating argument of another dtype."""
    for argument in node.target._schema.arguments:  # type: ignore[union-attr]  # an operator of the vocabulary
        value = arg(node, argument.name)
        if not is_tensor(value):
            continue
        found = dtype(value)  # type: ignore[arg-type]  # a node
        if found.is_floating_point and found not in DTYPES:
            return f"dtype {found} of {argument.name} is not float32, float16 or bfloat16"
    return None


def collapsed(
    sizes: Sequence[int], result: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[list[int]]]:
    """Dimensions in the order of a result's memory, those merged that every tensor walks in equal steps.

    Args:
        sizes: of the dimensions to walk.
        result: the result's strides in them, which give the order: largest first.
        strides: each input's.

    Returns:
        sizes and each input's strides; no dimension of size 1 is left.
    """
    merged: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for dim in sorted((d for d, n in enumerate(sizes) if n != 1), key=lambda d: -result[d]):
        if merged and all(step[-1] == of[dim] * sizes[dim] for step, of in zip(steps, strides, strict=True)):
            merged[-1] *= sizes[dim]
            for step, of in zip(steps, strides, strict=True):
                step[-1] = of[dim]
        else:
            merged.append(sizes[dim])
            for step, of in zip(steps, strides, strict=True):
                step.append(of[dim])
    return merged, steps


def row_walk(
    result: torch.Tensor, inputs: Sequence[torch.Tensor]
) -> tuple[int, list[tuple[int, int]], int] | None:
    """(inner, each input's (outer, inner) stride, rows) of the rows along the last dimension.

    Row r of the result, in the order of its memory, is row (r // inner, r % inner) of an input. Heads in a
    merged QKV take both; most inputs take one stride, and inner is 1. None where three would be needed, and
    where rows are not contiguous.
    """
    width = result.shape[-1]
    if width > 1 and any(t.stride(-1) != 1 for t in (result, *inputs)):
        return None
    sizes, strides = collapsed(result.shape[:-1], result.stride()[:-1], [t.stride()[:-1] for t in inputs])
    if not sizes:
        return 1, [(width, 0) for _ in inputs], 1
    if len(sizes) == 1:
        return 1, [(s[0], 0) for s in strides], sizes[0]
    if len(sizes) == 2:
        return sizes[1], [(s[0], s[1]) for s in strides], sizes[0] * sizes[1]
    return None
