"""Small Triton kernels for the tests of launching and compiling, and one that can be broken on purpose."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from graphopt.launch import launch


@triton.jit
def _relu(x_ptr, y_ptr, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    """y = max(x, 0), or what a fault makes of it."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_row = i < n
    if FAULT == "reads behind":
        x = tl.load(x_ptr + i + 1, mask=in_row, other=0.0).to(tl.float32)
    elif FAULT == "reads before":
        x = tl.load(x_ptr + i - 1, mask=in_row, other=0.0).to(tl.float32)
    else:
        x = tl.load(x_ptr + i, mask=in_row, other=0.0).to(tl.float32)
    y = tl.maximum(x, 0.0)
    if FAULT == "wrong":
        y = y * 1.01
    if FAULT == "leaves a tail":
        tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < n - 1)
    elif FAULT == "writes behind":
        tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < n + 1)
    else:
        tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=in_row)
    if FAULT == "writes its input":
        tl.store(x_ptr + i, y.to(x_ptr.dtype.element_ty), mask=in_row)


def relu(x: torch.Tensor, kind: str = "relu", fault: str = "", num_warps: int = 4) -> torch.Tensor:
    """`ops.activation(x, "relu")` of a contiguous x."""
    assert kind == "relu" and x.is_contiguous()
    y = torch.empty_like(x)
    n, block = x.numel(), 2048 if x.numel() > 64 else 64
    launch(_relu, (triton.cdiv(n, block),), x, y, n, FAULT=fault, BLOCK=block, num_warps=num_warps)
    return y


@triton.jit
def _product(
    a_ptr, b_ptr, c_ptr, M, N, K, a_row_stride, b_row_stride, c_row_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c = a @ b^T in tiles; fp32 accumulation."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_a = (rows[:, None] < M) & (k[None, :] < K)
        in_b = (columns[:, None] < N) & (k[None, :] < K)
        a = tl.load(a_ptr + rows[:, None] * a_row_stride + k[None, :], mask=in_a, other=0.0)
        b = tl.load(b_ptr + columns[:, None] * b_row_stride + k[None, :], mask=in_b, other=0.0)
        total = tl.dot(a, b.T, total, input_precision="ieee")
    in_c = (rows[:, None] < M) & (columns[None, :] < N)
    c = c_ptr + rows[:, None] * c_row_stride + columns[None, :]
    tl.store(c, total.to(c_ptr.dtype.element_ty), mask=in_c)


def product(
    a: torch.Tensor, b: torch.Tensor, block: int = 128, num_warps: int = 8, maxnreg: int | None = None
) -> torch.Tensor:
    """a [M, K] @ b [N, K]^T."""
    (m, k), n = a.shape, b.shape[0]
    c = torch.empty((m, n), dtype=a.dtype, device=a.device)
    launch(
        _product, (triton.cdiv(m, block), triton.cdiv(n, block)),
        a, b, c, m, n, k, a.stride(0), b.stride(0), c.stride(0),
        BLOCK_M=block, BLOCK_N=block, BLOCK_K=64, num_warps=num_warps, num_stages=2, maxnreg=maxnreg,
    )  # fmt: skip
    return c
