"""LayerNorm with and without residual, in Triton: fp32 statistics, a row a program, short rows together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from graphopt.kernel import GPU, Case, Kernel, Tensor
from graphopt.kernels.layer_norm import CASES as SHARED_CASES
from graphopt.kernels.rms_norm_triton import BROADCASTS, add_refuses, refuses, tile_of
from graphopt.launch import launch
from graphopt.triton_math import row_total, row_walk


@triton.jit
def _finish(h, weight_ptr, bias_ptr, y_ptr, columns, in_row, y_at, kept):
    """Scale and shift the normalised row, and store."""
    if weight_ptr is not None:
        h *= tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_at, h.to(y_ptr.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, x_outer_stride, x_inner_stride,
    residual_outer_stride, residual_inner_stride, inner, rows, N, eps,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """y [rows, N] dense; x and residual by two row strides. total: x + residual, which then is normalised."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    x_row = (row // inner) * x_outer_stride + (row % inner) * x_inner_stride
    residual_row = (row // inner) * residual_outer_stride + (row % inner) * residual_inner_stride
    y_row = row * N
    columns = tl.arange(0, BLOCK_N)[None, :]
    if not LOOP:
        in_row = columns < N
        kept = in_row
        if ROWS > 1:
            kept = in_row & (row < rows)
        x = row_total(x_ptr, residual_ptr, total_ptr, x_row + columns, residual_row + columns, kept)
        if total_ptr is not None:
            tl.store(total_ptr + y_row + columns, x.to(total_ptr.dtype.element_ty), mask=kept)
        h = tl.where(in_row, x - tl.sum(x, 1, keep_dims=True) / N, 0.0)
        h *= tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / N + eps)
        _finish(h, weight_ptr, bias_ptr, y_ptr, columns, in_row, y_row + columns, kept)
    else:
        # Blocks' means and squared distances joined as by Chan, Golub & LeVeque 1979: one pass, and
        # nothing cancels as E[x^2] - E[x]^2 does.
        mean = tl.zeros((ROWS, 1), tl.float32)
        squares = tl.zeros((ROWS, 1), tl.float32)
        for start in range(0, N, BLOCK_N):
            at = start + columns
            kept = at < N
            x = row_total(x_ptr, residual_ptr, total_ptr, x_row + at, residual_row + at, kept)
            if total_ptr is not None:
                tl.store(total_ptr + y_row + at, x.to(total_ptr.dtype.element_ty), mask=kept)
            count = tl.minimum(N - start, BLOCK_N).to(tl.float32)
            before = start * 1.0
            block_mean = tl.sum(x, 1, keep_dims=True) / count
            h = tl.where(kept, x - block_mean, 0.0)
            distance = block_mean - mean
            squares += tl.sum(h * h, 1, keep_dims=True) + distance * distance * (
                before * count / (before + count)
            )
            mean += distance * (count / (before + count))
        inverse = tl.rsqrt(squares / N + eps)
        for start in range(0, N, BLOCK_N):
            at = start + columns
            kept = at < N
            # Summed again: what other threads stored may not be seen yet.
            x = row_total(x_ptr, residual_ptr, total_ptr, x_row + at, residual_row + at, kept)
            _finish((x - mean) * inverse, weight_ptr, bias_ptr, y_ptr, at, kept, y_row + at, kept)


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The one launch of both ops: (y, total)."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    inputs = [x] if residual is None else list(torch.broadcast_tensors(x, residual))  # by strides of 0
    x = inputs[0]
    y = torch.empty_like(x, dtype=dtype)  # in x's order, so that views of the result are as free as x's
    walk = row_walk(y, inputs)
    if walk is None:  # three row strides, or columns apart: no caller of a transformer has them
        inputs = [t.contiguous() for t in inputs]
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        walk = row_walk(y, inputs)
    total = None if residual is None else torch.empty_like(y)
    if x.numel() == 0:
        return y, total
    assert walk is not None  # dense rows have one stride
    inner, strides, rows = walk
    per_program, block, loop, warps = tile_of(x)
    launch(
        _layer_norm,
        (triton.cdiv(rows, per_program),),
        inputs[0],
        inputs[1] if residual is not None else None,
        weight.contiguous() if weight is not None else None,  # a vector of N
        bias.contiguous() if bias is not None else None,
        y,
        total,
        *strides[0],
        *strides[-1],
        inner,
        rows,
        x.shape[-1],
        float(eps),
        ROWS=per_program,
        BLOCK_N=block,
        LOOP=loop,
        num_warps=warps,
    )
    return y, total


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, x [..., D]."""
    return _norm(x, None, weight, bias, eps)[0]


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """total = x + residual -> (layer_norm(total), total)."""
    y, total = _norm(x, residual, weight, bias, eps)
    assert total is not None  # there is a residual
    return y, total


def _case(rows: int, width: int) -> Case:
    return Case(f"{rows} x {width}", (Tensor((rows, width)), Tensor((width,)), Tensor((width,)), 1e-5))


CASES = (
    *SHARED_CASES,
    Case("two row strides", (Tensor((3, 7, 16), layout="expanded"), Tensor((16,)), None, 1e-5)),
    Case("block edge", (Tensor((17, 128)), Tensor((128,)), Tensor((128,)), 1e-5)),
    Case("beyond a block", (Tensor((2, 4097)), Tensor((4097,)), Tensor((4097,)), 1e-5)),
    Case("two passes", (Tensor((2, 3, 16385)), Tensor((16385,)), Tensor((16385,)), 1e-5)),
    Case("fp32 weight", (Tensor((2, 7, 48)), Tensor((48,), torch.float32), Tensor((48,)), 1e-5)),
    Case("expanded", (Tensor((300, 64), layout="expanded"), Tensor((64,)), Tensor((64,)), 1e-5)),
    Case("no columns", (Tensor((2, 3, 0)), Tensor((0,)), Tensor((0,)), 1e-5)),
)
ADD_CASES = (
    *(case.with_residual() for case in CASES),
    *(
        Case(f"broadcast {x} + {residual}", (Tensor(x), Tensor(residual), Tensor((48,)), Tensor((48,)), 1e-5))
        for x, residual in BROADCASTS
    ),
    Case("fp32 residual", (Tensor((2, 7, 48)), Tensor((2, 7, 48), torch.float32), Tensor((48,)), None, 1e-5)),
)

# Each width once: the compiled variants are the same for any number of rows.
ROWS = (1, 4096)
HEADS = (
    Case(
        "heads of a merged linear", (Tensor((4096, 32, 128), layout="expanded"), Tensor((128,)), None, 1e-5)
    ),
)
ALONE = (*HEADS, *(_case(rows, width) for width in (768, 4096) for rows in ROWS))
BEFORE = tuple(_case(rows, width).with_residual() for width in (768, 8192, 16384) for rows in ROWS)

EXPECTS = (("_layer_norm", "wide_loads"),)
KERNELS = (
    Kernel("layer_norm", "layer_norm_triton", layer_norm, refuses, GPU, CASES, ALONE, EXPECTS),
    Kernel(
        "add_layer_norm",
        "add_layer_norm_triton",
        add_layer_norm,
        add_refuses,
        GPU,
        ADD_CASES,
        BEFORE,
        EXPECTS,
    ),
)
