"""RMSNorm with and without residual, in Triton: fp32 statistics, a row a program, short rows together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import fx

from graphopt.graph import arg, same_shape, same_size, shape
from graphopt.kernel import GPU, Case, Kernel, Tensor
from graphopt.kernels.rms_norm import CASES as SHARED_CASES
from graphopt.kernels.rms_norm import MIXED
from graphopt.launch import ALIGNED, current_target, launch
from graphopt.triton_math import dtype_refusal, rms_scaled, row_total, row_walk

ONE_PASS = 16384  # columns that are held in registers; wider rows are read twice (the second time from L2)
LOOP_BLOCK = 4096
DEFAULTS = (0.0, True)  # weight_offset and cast_before_scale, where a case leaves them out
TILE = 2048  # elements of a program that takes several short rows
RAGGED_TILE = 1024  # of rows that cannot be read 16 bytes at a time: their addresses take registers, too


@triton.jit
def _finish(
    h, weight_ptr, residual_ptr, y_ptr, columns, in_row, residual_at, y_at, kept, weight_offset,
    AFTER: tl.constexpr, CAST_BEFORE_SCALE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Scale the normalised row, add the residual that comes behind the norm, and store."""
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
        h = rms_scaled(h, weight, weight_offset, DTYPE, weight_ptr.dtype.element_ty, CAST_BEFORE_SCALE)
    else:
        h = h.to(DTYPE).to(tl.float32)
    if AFTER:
        h += tl.load(residual_ptr + residual_at, mask=kept, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_at, h.to(y_ptr.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, x_outer_stride, x_inner_stride,
    residual_outer_stride, residual_inner_stride, inner, rows, N, eps, weight_offset,
    AFTER: tl.constexpr, CAST_BEFORE_SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    """y [rows, N] dense; x and residual by two row strides. total: x + residual, which then is normalised."""
    DTYPE: tl.constexpr = (x_ptr if total_ptr is None else total_ptr).dtype.element_ty
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
            tl.store(total_ptr + y_row + columns, x.to(DTYPE), mask=kept)
        inverse = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / N + eps)
        _finish(
            x * inverse, weight_ptr, residual_ptr, y_ptr, columns, in_row, residual_row + columns,
            y_row + columns, kept, weight_offset, AFTER, CAST_BEFORE_SCALE, DTYPE,
        )  # fmt: skip
    else:
        squares = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for start in range(0, N, BLOCK_N):
            at = start + columns
            kept = at < N
            x = row_total(x_ptr, residual_ptr, total_ptr, x_row + at, residual_row + at, kept)
            if total_ptr is not None:
                tl.store(total_ptr + y_row + at, x.to(DTYPE), mask=kept)
            squares += x * x
        inverse = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / N + eps)
        for start in range(0, N, BLOCK_N):
            at = start + columns
            kept = at < N
            # Summed again: what other threads stored may not be seen yet.
            x = row_total(x_ptr, residual_ptr, total_ptr, x_row + at, residual_row + at, kept)
            _finish(
                x * inverse, weight_ptr, residual_ptr, y_ptr, at, kept, residual_row + at, y_row + at, kept,
                weight_offset, AFTER, CAST_BEFORE_SCALE, DTYPE,
            )  # fmt: skip


