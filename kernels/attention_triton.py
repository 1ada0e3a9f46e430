"""Attention over many queries, in Triton: one program a block of queries of one head, keys in a loop."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from graphopt.attention_cases import HALF, case, masks, must
from graphopt.kernel import GPU, Kernel, Tensor
from graphopt.launch import ALIGNED, current_target, launch
from graphopt.ops.define import wide
from graphopt.targets import Target
from graphopt.torch_private import fake_mode_of
from graphopt.triton_attention import (
    MOST_REGISTERS,
    absorb,
    inputs,
    mean_of_values,
    padded,
    refusal,
    seen_keys,
)

# ------------------------------------------------------------------------------------------------- device


@triton.jit
def _tile(
    ptr, rows, batch, kv_head, start, keys, stride,
    EDGE: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + BLOCK_N) of k or v, zeros past their ends; by descriptor where there is one."""
    if rows is not None:
        tile = rows.load([batch, kv_head, start, 0]).reshape(BLOCK_N, BLOCK)
    else:
        columns = tl.arange(0, BLOCK_N)
        dims = tl.arange(0, BLOCK)
        at = ptr + tl.cast(start, tl.int64) * stride + columns[:, None] * stride + dims[None, :]
        if EDGE:
            tile = tl.load(at, mask=(start + columns < keys)[:, None] & (dims < DIM)[None, :], other=0.0)
        elif DIM != BLOCK:
            tile = tl.load(at, mask=(dims < DIM)[None, :], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def _step(
    acc, total, peak, q, k_ptr, v_ptr, k_rows, v_rows, padding_ptr, bias_ptr, scale, softcap, window,
    batch, kv_head, start, positions, in_rows, keys,
    k_stride_k, v_stride_k, padding_stride_k, bias_stride_q, bias_stride_k,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Keys [start, start + BLOCK_N) taken in; EDGE where position hides some of them, or they end."""
    columns = tl.arange(0, BLOCK_N)
    in_keys = start + columns < keys
    k = _tile(k_ptr, k_rows, batch, kv_head, start, keys, k_stride_k, EDGE, HEAD_DIM, BLOCK_N, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    padding = None
    if padding_ptr is not None:
        at = padding_ptr + (start + columns).to(tl.int64) * padding_stride_k
        padding = tl.load(at, mask=in_keys, other=0) != 0
    chosen = None
    bias = None
    if bias_ptr is not None:
        rows = tl.arange(0, BLOCK_M)
        at = bias_ptr + tl.cast(start, tl.int64) * bias_stride_k
        at = at + rows[:, None] * bias_stride_q + columns[None, :] * bias_stride_k
        loaded = tl.load(at, mask=in_rows[:, None] & in_keys[None, :], other=0)
        if bias_ptr.dtype.element_ty == tl.int1:
            chosen = loaded != 0
        else:
            bias = loaded.to(tl.float32)
    seen = None
    if EDGE or padding is not None or chosen is not None:
        seen = seen_keys(
            positions, start + columns, keys, window, padding, chosen, CAUSAL, EDGE, BLOCK_M, BLOCK_N
        )
    v = _tile(v_ptr, v_rows, batch, kv_head, start, keys, v_stride_k, EDGE, VALUE_DIM, BLOCK_N, BLOCK_V)
    HIDES: tl.constexpr = EDGE or padding is not None or bias_ptr is not None
    return absorb(acc, total, peak, s, v, seen, bias, scale, softcap, HIDES)


@triton.jit
def _attention(
    q_ptr, k_ptr, v_ptr, k_rows, v_rows, out_ptr, lse_ptr, offset_ptr, padding_ptr, bias_ptr, sinks_ptr,
    scale, softcap, offset, window, heads, group, queries, keys,
    q_stride_b, q_stride_h, q_stride_q, k_stride_b, k_stride_h, k_stride_k,
    v_stride_b, v_stride_h, v_stride_k, padding_stride_b, padding_stride_k,
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, sinks_stride,
    CAUSAL: tl.constexpr, MEAN: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out [B, Q, H, Dv]; programs: blocks of queries (the last and longest first) of head 0, head 1, ..."""
    LOG2: tl.constexpr = 1.4426950408889634
    blocks = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    first = (blocks - 1 - pid % blocks) * BLOCK_M
    head = (pid // blocks % heads).to(tl.int64)
    batch = (pid // blocks // heads).to(tl.int64)
    kv_head = head // group

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    in_rows = first + rows < queries
    q_ptr += batch * q_stride_b + head * q_stride_h + first.to(tl.int64) * q_stride_q
    q = tl.load(
        q_ptr + rows[:, None] * q_stride_q + dims[None, :],
        mask=in_rows[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    k_ptr += batch * k_stride_b + kv_head * k_stride_h
    v_ptr += batch * v_stride_b + kv_head * v_stride_h
    if padding_ptr is not None:
        padding_ptr += batch * padding_stride_b
    if bias_ptr is not None:
        bias_ptr += batch * bias_stride_b + head * bias_stride_h + first.to(tl.int64) * bias_stride_q

    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    NATURAL: tl.constexpr = bias_ptr is not None and bias_ptr.dtype.element_ty != tl.int1
    if sinks_ptr is not None:  # one more key, that gives nothing
        sink = tl.load(sinks_ptr + head * sinks_stride).to(tl.float32)
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
        peak = tl.zeros([BLOCK_M], tl.float32) + (sink if NATURAL else sink * LOG2)

    # Blocks of keys: [low, high) are read, of which [inner_low, inner_high) hide nothing from any row.
    if offset_ptr is not None:
        offset += tl.load(offset_ptr).to(tl.int32)
    low_position = first + offset
    high_position = tl.minimum(first + BLOCK_M, queries) - 1 + offset
    bound = keys
    inner_bound = keys
    if CAUSAL:
        bound = tl.maximum(tl.minimum(keys, high_position + 1), 0)
        inner_bound = tl.maximum(tl.minimum(keys, low_position + 1), 0)
    low = 0
    inner_low = 0
    if window is not None:
        low = tl.maximum(low_position - window + 1, 0) // BLOCK_N
        inner_low = tl.cdiv(tl.maximum(high_position - window + 1, 0), BLOCK_N)
    high = tl.maximum(tl.cdiv(bound, BLOCK_N), low)
    inner_low = tl.minimum(inner_low, high)
    inner_high = tl.minimum(tl.maximum(inner_bound // BLOCK_N, inner_low), high)

    positions = first + rows + offset
    for block in range(inner_low, inner_high):
        acc, total, peak = _step(
            acc, total, peak, q, k_ptr, v_ptr, k_rows, v_rows, padding_ptr, bias_ptr, scale, softcap, window,
            batch.to(tl.int32), kv_head.to(tl.int32), block * BLOCK_N, positions, in_rows, keys,
            k_stride_k, v_stride_k, padding_stride_k, bias_stride_q, bias_stride_k,
            CAUSAL, False, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    left = inner_low - low
    for i in range(0, left + high - inner_high):  # the window's edge, then the diagonal or the end
        block = tl.where(i < left, low + i, inner_high + i - left)
        acc, total, peak = _step(
            acc, total, peak, q, k_ptr, v_ptr, k_rows, v_rows, padding_ptr, bias_ptr, scale, softcap, window,
            batch.to(tl.int32), kv_head.to(tl.int32), block * BLOCK_N, positions, in_rows, keys,
            k_stride_k, v_stride_k, padding_stride_k, bias_stride_q, bias_stride_k,
            CAUSAL, True, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip

    empty = (total == 0.0) & in_rows
    if lse_ptr is not None:
        lse = tl.log(total) + (peak if NATURAL else peak * 0.6931471805599453)
        lse_ptr += (batch * heads + head) * queries + first
        tl.store(lse_ptr + rows, tl.where(empty, float("-inf"), lse), mask=in_rows)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if MEAN:
        mean = mean_of_values(v_ptr, keys, v_stride_k, empty, VALUE_DIM, BLOCK_V)
        acc = tl.where(empty[:, None], mean[None, :], acc)
    value_dims = tl.arange(0, BLOCK_V)
    out_ptr += ((batch * queries + first) * heads + head) * VALUE_DIM
    tl.store(
        out_ptr + rows[:, None] * heads * VALUE_DIM + value_dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & (value_dims < VALUE_DIM)[None, :],
    )


# --------------------------------------------------------------------------------------------------- host


@dataclass(frozen=True)
class Config:
    """How one launch is cut: queries and keys of a tile, and what the compiler is told."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# By target and padded head size: the largest tiles that keep everything in registers with every kind of mask.
LARGE: dict[str, dict[int, Config]] = {
    "cuda:80": {64: Config(128, 64, 8, 3), 128: Config(64, 64, 8, 3), 256: Config(64, 32, 8, 2)},
    "cuda:90": {64: Config(128, 128, 8, 2), 128: Config(128, 128, 8, 2), 256: Config(128, 64, 8, 2)},
    "cuda:100": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 64, 8, 2)},
    "hip:gfx942": {64: Config(128, 64, 4, 1), 128: Config(128, 64, 4, 1), 256: Config(64, 32, 8, 1)},
}
# Fewer programs than multiprocessors with LARGE: smaller tiles, more programs.
MEDIUM: dict[str, dict[int, Config]] = {
    "cuda:80": {64: Config(64, 64, 4, 3), 128: Config(64, 64, 8, 3), 256: Config(64, 32, 8, 2)},
    "cuda:90": {64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 2), 256: Config(64, 32, 8, 2)},
    "cuda:100": {64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 2), 256: Config(64, 32, 8, 2)},
    "hip:gfx942": {64: Config(64, 64, 4, 1), 128: Config(64, 64, 4, 1), 256: Config(64, 32, 8, 1)},
}
# fp32 has no matrix instruction on NVIDIA, and its operands stand in registers.
FULL = Config(32, 32, 8, 1)


def config(target: Target, dims: int, itemsize: int, queries: int, heads: int) -> Config:
    """The tiles for `heads` heads (batch times heads) of a padded size of `dims`."""
    if itemsize == 4:
        return FULL if dims <= 128 else Config(16, 32, 4, 1)
    large = heads * triton.cdiv(queries, 128) >= target.multiprocessors
    return (LARGE if large else MEDIUM)[target.name][max(64, dims)]


def _descriptor(x: torch.Tensor, block: int, dim: int) -> TensorDescriptor | None:
    """k or v [B, Hk, K, D] in tiles [block, dim] for Hopper's copy engine; None where it cannot read x.

    It takes strides and addresses that are multiples of 16 bytes. It fills with zeros past the ends, and
    spares 40 registers of addresses a thread.
    """
    strides = x.stride()
    address = x.storage_offset() * x.element_size() if fake_mode_of((x,)) is not None else x.data_ptr()
    if 0 in x.shape or address % ALIGNED or strides[3] != 1:
        return None
    if any(s <= 0 or s * x.element_size() % ALIGNED for s in strides[:3]):
        return None
    return TensorDescriptor(x, list(x.shape), list(strides), [1, 1, block, dim])


def _launched(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, offset: int,
    offset_tensor: torch.Tensor | None, window: int | None, key_padding: torch.Tensor | None,
    bias: torch.Tensor | None, softcap: float | None, sinks: torch.Tensor | None, empty_rows_mean: bool,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The output, in memory [B, Q, H, Dv], and the lse where it is asked for."""
    x = inputs(
        q, k, v, scale, causal, offset, offset_tensor, window, key_padding, bias, softcap, sinks,
        empty_rows_mean,
    )  # fmt: skip
    (batch, heads, queries, dim), (_, kv_heads, keys, value_dim) = q.shape, v.shape
    out = q.new_empty((batch, queries, heads, value_dim))
    lse = q.new_empty((batch, heads, queries), dtype=wide(q.dtype)) if with_lse else None
    target = current_target(q)
    block_d, block_v = padded(dim), padded(value_dim)
    cut = config(target, max(block_d, block_v), q.element_size(), queries, batch * heads)
    if bias is not None:
        cut = replace(cut, block_n=min(cut.block_n, 64))  # a tile of it stands in registers too
    k_rows = v_rows = None
    if target.capability >= 90 and q.element_size() == 2:
        k_rows, v_rows = _descriptor(x.k, cut.block_n, block_d), _descriptor(x.v, cut.block_n, block_v)
        if k_rows is None or v_rows is None:
            k_rows = v_rows = None
            cut = LARGE["cuda:80"][max(64, block_d, block_v)]  # its addresses find room in registers
    launch(
        _attention,
        (triton.cdiv(queries, cut.block_m) * batch * heads,),
        x.q, x.k, x.v, k_rows, v_rows, out, lse, offset_tensor, key_padding, x.bias, sinks,
        x.scale, x.softcap, offset, window, heads, heads // kv_heads, queries, keys,
        *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3],
        *((0, 0) if key_padding is None else key_padding.stride()), *x.bias_strides,
        0 if sinks is None else sinks.stride(0),
        CAUSAL=causal, MEAN=x.mean, HEAD_DIM=dim, VALUE_DIM=value_dim,
        BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_D=block_d, BLOCK_V=block_v,
        num_warps=cut.warps, num_stages=cut.stages, maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool = False,
    offset: int = 0,
    offset_tensor: torch.Tensor | None = None,
    window: int | None = None,
    key_padding: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    empty_rows_mean: bool = False,
) -> torch.Tensor:
    """One launch. The result is [B, H, Q, Dv] in memory [B, Q, H, Dv]: joining the heads again is a view."""
    return _launched(
        q, k, v, scale, causal, offset, offset_tensor, window, key_padding, bias, softcap, sinks,
        empty_rows_mean, False,
    )[0]  # fmt: skip


def attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool = False,
    offset: int = 0,
    offset_tensor: torch.Tensor | None = None,
    window: int | None = None,
    key_padding: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    empty_rows_mean: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` and the log of each row's sum of exponentials, in the same launch."""
    out, lse = _launched(
        q, k, v, scale, causal, offset, offset_tensor, window, key_padding, bias, softcap, sinks,
        empty_rows_mean, True,
    )  # fmt: skip
    assert lse is not None
    return out, lse


# -------------------------------------------------------------------------------------------------- cases

CASES = (
    case("tidy", queries=32, keys=64, dim=64),
    case("ugly", heads=6, kv_heads=3, queries=71, keys=131, dim=20, batch=3, causal=True),
    case("edge of a block", queries=64, keys=128, causal=True),
    case("one past a block", queries=65, keys=129, causal=True),
    case("one head of 8", heads=8, kv_heads=1, queries=3, keys=9),
    case("wide values", value_dim=24, keys=40),
    case("narrow values", dim=40, value_dim=8, keys=40),
    case("one dimension", dim=1, keys=40),
    *(case(layout, queries=20, keys=40, layout=layout) for layout in ("contiguous", "sliced", "expanded")),
    case("one batch, one head", heads=1, kv_heads=1, batch=1),
    case("one key", keys=1),
    case("one query", queries=1, keys=70),
    case("no query", queries=0),
    case("no batch", batch=0),
    case("no key", keys=0),
    case("no key, mean", keys=0, empty_rows_mean=True, key_padding=Tensor((2, 0), torch.bool)),
    *(case(f"head_dim {d}", heads=2, kv_heads=1, queries=18, keys=40, dim=d) for d in (80, 96, 128, 256)),
    *(case(f"groups of {g}", heads=8, kv_heads=8 // g, queries=20, keys=40, batch=1) for g in (1, 4, 8)),
    *(
        case(name, heads=2, kv_heads=1, queries=70, keys=150, parts=parts)
        for name, parts in masks(70, 150).items()
    ),
    # As many programs as a GPU has multiprocessors.
    case("large tiles", heads=132, kv_heads=33, queries=9, keys=140, batch=1, causal=True, offset=131),
    case(
        "large tiles, padding", heads=132, kv_heads=33, queries=9, keys=70, batch=1, layout="contiguous",
        key_padding=Tensor((1, 70), torch.bool), empty_rows_mean=True,
    ),
)  # fmt: skip
LSE_CASES = tuple(
    c for c in CASES if c.name in ("tidy", "ugly", "sinks", "bias", "padding of all", "no key", "no query")
)


PADDED = {"key_padding": Tensor((1, 512), torch.bool), "empty_rows_mean": True}
MUST_ACCEPT = (
    *(must(f"prefill {d}", d, causal=True) for d in (64, 80, 96, 128, 256)),
    must("prefill, one head a group", 64, kv_heads=32, causal=True),
    must("prefill, groups of 8", 64, kv_heads=4, causal=True),
    must(
        "prefill of a cache", 128, keys=8192, causal=True, offset=4096,
        offset_tensor=Tensor((1,), torch.int64),
    ),
    must(
        "prefill, padded before", 64, causal=True, key_padding=Tensor((1, 4096), torch.bool),
        empty_rows_mean=True,
    ),
    must("prefill, window", 128, causal=True, window=1024),
    must("prefill, softcap and window", 256, causal=True, window=1024, softcap=50.0),
    must("prefill, sinks and window", 64, causal=True, window=128, sinks=Tensor((32,), HALF)),
    must("encoder", 64, 512, heads=12, kv_heads=12, batch=32, key_padding=Tensor((32, 512), torch.bool)),
    must("encoder, one text", 64, 512, heads=12, kv_heads=12, parts=PADDED),
    must("encoder, short text", 64, 128, heads=12, kv_heads=12, key_padding=Tensor((1, 128), torch.bool)),
    must("bias of heads", 64, 512, heads=16, kv_heads=16, batch=8, bias=Tensor((1, 16, 512, 512), HALF)),
    must("prefill, one text many times", 128, batch=2, layout="expanded", causal=True),  # no descriptor
    must("prefill, bias", 128, causal=True, bias=Tensor((1, 32, 1, 4096), HALF)),
    must("full precision", 64, dtype=None, causal=True),
    must("full precision, encoder", 128, 512, dtype=None, heads=12, kv_heads=12, parts=PADDED),
)  # fmt: skip

KERNELS = (
    Kernel(
        "attention", "attention_triton", attention, refusal, GPU, CASES, MUST_ACCEPT,
        (("_attention", "matrix"),),
    ),
    Kernel("attention_lse", "attention_lse_triton", attention_lse, refusal, GPU, LSE_CASES, LSE_CASES[:1]),
)  # fmt: skip
