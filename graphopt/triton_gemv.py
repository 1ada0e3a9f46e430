"""Products of few rows in Triton: each weight is read once, at the memory's speed, straight from its row.

`gemv` takes one row without the matrix unit, `skinny` up to 16 with it. Both normalise x as they read it
(each program for itself: x is small and stays in the cache), accumulate in fp32 and finish what they store.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt.launch import ALIGNED, current_target, launch
from graphopt.triton_linear import MOST_REGISTERS, Product, finished, normed, statistics

MOST_ROWS = 16  # of x that `skinny` takes: the least that a matrix instruction takes
SLICE = 128  # bytes of a row that a warp of `skinny` takes a step
THREADS = 128  # of `gemv`: two rows of int8 are still 16 bytes a thread
GEMV_STEP = 2048  # bytes of a row of half precision that `gemv` takes a step; 4 rows and 3 stages: 24 kB


@triton.jit
def _gemv(
    x_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    y_ptr,
    features,
    K,
    eps,
    weight_offset,
    x_col_stride,
    w_row_stride,
    w_col_stride,
    scales_row_stride,
    scales_col_stride,
    residual_col_stride,
    NORM: tl.constexpr,
    CAST_BEFORE_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STATS_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y[n] = finished(sum_k h[k] * w[n, k]): BLOCK_N columns a program, SLICES * BLOCK_K of K a step.

    With scales (GROUP > 0) a slice lies in one group: its sum is scaled once.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = columns < features
    mean = 0.0
    rstd = 1.0
    if NORM != "":
        row = tl.zeros([1], tl.int32)
        means, rstds = statistics(x_ptr, row, row == 0, K, x_col_stride, eps, NORM, STATS_K)
        mean = tl.sum(means, 0)
        rstd = tl.sum(rstds, 0)
    # Weights are indexed [column, slice, k in the slice].
    wide = columns.to(tl.int64)
    gate_row = w_ptr + wide[:, None, None] * w_row_stride
    up_row = gate_row + tl.cast(features, tl.int64) * w_row_stride
    scale_row = scales_ptr + wide[:, None] * scales_row_stride if GROUP else 0
    in_row = in_columns[:, None, None]
    slices = tl.arange(0, SLICES) * BLOCK_K
    acc = tl.zeros([BLOCK_N, SLICES, BLOCK_K], tl.float32)
    acc_up = acc
    sums = tl.zeros([BLOCK_N, SLICES], tl.float32)
    sums_up = sums
    for start in tl.range(0, K, SLICES * BLOCK_K, num_stages=STAGES):
        first = start + slices
        k = first[:, None] + tl.arange(0, BLOCK_K)[None, :]
        in_k = k < K
        in_w = in_row & in_k[None, :, :]
        offsets = k[None, :, :].to(tl.int64) * w_col_stride
        w = tl.load(gate_row + offsets, mask=in_w, other=0.0, eviction_policy="evict_first").to(tl.float32)
        x = tl.load(x_ptr + k * x_col_stride, mask=in_k, other=0.0, eviction_policy="evict_last").to(
            tl.float32
        )
        h = normed(
            x,
            k,
            in_k,
            mean,
            rstd,
            norm_weight_ptr,
            norm_bias_ptr,
            weight_offset,
            NORM,
            CAST_BEFORE_SCALE,
            DTYPE,
        )[None, :, :]
        if GROUP:
            groups = (first // GROUP)[None, :] * scales_col_stride
            in_scales = in_columns[:, None] & (first < K)[None, :]
            scale = tl.load(scale_row + groups, mask=in_scales, other=0.0).to(tl.float32)
            sums += tl.sum(w * h, 2) * scale
        else:
            acc += w * h
        if GATED:
            up = tl.load(up_row + offsets, mask=in_w, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if GROUP:
                up_groups = groups + tl.cast(features, tl.int64) * scales_row_stride
                up_scale = tl.load(scale_row + up_groups, mask=in_scales, other=0.0).to(tl.float32)
                sums_up += tl.sum(up * h, 2) * up_scale
            else:
                acc_up += up * h
    if GROUP == 0:
        sums = tl.sum(acc, 2)
        sums_up = tl.sum(acc_up, 2)
    y = finished(
        tl.sum(sums, 1),
        tl.sum(sums_up, 1),
        bias_ptr,
        residual_ptr,
        columns,
        in_columns,
        columns * residual_col_stride,
        in_columns,
        features,
        ACTIVATION,
        GATED,
        DTYPE,
    )
    tl.store(y_ptr + columns, y.to(y_ptr.dtype.element_ty), mask=in_columns)


@triton.jit(do_not_specialize=["rows"])
def _skinny(
    x_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    y_ptr,
    rows,
    features,
    K,
    eps,
    weight_offset,
    x_row_stride,
    x_col_stride,
    w_row_stride,
    w_col_stride,
    scales_row_stride,
    scales_col_stride,
    residual_row_stride,
    residual_col_stride,
    NORM: tl.constexpr,
    CAST_BEFORE_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STATS_K: tl.constexpr,
):
    """y[m, n] = finished(sum_k h[m, k] * w[n, k]): all rows and BLOCK_N columns a program.

    A step takes SLICES * BLOCK_K of K, as that many products beside each other, one a warp: few columns then
    keep all warps busy. The slices are summed at the end. With scales (GROUP > 0) a slice lies in one group.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = columns < features
    row = tl.arange(0, BLOCK_M)
    in_rows = row < rows
    row_offsets = row.to(tl.int64) * x_row_stride
    mean = 0.0
    rstd = 1.0
    if NORM != "":
        means, rstds = statistics(x_ptr, row_offsets, in_rows, K, x_col_stride, eps, NORM, STATS_K)
        mean = means[None, :, None]
        rstd = rstds[None, :, None]
    # x is indexed [slice, row, k], weights [slice, k, column].
    wide = columns.to(tl.int64)
    gate_row = w_ptr + wide[None, None, :] * w_row_stride
    up_row = gate_row + tl.cast(features, tl.int64) * w_row_stride
    scale_row = scales_ptr + wide[None, None, :] * scales_row_stride if GROUP else 0
    in_row = in_columns[None, None, :]
    slices = tl.arange(0, SLICES) * BLOCK_K
    acc = tl.zeros([SLICES, BLOCK_M, BLOCK_N], tl.float32)
    acc_up = acc
    for start in range(0, K, SLICES * BLOCK_K):
        first = start + slices
        k = first[:, None] + tl.arange(0, BLOCK_K)[None, :]
        in_k = k < K
        in_x = in_rows[None, :, None] & in_k[:, None, :]
        in_w = in_row & in_k[:, :, None]
        offsets = k[:, :, None].to(tl.int64) * w_col_stride
        x = tl.load(x_ptr + row_offsets[None, :, None] + k[:, None, :] * x_col_stride, mask=in_x, other=0.0)
        w = tl.load(gate_row + offsets, mask=in_w, other=0.0, eviction_policy="evict_first")
        if NORM != "":
            x = normed(
                x.to(tl.float32),
                k[:, None, :],
                in_k[:, None, :],
                mean,
                rstd,
                norm_weight_ptr,
                norm_bias_ptr,
                weight_offset,
                NORM,
                CAST_BEFORE_SCALE,
                DTYPE,
            ).to(DTYPE)
        if GROUP:
            groups = (first // GROUP)[:, None, None] * scales_col_stride
            in_scales = in_row & (first < K)[:, None, None]
            scale = tl.load(scale_row + groups, mask=in_scales, other=0.0).to(tl.float32)
            acc += tl.dot(x, w.to(DTYPE), input_precision="ieee") * scale
        else:
            acc = tl.dot(x, w, acc, input_precision="ieee")
        if GATED:
            up = tl.load(up_row + offsets, mask=in_w, other=0.0, eviction_policy="evict_first")
            if GROUP:
                up_groups = groups + tl.cast(features, tl.int64) * scales_row_stride
                up_scale = tl.load(scale_row + up_groups, mask=in_scales, other=0.0).to(tl.float32)
                acc_up += tl.dot(x, up.to(DTYPE), input_precision="ieee") * up_scale
            else:
                acc_up = tl.dot(x, up, acc_up, input_precision="ieee")
    in_y = in_rows[:, None] & in_columns[None, :]
    y = finished(
        tl.sum(acc, 0),
        tl.sum(acc_up, 0),
        bias_ptr,
        residual_ptr,
        columns[None, :],
        in_columns[None, :],
        row.to(tl.int64)[:, None] * residual_row_stride + columns[None, :] * residual_col_stride,
        in_y,
        features,
        ACTIVATION,
        GATED,
        DTYPE,
    )
    y_offsets = row.to(tl.int64)[:, None] * features + columns[None, :]
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=in_y)


