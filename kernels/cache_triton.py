"""Writes into key and value caches, in Triton: every byte moved once, key and value in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import fx

from graphopt.graph import Size, arg, same_shape, shape
from graphopt.kernel import GPU, Case, Kernel, Tensor
from graphopt.kernels.cache import CASES as UPDATE_CASES
from graphopt.launch import current_target, launch
from graphopt.triton_math import dtype_refusal

TILE = 2048  # elements of a program, and the most that one head has: it holds whole heads
MOST_ROWS = 16  # of a program of `cache_update`, each of which is compared with POSITIONS
POSITIONS = 128  # compared with a program's rows at a time
GRID = 65535  # most programs in a grid's second and third direction (CUDA C++ Programming Guide, table 21)
MOST_HEADS = GRID // 3  # of q, of k and of v: their programs are beside each other in the second


@triton.jit
def cache_row(index_ptr, index_stride, length, FROM_START: tl.constexpr):
    """(the cache's row for this program's token, whether there is one); the token is `program_id(0)`.

    A position outside of the cache writes nothing: a kernel cannot raise, and must not touch other memory.
    """
    token = tl.program_id(0).to(tl.int64)
    if FROM_START:
        row = tl.load(index_ptr).to(tl.int64) + token
    else:
        row = tl.load(index_ptr + token * index_stride).to(tl.int64)
    return row, (row >= 0) & (row < length)


@triton.jit
def copy_heads(
    from_ptr, to_ptr, from_head_stride, to_head_stride, to_column_stride, heads, first, in_cache,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """to[first : first + HEADS] = from[the same]; the pointers are at their batch and row."""
    head = (first + tl.arange(0, HEADS))[:, None].to(tl.int64)
    columns = tl.arange(0, BLOCK_D)[None, :]
    kept = (head < heads) & (columns < D) & in_cache
    x = tl.load(from_ptr + head * from_head_stride + columns, mask=kept, other=0.0).to(tl.float32)
    write_at = head * to_head_stride + columns.to(tl.int64) * to_column_stride
    tl.store(to_ptr + write_at, x.to(to_ptr.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["k_heads", "v_heads", "k_length", "v_length"])
def _cache_write(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, index_ptr, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, k_cache_batch_stride, k_cache_head_stride,
    k_cache_row_stride, k_cache_column_stride, v_cache_batch_stride, v_cache_head_stride,
    v_cache_row_stride, v_cache_column_stride, index_stride, k_heads, v_heads, k_length, v_length,
    FROM_START: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, blocks of k's heads and then of v's, batch."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    block = tl.program_id(1)
    k_blocks = tl.cdiv(k_heads, HEADS)
    if block < k_blocks:
        row, in_cache = cache_row(index_ptr, index_stride, k_length, FROM_START)
        copy_heads(
            k_ptr + batch * k_batch_stride + token * k_row_stride,
            k_cache_ptr + batch * k_cache_batch_stride + row * k_cache_row_stride, k_head_stride,
            k_cache_head_stride, k_cache_column_stride, k_heads, block * HEADS, in_cache, HEADS, K_DIM,
            BLOCK_K,
        )  # fmt: skip
    else:
        row, in_cache = cache_row(index_ptr, index_stride, v_length, FROM_START)
        copy_heads(
            v_ptr + batch * v_batch_stride + token * v_row_stride,
            v_cache_ptr + batch * v_cache_batch_stride + row * v_cache_row_stride, v_head_stride,
            v_cache_head_stride, v_cache_column_stride, v_heads, (block - k_blocks) * HEADS, in_cache,
            HEADS, V_DIM, BLOCK_V,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "new_length"])
def _cache_update(
    cache_ptr, new_ptr, out_ptr, position_ptr, cache_batch_stride, cache_head_stride, cache_row_stride,
    new_batch_stride, new_head_stride, new_row_stride, out_batch_stride, out_head_stride, out_row_stride,
    position_stride, length, new_length,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows of the result, heads, batch. A row is read where it comes from, written once."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if position_ptr is None:
        source = row - length
        in_out = row < length + new_length
    else:
        source = tl.full((ROWS,), -1, tl.int64)  # the row of new that stands there; -1: the cache's own
        for start in range(0, new_length, POSITIONS):
            token = start + tl.arange(0, POSITIONS)
            in_new = token < new_length
            position = tl.load(position_ptr + token.to(tl.int64) * position_stride, mask=in_new, other=-1)
            hit = position.to(tl.int64)[None, :] == row[:, None]
            source = tl.maximum(source, tl.max(tl.where(hit, token[None, :], -1), 1).to(tl.int64))
        in_out = row < length
    columns = tl.arange(0, BLOCK_D)[None, :]
    kept = in_out[:, None] & (columns < D)
    is_new = (source >= 0)[:, None]
    cache_at = batch * cache_batch_stride + head * cache_head_stride + row[:, None] * cache_row_stride
    new_at = batch * new_batch_stride + head * new_head_stride + source[:, None] * new_row_stride
    out_at = batch * out_batch_stride + head * out_head_stride + row[:, None] * out_row_stride
    old = tl.load(cache_ptr + cache_at + columns, mask=kept & (is_new == 0), other=0.0).to(tl.float32)
    new = tl.load(new_ptr + new_at + columns, mask=kept & is_new, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_at + columns, tl.where(is_new, new, old).to(out_ptr.dtype.element_ty), mask=kept)


def block_of(columns: int) -> int:
    """The tile that holds so many columns; 1 for none."""
    return max(1, triton.next_power_of_2(columns))


def heads_at_once(*dims: int) -> int:
    """How many heads of one token a program takes: of their sizes alone, so that models share kernels."""
    return max(1, min(32, TILE // block_of(max(dims))))


def with_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself, or a copy where its last dimension is not contiguous: kernels read whole rows."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def index_of(position: torch.Tensor | None, start: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """(the tensor that says where rows go, its stride)."""
    if position is not None:
        return position, position.stride(0)
    assert start is not None  # the op takes one of both
    return start, 0


def cache_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    position: torch.Tensor | None,
    start: torch.Tensor | None,
) -> None:
    """k_cache[:, :, rows] = k; v_cache[:, :, rows] = v, in place."""
    k, v = with_rows(k), with_rows(v)
    heads = heads_at_once(k.shape[3], v.shape[3])
    index, index_stride = index_of(position, start)
    blocks = triton.cdiv(k.shape[1], heads) + triton.cdiv(v.shape[1], heads)
    launch(
        _cache_write,
        (k.shape[2], blocks, k.shape[0]),
        k,
        v,
        k_cache,
        v_cache,
        index,
        *k.stride()[:3],
        *v.stride()[:3],
        *k_cache.stride(),
        *v_cache.stride(),
        index_stride,
        k.shape[1],
        v.shape[1],
        k_cache.shape[2],
        v_cache.shape[2],
        FROM_START=position is None,
        HEADS=heads,
        K_DIM=k.shape[3],
        V_DIM=v.shape[3],
        BLOCK_K=block_of(k.shape[3]),
        BLOCK_V=block_of(v.shape[3]),
        num_warps=4 * 32 // current_target(k).warp_size,
    )


def cache_update(cache: torch.Tensor, new: torch.Tensor, position: torch.Tensor | None) -> torch.Tensor:
    """The cache with `new` appended (position None) or written at the rows `position`, as a new tensor."""
    cache, new = with_rows(cache), with_rows(new)
    batch, heads, length, head_dim = cache.shape
    if position is None:
        out = cache.new_empty((batch, heads, length + new.shape[2], head_dim))
    else:
        out = torch.empty_like(cache)
    block = block_of(head_dim)
    rows = min(MOST_ROWS, TILE // block)
    grid = (triton.cdiv(out.shape[2], rows), heads, batch)
    launch(
        _cache_update,
        grid if out.numel() else (0,),
        cache,
        new,
        out,
        position,
        *cache.stride()[:3],
        *new.stride()[:3],
        *out.stride()[:3],
        position.stride(0) if position is not None else 0,
        length,
        new.shape[2],
        ROWS=rows,
        POSITIONS=POSITIONS,
        D=head_dim,
        BLOCK_D=block,
        num_warps=4 * 32 // current_target(cache).warp_size,
    )
    return out


def grid_refusal(sizes: tuple[Size, ...]) -> str | None:
    """Why [B, H, ...] does not fit into a grid whose second direction is heads and third the batch."""
    for size, what, most in ((sizes[0], "batch", GRID), (sizes[1], "number of heads", MOST_HEADS)):
        if isinstance(size, int) and size > most:
            return f"{what} {size} > {most}, the most programs in that direction"
    return None


def dim_refusal(name: str, dim: Size, most: int) -> str | None:
    """Why a program cannot hold a head of that size: it is compiled in, and bounded."""
    if not isinstance(dim, int):
        return f"{name} is {dim}, no plain number"
    return f"{name} {dim} > {most}" if dim > most else None


def write_refuses(node: fx.Node) -> str | None:
    """Batches of k and v that differ, heads that are too long or too many, and other dtypes."""
    k, v = arg(node, "k"), arg(node, "v")
    assert isinstance(k, fx.Node) and isinstance(v, fx.Node)
    if not same_shape((shape(k)[0], shape(k)[2]), (shape(v)[0], shape(v)[2])):
        return f"v is {tuple(shape(v))}, k is {tuple(shape(k))}: another batch or length"
    long = dim_refusal("k's head_dim", shape(k)[3], TILE) or dim_refusal("v's head_dim", shape(v)[3], TILE)
    return long or grid_refusal(shape(k)) or grid_refusal(shape(v)) or dtype_refusal(node)


def update_refuses(node: fx.Node) -> str | None:
    """Other dtypes than fp32, fp16 and bf16, heads that are too long, and more of them than a grid takes."""
    cache = arg(node, "cache")
    assert isinstance(cache, fx.Node)
    long = dim_refusal("head_dim", shape(cache)[3], TILE)
    return long or grid_refusal(shape(cache)) or dtype_refusal(node)


def _write(
    name: str, k: tuple[int, ...], length: int, index: torch.dtype | None = torch.int64, **how: object
) -> Case:
    """k and v of one shape; index None is a start, `how` are layouts of new and cache."""
    new = Tensor(k, layout=str(how.get("new", "contiguous")))
    cache = Tensor((*k[:2], length, k[3]), layout=str(how.get("cache", "contiguous")))
    start = Tensor((), torch.int64, below=1) if index is None else None
    position = None if index is None else Tensor((k[2],), index, below=max(1, length))
    return Case(name, (new, new, cache, cache, position, start))


WRITE_CASES = (
    _write("tidy", (2, 4, 3, 8), 16),
    _write("ugly", (3, 1, 7, 5), 7),
    _write("one row", (1, 2, 1, 16), 9, new="transposed"),
    _write("int32", (1, 2, 2, 16), 9, torch.int32),
    _write("start", (2, 3, 5, 16), 9, None, new="transposed"),
    _write("strided cache", (2, 3, 5, 16), 9, cache="transposed"),
    _write("sliced cache", (2, 3, 5, 16), 9, None, cache="sliced", new="sliced"),
    _write("many heads", (1, 33, 2, 128), 4, new="sliced"),
    _write("one value for all", (2, 3, 5, 16), 9, new="expanded"),
    _write("nothing new", (2, 2, 0, 8), 5),
    _write("no batch", (0, 2, 3, 8), 5),
    _write("no columns", (1, 2, 3, 0), 5),
)
CASES = (
    *UPDATE_CASES,
    Case("sliced", (Tensor((2, 3, 9, 16), layout="sliced"), Tensor((2, 3, 4, 16), layout="sliced"), None)),
    Case("expanded, appended", (Tensor((2, 3, 9, 16), layout="expanded"), Tensor((2, 3, 1, 16)), None)),
    Case(
        "transposed cache",
        (
            Tensor((2, 3, 9, 16), layout="transposed"),
            Tensor((2, 3, 2, 16)),
            Tensor((2,), torch.int64, below=9),
        ),
    ),
    Case(
        "beyond a block",
        (Tensor((1, 1, 300, 32)), Tensor((1, 1, 130, 32)), Tensor((130,), torch.int32, below=300)),
    ),
    Case("block edge", (Tensor((1, 2, 60, 32)), Tensor((1, 2, 4, 32)), None)),
)

# One variant for any number of tokens and heads; and one of the longest heads.
WRITES = (
    *(
        _write(f"{tokens} tokens, {heads} heads", (1, heads, tokens, 128), 8192, new="transposed")
        for tokens in (1, 4096)
        for heads in (8, 32)
    ),
    _write("head_dim 2048", (1, 1, 1, TILE), 4096, None),
)
UPDATES = tuple(
    Case(
        f"{tokens} tokens",
        (Tensor((1, 8, 4096, 128)), Tensor((1, 8, tokens, 128), layout="transposed"), position),
    )
    for tokens in (1, 128)
    for position in (None, Tensor((tokens,), torch.int64, below=4096))
)

KERNELS = (
    Kernel("cache_write", "cache_write_triton", cache_write, write_refuses, GPU, WRITE_CASES, WRITES),
    Kernel("cache_update", "cache_update_triton", cache_update, update_refuses, GPU, CASES, UPDATES),
)
