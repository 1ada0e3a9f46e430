"""Products of many rows in Triton: a persistent loop over tiles; what follows is done before one is stored.

Accumulates in fp32. Tiles come by TMA descriptors where target and strides allow, by pointers elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from graphopt import torch_private
from graphopt.launch import ALIGNED, current_target, launch
from graphopt.targets import Target
from graphopt.triton_linear import MOST_REGISTERS, Product, finished

# Triton's names of what products are rounded to.
TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Tile:
    """How a product is cut, and how many programs of that kind a multiprocessor holds.

    Attributes:
        m, n, k: rows, columns and steps along K; gated, gate and up share the n columns.
        warps, stages, resident: of a program; programs a multiprocessor.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    resident: int


# In half precision, large to small. Chosen by what compiles without spills, not timed yet; the first with TMA
# takes 156 registers and 213 kB of shared memory on sm_90.
WITH_TMA = (
    Tile(128, 256, 64, 8, 3, 1),
    Tile(128, 128, 64, 8, 3, 1),
    Tile(64, 64, 64, 4, 4, 3),
    Tile(64, 32, 128, 4, 4, 2),
)
BY_POINTERS = (Tile(128, 128, 32, 8, 4, 2), Tile(64, 64, 64, 4, 4, 2), Tile(64, 32, 64, 4, 4, 3))
ON_AMD = (Tile(128, 128, 64, 8, 2, 1), Tile(64, 64, 64, 4, 2, 2), Tile(64, 32, 64, 4, 2, 2))
EXACT = Tile(64, 64, 32, 8, 2, 2)  # fp32, without tensor cores
RAGGED_EXACT = Tile(64, 64, 16, 8, 2, 2)