def gemv(product: Product) -> None:
    """Launch the product of one row."""
    p, target = product, current_target(product.x)
    step = GEMV_STEP // p.x.element_size()
    block_k = p.block_k(step)
    block_n = _rows_a_program(p, target.multiprocessors) // (2 if p.gated else 1)
    launch(
        _gemv,
        (triton.cdiv(p.features, block_n),),
        p.x,
        p.weight,
        p.scales,
        p.bias,
        p.norm_weight,
        p.norm_bias,
        p.residual,
        p.y,
        p.features,
        p.x.shape[1],
        float(p.eps),
        float(p.weight_offset),
        p.x.stride(1),
        *p.strides("weight", "scales"),
        p.strides("residual")[1],
        NORM=p.norm or "",
        CAST_BEFORE_SCALE=p.cast_before_scale,
        ACTIVATION=p.activation or "",
        GATED=p.gated,
        GROUP=p.group,
        BLOCK_N=block_n,
        SLICES=step // block_k,
        BLOCK_K=block_k,
        STATS_K=4096,
        STAGES=2 if target.is_hip else 3,
        num_warps=THREADS // target.warp_size,
    )


def _rows_a_program(product: Product, multiprocessors: int) -> int:
    """Of the weight: more where programs abound (each normalises x again), fewer where they are short.

    fp32 that cannot be loaded 16 bytes at a time takes the fewest: the addresses take registers, too.
    """
    weight = product.weight
    rows, (far, near) = weight.shape[0], weight.stride()
    if product.x.element_size() == 4 and (near != 1 or far % ALIGNED or weight.shape[1] % ALIGNED):
        return 2
    if rows >= 4 * 16 * multiprocessors:
        return 8
    return 4 if rows >= 4 * 3 * multiprocessors else 2