def tile_of(x: torch.Tensor) -> tuple[int, int, bool, int]:
    """(rows of a program, columns of a block, whether it loops, warps) for rows of x's length."""
    width = x.shape[-1]
    block = triton.next_power_of_2(width) if width <= ONE_PASS else LOOP_BLOCK
    warps = 4 if block <= 2048 else 8 if block <= 8192 else 16
    rows = max(1, min(64, (RAGGED_TILE if width % ALIGNED else TILE) // block))
    return rows, block, width > ONE_PASS, warps * 32 // current_target(x).warp_size


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_scale: bool,
    after: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The one launch of all three ops: (y, total)."""
    total_dtype = x.dtype if residual is None or after else torch.promote_types(x.dtype, residual.dtype)
    y_dtype = total_dtype
    if weight is not None and cast_before_scale:
        y_dtype = torch.promote_types(total_dtype, weight.dtype)
    if residual is not None and after:
        y_dtype = torch.promote_types(y_dtype, residual.dtype)
    inputs = [x] if residual is None else list(torch.broadcast_tensors(x, residual))  # by strides of 0
    x = inputs[0]
    y = torch.empty_like(x, dtype=y_dtype)  # in x's order, so that views of the result are as free as x's
    walk = row_walk(y, inputs)
    if walk is None:  # three row strides, or columns apart: no caller of a transformer has them
        inputs = [t.contiguous() for t in inputs]
        y = torch.empty(x.shape, dtype=y_dtype, device=x.device)
        walk = row_walk(y, inputs)
    total = None
    if residual is not None and not after:
        total = torch.empty_strided(y.shape, y.stride(), dtype=total_dtype, device=y.device)
    if x.numel() == 0:
        return y, total
    assert walk is not None  # dense rows have one stride
    inner, strides, rows = walk
    per_program, block, loop, warps = tile_of(x)
    launch(
        _rms_norm,
        (triton.cdiv(rows, per_program),),
        inputs[0],
        inputs[1] if residual is not None else None,
        weight.contiguous() if weight is not None else None,  # a vector of N
        y,
        total,
        *strides[0],
        *strides[-1],
        inner,
        rows,
        x.shape[-1],
        float(eps),
        float(weight_offset),
        AFTER=after,
        CAST_BEFORE_SCALE=bool(cast_before_scale) and weight is not None,
        ROWS=per_program,
        BLOCK_N=block,
        LOOP=loop,
        num_warps=warps,
    )
    return y, total


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_scale: bool = True,
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight_offset + weight), x [..., D]."""
    return _norm(x, None, weight, eps, weight_offset, cast_before_scale, False)[0]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_scale: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """total = x + residual -> (rms_norm(total), total)."""
    y, total = _norm(x, residual, weight, eps, weight_offset, cast_before_scale, False)
    assert total is not None  # there is a residual
    return y, total


def rms_norm_residual(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_scale: bool,
    residual: torch.Tensor,
) -> torch.Tensor:
    """rms_norm(x) + residual."""
    return _norm(x, residual, weight, eps, weight_offset, cast_before_scale, True)[0]


def refuses(node: fx.Node) -> str | None:
    """Other dtypes than fp32, fp16 and bf16."""
    return dtype_refusal(node)


def add_refuses(node: fx.Node) -> str | None:
    """As `refuses`, and a row that would be repeated along its columns: rows are read in pairs, whole."""
    x, residual = arg(node, "x"), arg(node, "residual")
    assert isinstance(x, fx.Node) and isinstance(residual, fx.Node)
    if not shape(residual) or not same_size(shape(x)[-1], shape(residual)[-1]):
        return f"residual is {tuple(shape(residual))}, x is {tuple(shape(x))}: the last size differs"
    return dtype_refusal(node)


def residual_refuses(node: fx.Node) -> str | None:
    """As `refuses`, and a residual of another shape, which the op does not have."""
    x, residual = arg(node, "x"), arg(node, "residual")
    assert isinstance(x, fx.Node) and isinstance(residual, fx.Node)
    if not same_shape(shape(x), shape(residual)):
        return f"residual is {tuple(shape(residual))}, x is {tuple(shape(x))}"
    return dtype_refusal(node)


def _behind(case: Case) -> Case:
    """The same call of `rms_norm_residual`."""
    arguments: tuple[object, ...] = (*case.arguments, *DEFAULTS[len(case.arguments) - 3 :])
    x, *rest = arguments
    assert isinstance(x, Tensor)
    return Case(case.name, (x, *rest, Tensor(x.shape)))


def _case(rows: int, width: int, offset: float = 0.0, cast: bool = True) -> Case:
    return Case(f"{rows} x {width}", (Tensor((rows, width)), Tensor((width,)), 1e-6, offset, cast))


CASES = (
    *SHARED_CASES,
    *MIXED,
    Case("two row strides", (Tensor((3, 7, 16), layout="expanded"), Tensor((16,)), 1e-6)),
    Case("block edge", (Tensor((17, 128)), Tensor((128,)), 1e-6)),
    Case("beyond a block", (Tensor((2, 4097)), Tensor((4097,)), 1e-6)),
    Case("two passes", (Tensor((2, 3, 16385)), Tensor((16385,)), 1e-6, 1.0, False)),
    Case("half weight", (Tensor((2, 7, 48)), Tensor((48,), torch.float16), 1e-6)),
    Case("one stride of three", (Tensor((2, 3, 4, 2, 16), layout="transposed"), Tensor((16,)), 1e-6)),
    Case("no columns", (Tensor((2, 3, 0)), Tensor((0,)), 1e-6)),
)
# Positions are added to a batch of tokens.
BROADCASTS = (
    ((2, 5, 48), (1, 5, 48)),
    ((5, 48), (2, 5, 48)),
    ((2, 3, 5, 48), (2, 1, 1, 48)),
    ((7, 48), (48,)),
)
ADD_CASES = (
    *(case.with_residual() for case in CASES),
    *(
        Case(f"broadcast {x} + {residual}", (Tensor(x), Tensor(residual), Tensor((48,)), 1e-6))
        for x, residual in BROADCASTS
    ),
    Case("fp32 residual", (Tensor((2, 7, 48)), Tensor((2, 7, 48), torch.float32), Tensor((48,)), 1e-6)),
    Case(
        "both sliced",
        (Tensor((2, 7, 48), layout="sliced"), Tensor((2, 7, 48), layout="sliced"), Tensor((48,)), 1e-6),
    ),
)
BEHIND = tuple(_behind(case) for case in CASES)

# Each width once: the compiled variants are the same for any number of rows.
HEADS = (
    Case("heads of a merged linear", (Tensor((4096, 32, 128), layout="expanded"), Tensor((128,)), 1e-6)),
)
ROWS = (1, 4096)
ALONE = (*HEADS, *(_case(rows, 4096) for rows in ROWS))
BEFORE = tuple(_case(rows, n).with_residual() for n in (768, 8192, 16384) for rows in ROWS)
AFTER = tuple(_behind(_case(rows, 4096, 1.0, False)) for rows in ROWS)

EXPECTS = (("_rms_norm", "wide_loads"),)
KERNELS = (
    Kernel("rms_norm", "rms_norm_triton", rms_norm, refuses, GPU, CASES, ALONE, EXPECTS),
    Kernel("add_rms_norm", "add_rms_norm_triton", add_rms_norm, add_refuses, GPU, ADD_CASES, BEFORE, EXPECTS),
    Kernel(
        "rms_norm_residual",
        "rms_norm_residual_triton",
        rms_norm_residual,
        residual_refuses,
        GPU,
        BEHIND,
        AFTER,
        EXPECTS,
    ),
)
