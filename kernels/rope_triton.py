"""Rotary embedding of q and k, alone and with norms before and cache writes behind, in Triton: one launch.

A program turns some heads of one token; angles, norms and products are in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import fx

from graphopt.graph import arg, dtype, is_tensor, number, same_shape, shape
from graphopt.kernel import GPU, Case, Kernel, Tensor
from graphopt.kernels.cache_triton import (
    block_of,
    cache_row,
    copy_heads,
    dim_refusal,
    grid_refusal,
    heads_at_once,
    index_of,
    with_rows,
)
from graphopt.kernels.rope import CASES as SHARED_CASES
from graphopt.launch import current_target, launch
from graphopt.triton_math import dtype_refusal, rms_scaled

MAX_DIM = 256  # of a head: one program holds whole heads, and wider ones are not compiled ahead


@triton.jit
def _halves(ptr, at, kept, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two members of each pair of columns, [rows, BLOCK_HALF] each, fp32; `at` and `kept` [rows, 1]."""
    if INTERLEAVED:  # one wide load, taken apart in registers
        columns = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        x = tl.load(ptr + at + columns, mask=kept & (columns < 2 * HALF), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (x.shape[0], BLOCK_HALF, 2)))
    else:
        columns = tl.arange(0, BLOCK_HALF)[None, :]
        in_half = kept & (columns < HALF)
        first = tl.load(ptr + at + columns, mask=in_half, other=0.0).to(tl.float32)
        second = tl.load(ptr + at + HALF + columns, mask=in_half, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _turn(
    x_ptr, norm_ptr, cos_ptr, sin_ptr, y_ptr, x_head_stride, y_head_stride, y_column_stride, heads,
    first_head, in_y, eps, weight_offset,
    D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, CAST_BEFORE_SCALE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """y[heads] = rope(norm(x[heads])); the pointers are at their batch and row, those of cos and sin too."""
    HALF: tl.constexpr = ROTARY // 2
    wide_stride = tl.cast(y_column_stride, tl.int64)
    head = (first_head + tl.arange(0, HEADS))[:, None].to(tl.int64)
    is_head = head < heads
    x_at, y_at = head * x_head_stride, head * y_head_stride
    zero = tl.arange(0, 1)[:, None]
    always = zero == 0
    x1, x2 = _halves(x_ptr, x_at, is_head, HALF, BLOCK_HALF, INTERLEAVED)
    cos1, cos2 = _halves(cos_ptr, zero, always, HALF, BLOCK_HALF, INTERLEAVED)
    sin1, sin2 = _halves(sin_ptr, zero, always, HALF, BLOCK_HALF, INTERLEAVED)
    if D > ROTARY:
        columns = ROTARY + tl.arange(0, BLOCK_REST)[None, :]
        in_rest = is_head & (columns < D)
        rest = tl.load(x_ptr + x_at + columns, mask=in_rest, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        X_DTYPE: tl.constexpr = x_ptr.dtype.element_ty
        NORM_DTYPE: tl.constexpr = norm_ptr.dtype.element_ty
        squares = tl.sum(x1 * x1 + x2 * x2, 1, keep_dims=True)
        if D > ROTARY:
            squares += tl.sum(rest * rest, 1, keep_dims=True)
        inverse = tl.rsqrt(squares / D + eps)
        w1, w2 = _halves(norm_ptr, zero, always, HALF, BLOCK_HALF, INTERLEAVED)
        x1 = rms_scaled(x1 * inverse, w1, weight_offset, X_DTYPE, NORM_DTYPE, CAST_BEFORE_SCALE)
        x2 = rms_scaled(x2 * inverse, w2, weight_offset, X_DTYPE, NORM_DTYPE, CAST_BEFORE_SCALE)
        if D > ROTARY:
            w3 = tl.load(norm_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
            rest = rms_scaled(rest * inverse, w3, weight_offset, X_DTYPE, NORM_DTYPE, CAST_BEFORE_SCALE)
    y1 = (x1 * cos1 - x2 * sin1).to(y_ptr.dtype.element_ty)
    y2 = (x2 * cos2 + x1 * sin2).to(y_ptr.dtype.element_ty)
    if INTERLEAVED:
        pairs = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        y = tl.reshape(tl.join(y1, y2), (HEADS, 2 * BLOCK_HALF))
        tl.store(y_ptr + y_at + pairs * wide_stride, y, mask=is_head & (pairs < ROTARY) & in_y)
    else:
        half = tl.arange(0, BLOCK_HALF)[None, :]
        in_half = is_head & (half < HALF) & in_y
        tl.store(y_ptr + y_at + half * wide_stride, y1, mask=in_half)
        tl.store(y_ptr + y_at + (HALF + half) * wide_stride, y2, mask=in_half)
    if D > ROTARY:
        tl.store(y_ptr + y_at + columns * wide_stride, rest.to(y_ptr.dtype.element_ty), mask=in_rest & in_y)


@triton.jit(do_not_specialize=["q_heads", "k_heads", "v_heads", "k_length", "v_length"])
def _rope(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, q_out_ptr, k_out_ptr, v_out_ptr, index_ptr,
    q_batch_stride, q_head_stride, q_row_stride,
    k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride,
    cos_batch_stride, cos_row_stride, sin_batch_stride, sin_row_stride,
    q_out_batch_stride, q_out_head_stride, q_out_row_stride,
    k_out_batch_stride, k_out_head_stride, k_out_row_stride, k_out_column_stride,
    v_out_batch_stride, v_out_head_stride, v_out_row_stride, v_out_column_stride,
    index_stride, q_heads, k_heads, v_heads, k_length, v_length, eps, weight_offset,
    D: tl.constexpr, V_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    CAST_BEFORE_SCALE: tl.constexpr, FROM_START: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, blocks of q's heads, then of k's, then of v's where there is one, batch.

    With an index k_out and v_out are caches; without it the token's row is its own.
    """
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    block = tl.program_id(1)
    q_blocks = tl.cdiv(q_heads, HEADS)
    k_blocks = tl.cdiv(k_heads, HEADS)
    cos_ptr += batch * cos_batch_stride + token * cos_row_stride
    sin_ptr += batch * sin_batch_stride + token * sin_row_stride
    if block < q_blocks:
        _turn(
            q_ptr + batch * q_batch_stride + token * q_row_stride, q_norm_ptr, cos_ptr, sin_ptr,
            q_out_ptr + batch * q_out_batch_stride + token * q_out_row_stride, q_head_stride,
            q_out_head_stride, 1, q_heads, block * HEADS, token >= 0, eps, weight_offset, D, ROTARY,
            INTERLEAVED, CAST_BEFORE_SCALE, HEADS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    elif block < q_blocks + k_blocks:
        row, in_out = token, token >= 0
        if index_ptr is not None:
            row, in_out = cache_row(index_ptr, index_stride, k_length, FROM_START)
        _turn(
            k_ptr + batch * k_batch_stride + token * k_row_stride, k_norm_ptr, cos_ptr, sin_ptr,
            k_out_ptr + batch * k_out_batch_stride + row * k_out_row_stride, k_head_stride,
            k_out_head_stride, k_out_column_stride, k_heads, (block - q_blocks) * HEADS, in_out, eps,
            weight_offset, D, ROTARY, INTERLEAVED, CAST_BEFORE_SCALE, HEADS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        if v_ptr is not None:
            row, in_cache = cache_row(index_ptr, index_stride, v_length, FROM_START)
            copy_heads(
                v_ptr + batch * v_batch_stride + token * v_row_stride,
                v_out_ptr + batch * v_out_batch_stride + row * v_out_row_stride, v_head_stride,
                v_out_head_stride, v_out_column_stride, v_heads, (block - q_blocks - k_blocks) * HEADS,
                in_cache, HEADS, V_DIM, BLOCK_V,
            )  # fmt: skip


def _launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor,
    rotary_dim: int, interleaved: bool, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None,
    eps: float, weight_offset: float, cast_before_scale: bool, q_out: torch.Tensor, k_out: torch.Tensor,
    v_out: torch.Tensor | None, index: torch.Tensor | None, index_stride: int, from_start: bool,
) -> None:  # fmt: skip
    """The one launch of both ops."""
    q, k, cos, sin = (with_rows(t) for t in (q, k, cos, sin))
    q_norm, k_norm = (t.contiguous() if t is not None else None for t in (q_norm, k_norm))  # vectors of D
    v = with_rows(v) if v is not None else None
    batch, q_heads, tokens, head_dim = q.shape
    k_heads, v_heads = k.shape[1], v.shape[1] if v is not None else 0
    v_dim = v.shape[3] if v is not None else 1
    heads = heads_at_once(head_dim, v_dim)
    absent = (0, 0, 0, 0)
    # One table for the whole batch: stride 0, whatever its own is.
    cos_strides = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))
    sin_strides = (sin.stride(0) if sin.shape[0] > 1 else 0, sin.stride(1))
    launch(
        _rope,
        (tokens, sum(triton.cdiv(n, heads) for n in (q_heads, k_heads, v_heads)), batch),
        q, k, v, cos, sin, q_norm, k_norm, q_out, k_out, v_out, index,
        *q.stride()[:3],
        *k.stride()[:3],
        *(v.stride()[:3] if v is not None else absent[:3]),
        *cos_strides, *sin_strides,
        *q_out.stride()[:3],
        *k_out.stride(),
        *(v_out.stride() if v_out is not None else absent),
        index_stride, q_heads, k_heads, v_heads,
        k_out.shape[2], v_out.shape[2] if v_out is not None else 0, float(eps), float(weight_offset),
        D=head_dim, V_DIM=v_dim, ROTARY=int(rotary_dim), INTERLEAVED=bool(interleaved),
        CAST_BEFORE_SCALE=bool(cast_before_scale), FROM_START=from_start, HEADS=heads,
        BLOCK_HALF=block_of(rotary_dim // 2), BLOCK_REST=block_of(head_dim - rotary_dim),
        BLOCK_V=block_of(v_dim), num_warps=4 * 32 // current_target(q).warp_size,
    )  # fmt: skip


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """An empty [B, H, S, D] that lies in memory as [B, S, H, D]: attention and its output read it so."""
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotary_dim: int,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x * cos + rotated(x) * sin on the first rotary_dim columns of q [B, H, S, D] and k [B, Hk, S, D]."""
    q_out, k_out = _by_token(q), _by_token(k)
    _launch(
        q, k, None, cos, sin, rotary_dim, interleaved, None, None, 0.0, 0.0, False,
        q_out, k_out, None, None, 0, False,
    )  # fmt: skip
    return q_out, k_out


def rope_write(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    rotary_dim: int, interleaved: bool, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None,
    eps: float, weight_offset: float, cast_before_scale: bool, k_cache: torch.Tensor, v_cache: torch.Tensor,
    position: torch.Tensor | None, start: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """rope(norm(q)), with rope(norm(k)) and v written into the caches."""
    q_out = _by_token(q)
    index, index_stride = index_of(position, start)
    scales = cast_before_scale and q_norm is not None  # no variant of its own where nothing is scaled
    _launch(
        q, k, v, cos, sin, rotary_dim, interleaved, q_norm, k_norm, eps, weight_offset, scales,
        q_out, k_cache, v_cache, index, index_stride, position is None,
    )  # fmt: skip
    return q_out


def refuses(node: fx.Node) -> str | None:
    """q and k that differ in more than heads, heads that are too long or too many, and other dtypes."""
    q, k = arg(node, "q"), arg(node, "k")
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node)
    of_q, of_k = shape(q), shape(k)
    if not same_shape((of_q[0], *of_q[2:]), (of_k[0], *of_k[2:])):
        return f"k is {tuple(of_k)}, q is {tuple(of_q)}: more than the number of heads differs"
    rotary = arg(node, "rotary_dim")
    if not isinstance(rotary, int):
        return f"rotary_dim is {number(rotary)}, no plain number"
    refusal = dim_refusal("head_dim", of_q[3], MAX_DIM)
    return refusal or grid_refusal(of_q) or grid_refusal(of_k) or dtype_refusal(node)


def write_refuses(node: fx.Node) -> str | None:
    """As `refuses`, a v that `cache_write` refuses, and norm weights that would raise the key's dtype."""
    k, v, weight = arg(node, "k"), arg(node, "v"), arg(node, "q_norm")
    assert isinstance(k, fx.Node) and isinstance(v, fx.Node)
    if not same_shape((shape(k)[0], shape(k)[2]), (shape(v)[0], shape(v)[2])):
        return f"v is {tuple(shape(v))}, k is {tuple(shape(k))}: another batch or length"
    refusal = dim_refusal("v's head_dim", shape(v)[3], MAX_DIM) or grid_refusal(shape(v))
    if refusal is not None:
        return refusal
    if is_tensor(weight) and arg(node, "cast_before_scale"):
        for name, other in (("q_norm", "q"), ("k_norm", "k")):
            scale, x = arg(node, name), arg(node, other)
            assert isinstance(scale, fx.Node) and isinstance(x, fx.Node)
            if dtype(scale) != dtype(x):
                return f"{name} is {dtype(scale)}, {other} is {dtype(x)}: the result would be promoted"
    return refuses(node)


def _case(
    name: str, q: tuple[int, ...], kv_heads: int, rotary_dim: int, interleaved: bool = False, **how: object
) -> Case:
    """how: `batch` and `dtype` of the tables, `layout` of q and k."""
    layout = str(how.get("layout", "transposed"))
    table = Tensor((int(str(how.get("batch", 1))), q[2], rotary_dim), how.get("dtype"))  # type: ignore[arg-type]
    k = (q[0], kv_heads, *q[2:])
    return Case(
        name, (Tensor(q, layout=layout), Tensor(k, layout=layout), table, table, rotary_dim, interleaved)
    )


def _write(
    case: Case,
    length: int,
    index: torch.dtype | None = torch.int64,
    norm: bool = False,
    offset: float = 0.0,
    cast: bool = True,
    cache_layout: str = "contiguous",
    norm_dtype: torch.dtype | None = None,
) -> Case:
    """The same call of `rope_write`, with a v like k; index None is a start."""
    q, k, cos, sin, rotary_dim, interleaved = case.arguments
    assert isinstance(k, Tensor)
    weight = Tensor((k.shape[3],), norm_dtype) if norm else None
    cache = Tensor((*k.shape[:2], length, k.shape[3]), layout=cache_layout)
    position = None if index is None else Tensor((k.shape[2],), index, below=max(1, length))
    start = Tensor((), torch.int64, below=1) if index is None else None
    arguments = (q, k, k, cos, sin, rotary_dim, interleaved, weight, weight, 1e-6, offset, cast)
    return Case(case.name, (*arguments, cache, cache, position, start))


CASES = (
    *SHARED_CASES,
    _case("fp32 tables", (2, 4, 5, 16), 2, 16, dtype=torch.float32),
    _case("merged", (2, 4, 5, 24), 2, 24, layout="sliced"),
    _case("expanded", (2, 4, 5, 16), 2, 8, layout="expanded"),
    _case("more heads than a block", (1, 33, 2, 64), 1, 64),
    _case("ugly, interleaved, partial", (2, 3, 7, 22), 3, 10, True, batch=2),
    _case("no rotation", (2, 4, 3, 16), 2, 0),
)
WRITE_CASES = (
    _write(_case("tidy", (2, 4, 8, 16), 2, 16), 16),
    _write(_case("ugly", (3, 5, 7, 10), 1, 10, batch=3), 9, torch.int32),
    _write(_case("one token", (1, 4, 1, 16), 2, 16), 9, None),
    _write(_case("normed", (2, 4, 5, 16), 2, 16), 9, norm=True),
    _write(_case("normed, ugly, partial", (2, 3, 7, 22), 1, 10), 9, None, True, 1.0, False),
    _write(_case("normed, shifted, interleaved", (2, 3, 4, 20), 1, 12, True), 9, None, True, 1.0, True),
    _write(_case("fp32 norm", (2, 4, 5, 16), 2, 16), 9, None, True, 1.0, False, norm_dtype=torch.float32),
    _write(_case("strided cache", (2, 4, 5, 16), 2, 8), 9, cache_layout="transposed"),
    _write(_case("sliced cache", (2, 4, 5, 16), 2, 16, layout="sliced"), 9, None, cache_layout="sliced"),
    _write(_case("expanded", (2, 4, 5, 16), 2, 16, layout="expanded"), 9),
    _write(_case("no tokens", (2, 4, 0, 16), 2, 16), 9),
)


def _shapes(
    name: str, head_dim: int, rotary_dim: int, heads: tuple[int, int], interleaved: bool = False
) -> tuple[Case, ...]:
    """One token and many: one compiled variant."""
    q, k = heads
    return tuple(
        _case(f"{name}, {tokens} tokens", (1, q, tokens, head_dim), k, rotary_dim, interleaved)
        for tokens in (1, 4096)
    )


# A variant for each head_dim; the number of heads, of tokens and the layout make none.
MUST = (
    *_shapes("partial", 80, 32, (32, 32)),
    *_shapes("interleaved, partial", 256, 64, (16, 16), True),
)
WRITES = (
    *(_write(c, 8192, None) for c in _shapes("heads 4:1", 64, 64, (32, 8))),
    *(_write(c, 8192) for c in _shapes("heads 1:1", 96, 96, (32, 32))),
    *(_write(c, 8192, None, norm=True) for c in _shapes("normed, heads 8:1", 128, 128, (64, 8))),
    *(_write(c, 8192) for c in _shapes("heads 2:1", 256, 256, (8, 4))),
    *(_write(c, 8192, None, norm=True, offset=1.0) for c in _shapes("normed, partial", 256, 64, (16, 2))),
)

KERNELS = (
    Kernel("rope", "rope_triton", rope, refuses, GPU, CASES, MUST),
    Kernel("rope_write", "rope_write_triton", rope_write, write_refuses, GPU, WRITE_CASES, WRITES),
)