def skinny(product: Product) -> None:
    """Launch the product of up to MOST_ROWS rows. Raises ValueError for more.

    Few columns are taken by 16 and 8 warps, many by 32 (16 of gate and 16 of up) and 4 warps: either way a
    multiprocessor has about 48 kB of weights on their way.
    """
    p, target = product, current_target(product.x)
    if p.rows > MOST_ROWS:
        raise ValueError(f"{p.rows} rows > {MOST_ROWS}; gemm takes more")
    few = not p.gated and p.features < 2 * 16 * target.multiprocessors
    exact = p.x.element_size() == 4  # fp32, whose operands stand in registers
    block_n, slices = (16, 8) if few else (16 if p.gated else 32, 4)
    launch(
        _skinny,
        (triton.cdiv(p.features, block_n),),
        p.x,
        p.weight,
        p.scales,
        p.bias,
        p.norm_weight,
        p.norm_bias,
        p.residual,
        p.y,
        p.rows,
        p.features,
        p.x.shape[1],
        float(p.eps),
        float(p.weight_offset),
        *p.strides("x", "weight", "scales", "residual"),
        NORM=p.norm or "",
        CAST_BEFORE_SCALE=p.cast_before_scale,
        ACTIVATION=p.activation or "",
        GATED=p.gated,
        GROUP=p.group,
        BLOCK_M=MOST_ROWS,
        BLOCK_N=block_n,
        SLICES=slices,
        BLOCK_K=p.block_k(SLICE // p.x.element_size()),
        STATS_K=256,
        num_warps=8 if exact else slices,
        num_stages=2 if target.is_hip else 4,
        **({"maxnreg": MOST_REGISTERS} if exact else {}),
    )
