"""What stands around a product in Triton: the norm of its input, and what is done to it before it is stored.

All of it is computed in fp32, rounded where `graphopt.ops.fused_linear` rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from graphopt.triton_math import activate, rms_scaled

# NVIDIA's assembler spills 8 bytes here and there to stay at 40, 80 or 128 registers unless told its limit.
MOST_REGISTERS = 255


@dataclass(frozen=True)
class Product:
    """The arguments of `fused_linear` as kernels take them: x, residual and y as matrices.

    Attributes:
        x: [rows, K], any strides.
        weight: [features, K], or [2 * features, K] gated; any strides. int8 with scales.
        residual: [rows, features], any strides; broadcast dimensions have stride 0.
        y: [rows, features], contiguous: what is written.
    """

    x: torch.Tensor
    weight: torch.Tensor
    scales: torch.Tensor | None
    bias: torch.Tensor | None
    norm: str | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    eps: float
    weight_offset: float
    cast_before_scale: bool
    activation: str | None
    gated: bool
    residual: torch.Tensor | None
    y: torch.Tensor

    @property
    def rows(self) -> int:
        """Of x and of the result."""
        return self.x.shape[0]

    @property
    def features(self) -> int:
        """Columns of the result."""
        return self.y.shape[1]

    @property
    def group(self) -> int:
        """How many weights along K share a scale; 0 where they are not scaled."""
        return self.x.shape[1] // self.scales.shape[1] if self.scales is not None else 0

    def block_k(self, most: int) -> int:
        """`most`, a power of two, or the largest one below that divides the group."""
        return min(most, self.group & -self.group) if self.group else most

    def strides(self, *names: str) -> tuple[int, ...]:
        """Row and column stride of each of these matrices; 0 for one that is None."""
        found = (getattr(self, name) for name in names)
        return tuple(s for t in found for s in (t.stride() if t is not None else (0, 0)))


@triton.jit
def statistics(x_ptr, row_offsets, in_rows, K, x_col_stride, eps, NORM: tl.constexpr, BLOCK_K: tl.constexpr):
    """(mean, 1 / deviation) of rows of x, [rows] each: 0 and 1 / sqrt(mean(x^2) + eps) for "rms".

    "layer" reads the rows twice, the second time from the cache: the variance of centred values is exact.
    """
    mean = tl.zeros_like(row_offsets).to(tl.float32)
    if NORM == "layer":
        total = tl.zeros([row_offsets.shape[0], BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            kept = in_rows[:, None] & (k < K)[None, :]
            offsets = row_offsets[:, None] + k[None, :] * x_col_stride
            total += tl.load(x_ptr + offsets, mask=kept, other=0.0).to(tl.float32)
        mean = tl.sum(total, 1) / K
    squares = tl.zeros([row_offsets.shape[0], BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        kept = in_rows[:, None] & (k < K)[None, :]
        offsets = row_offsets[:, None] + k[None, :] * x_col_stride
        h = tl.load(x_ptr + offsets, mask=kept, other=0.0).to(tl.float32)
        h = tl.where(kept, h - mean[:, None], 0.0)
        squares += h * h
    return mean, tl.rsqrt(tl.sum(squares, 1) / K + eps)


@triton.jit
def normed(
    x,
    k,
    in_k,
    mean,
    rstd,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_offset,
    NORM: tl.constexpr,
    CAST_BEFORE_SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The normalised x in fp32, rounded to DTYPE; x itself without a norm.

    x fp32 with columns k; k, mean and rstd broadcast to it. Columns outside `in_k` are garbage: the weights
    there are 0.
    """
    if NORM != "":
        x = (x - mean) * rstd
        if norm_weight_ptr is not None:
            weight = tl.load(norm_weight_ptr + k, mask=in_k, other=0.0).to(tl.float32)
            if NORM == "rms":
                KEPT: tl.constexpr = norm_weight_ptr.dtype.element_ty
                x = rms_scaled(x, weight, weight_offset, DTYPE, KEPT, CAST_BEFORE_SCALE)
            else:
                x *= weight
        if norm_bias_ptr is not None:
            x += tl.load(norm_bias_ptr + k, mask=in_k, other=0.0).to(tl.float32)
        x = x.to(DTYPE).to(tl.float32)
    return x


@triton.jit
def finished(
    product,
    up,
    bias_ptr,
    residual_ptr,
    columns,
    in_columns,
    residual_offsets,
    in_y,
    features,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """act(product + bias) [* (up + bias)] + residual in fp32; the biased products are rounded to DTYPE.

    columns and in_columns broadcast to the product; `features` is the number of columns: up's biases begin
    there. `up` is read with GATED only.
    """
    if bias_ptr is not None:
        product += tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    product = activate(product.to(DTYPE).to(tl.float32), ACTIVATION)
    if GATED:
        if bias_ptr is not None:
            up += tl.load(bias_ptr + features + columns, mask=in_columns, other=0.0).to(tl.float32)
        product *= up.to(DTYPE).to(tl.float32)
    if residual_ptr is not None:
        product += tl.load(residual_ptr + residual_offsets, mask=in_y, other=0.0).to(tl.float32)
    return product