@triton.jit
def tile_at(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of the index-th tile: GROUP_M rows of tiles at a time, so that x stays in the cache."""
    width = GROUP_M * tiles_n
    first = index // width * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + index % width % height, index % width // height


@triton.jit
def tile_of(
    source,
    first_row,
    first_col,
    rows,
    cols,
    row_stride,
    col_stride,
    TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A tile of a matrix, 0 outside of it: `source` is its descriptor (TMA) or its pointer."""
    if TMA:
        return source.load([first_row, first_col])
    else:
        row = first_row + tl.arange(0, BLOCK_ROWS)
        col = first_col + tl.arange(0, BLOCK_COLS)
        kept = (row < rows)[:, None] & (col < cols)[None, :]
        offsets = row.to(tl.int64)[:, None] * row_stride + col.to(tl.int64)[None, :] * col_stride
        return tl.load(source + offsets, mask=kept, other=0.0)


@triton.jit
def scaled(w, scales_ptr, first_row, rows, group, row_stride, col_stride, DTYPE: tl.constexpr):
    """The weights that a tile of int8 stands for, in DTYPE: [row, k] times the row's scale of that group."""
    row = first_row + tl.arange(0, w.shape[0])
    offsets = row.to(tl.int64) * row_stride + group * col_stride
    scale = tl.load(scales_ptr + offsets, mask=row < rows, other=0.0).to(tl.float32)
    return (w.to(tl.float32) * scale[:, None]).to(DTYPE)


@triton.jit
def added(acc, a, b, PRECISION: tl.constexpr, SWAP: tl.constexpr):
    """acc + a @ b^T, or with SWAP acc + b @ a^T."""
    if SWAP:
        return tl.dot(b, a.T, acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b.T, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["rows"])
def _gemm(
    x,
    w,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    y_desc,
    rows,
    features,
    K,
    x_row_stride,
    x_col_stride,
    w_row_stride,
    w_col_stride,
    scales_row_stride,
    scales_col_stride,
    residual_row_stride,
    residual_col_stride,
    DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    SWAP: tl.constexpr,
):
    """y = finished(x @ w^T); x [rows, K] and w [features, K] (twice as many gated): descriptors or pointers.

    With scales (GROUP > 0) BLOCK_K divides their group: a tile is dequantized to DTYPE before its product.
    With SWAP products are transposed, so that w is their left operand: sm_90 takes it from registers, where
    dequantizing leaves it.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(features, BLOCK_N)
    w_rows = 2 * features if GATED else features
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
        acc_up = acc
        for k in range(0, K, BLOCK_K):
            a = tile_of(x, m, k, rows, K, x_row_stride, x_col_stride, TMA, BLOCK_M, BLOCK_K)
            b = tile_of(w, n, k, w_rows, K, w_row_stride, w_col_stride, TMA, BLOCK_N, BLOCK_K)
            if GROUP:
                group = k // GROUP
                b = scaled(b, scales_ptr, n, w_rows, group, scales_row_stride, scales_col_stride, DTYPE)
            acc = added(acc, a, b, PRECISION, SWAP)
            if GATED:
                up = n + features
                b = tile_of(w, up, k, w_rows, K, w_row_stride, w_col_stride, TMA, BLOCK_N, BLOCK_K)
                if GROUP:
                    b = scaled(b, scales_ptr, up, w_rows, group, scales_row_stride, scales_col_stride, DTYPE)
                acc_up = added(acc_up, a, b, PRECISION, SWAP)
        row = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        columns = n + tl.arange(0, BLOCK_N)
        in_columns = (columns < features)[None, :]
        in_y = (row < rows)[:, None] & in_columns
        if SWAP:
            acc, acc_up = acc.T, acc_up.T
        y = finished(
            acc,
            acc_up,
            bias_ptr,
            residual_ptr,
            columns[None, :],
            in_columns,
            row[:, None] * residual_row_stride + columns[None, :] * residual_col_stride,
            in_y,
            features,
            ACTIVATION,
            GATED,
            DTYPE,
        )
        y = y.to(y_ptr.dtype.element_ty)
        if y_desc is not None:
            y_desc.store([m, n], y)
        else:
            tl.store(y_ptr + row[:, None] * features + columns[None, :], y, mask=in_y)


def gemm(product: Product) -> None:
    """Launch the product of any number of rows. Raises ValueError for one with a norm, which comes before."""
    p, target = product, current_target(product.x)
    if p.norm is not None:
        raise ValueError(f"gemm has no norm {p.norm!r}; launch it before")
    # fp32 is multiplied without tensor cores, whose operands TMA is for: pointers take fewer registers.
    tma = target.capability >= 90 and p.x.dtype != torch.float32 and has_descriptor(p.x, p.weight)
    ragged = is_ragged(p, tma)
    tile = tile_for(p, target, tma, ragged)
    block_n, block_k = _columns(p, tile), p.block_k(tile.k)
    launch(
        _gemm,
        (min(tile.resident * target.multiprocessors, _tiles(p, tile)),),
        TensorDescriptor.from_tensor(p.x, [tile.m, block_k]) if tma else p.x,
        TensorDescriptor.from_tensor(p.weight, [block_n, block_k]) if tma else p.weight,
        p.scales,
        p.bias,
        p.residual,
        p.y,
        TensorDescriptor.from_tensor(p.y, [tile.m, block_n]) if tma and has_descriptor(p.y) else None,
        p.rows,
        p.features,
        p.x.shape[1],
        *p.strides("x", "weight", "scales", "residual"),
        DTYPE=TRITON[p.x.dtype],
        ACTIVATION=p.activation or "",
        GATED=p.gated,
        GROUP=p.group,
        TMA=tma,
        PRECISION=_precision(p, target),
        SWAP=bool(p.group),
        BLOCK_M=tile.m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=8,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({"maxnreg": MOST_REGISTERS} if ragged else {}),
    )


def tile_for(product: Product, target: Target, tma: bool, ragged: bool) -> Tile:
    """The largest tile that has no more rows than the product and fills the target, or the smallest.

    A ragged product takes the smallest: the addresses of a large tile find no room in the registers.
    """
    if product.x.dtype == torch.float32:
        return RAGGED_EXACT if ragged else EXACT
    tiles = ON_AMD if target.is_hip else WITH_TMA if tma else BY_POINTERS
    if ragged:
        return tiles[-1]
    fill = (t for t in tiles if t.m <= product.rows and _tiles(product, t) >= target.multiprocessors)
    return next(fill, tiles[-1])


def is_ragged(product: Product, tma: bool) -> bool:
    """Whether elements that pointers read or write cannot be taken 16 bytes at a time.

    Triton must know it of each row: sizes and strides are multiples of 16, neighbours are beside each other.
    """
    p = product
    read = [] if tma else [p.x, p.weight]
    if p.residual is not None:
        read.append(p.residual)
    sizes = (p.features,) if tma else (p.features, p.x.shape[1])
    return any(n % ALIGNED for n in sizes) or not all(map(_is_even, read))


def _is_even(matrix: torch.Tensor) -> bool:
    """Whether one stride is 1 and the other, and the start, multiples of 16; or all of it is one element."""
    near, far = sorted(matrix.stride())
    return near <= 1 and far % ALIGNED == 0 and _address(matrix) % ALIGNED == 0


def _columns(product: Product, tile: Tile) -> int:
    """Of the result, in a tile."""
    return tile.n // (2 if product.gated else 1)


def _tiles(product: Product, tile: Tile) -> int:
    """How many there are."""
    return triton.cdiv(product.rows, tile.m) * triton.cdiv(product.features, _columns(product, tile))


def _precision(product: Product, target: Target) -> str:
    """Of fp32 products: exact.

    For operands that were int8 triton 3.7 overlooks "ieee" on sm_100 and multiplies once in tf32; three such
    products are exact to 2^-21.
    """
    overlooked = target.capability >= 100 and product.group and product.x.dtype == torch.float32
    return "tf32x3" if overlooked else "ieee"


def has_descriptor(*matrices: torch.Tensor) -> bool:
    """Whether TMA takes these: not empty, rows contiguous and apart, start and stride aligned to 16 bytes."""
    return all(
        t.numel() > 0
        and t.stride(1) == 1
        and t.stride(0) > 0
        and t.stride(0) * t.element_size() % ALIGNED == 0
        and _address(t) % ALIGNED == 0
        for t in matrices
    )


def _address(t: torch.Tensor) -> int:
    """Where a tensor begins; a fake one's memory begins at 0."""
    is_fake = torch_private.fake_mode_of((t,)) is not None
    return int(t.storage_offset()) * t.element_size() if is_fake else t.data_ptr()
