"""Attention of few queries over long keys, in Triton: each kv head's keys split over programs, one launch.

The heads of a group times the queries are the rows of one tile, so that a key is read once. Each program
writes its (values, total, peak) in fp32; the last one of a kv head to arrive puts the parts together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import fx

from graphopt.attention_cases import HALF, case, masks, must
from graphopt.counters import counters
from graphopt.graph import shape
from graphopt.kernel import GPU, Kernel, Tensor
from graphopt.launch import current_target, launch
from graphopt.targets import Target
from graphopt.triton_attention import (
    MOST_REGISTERS,
    absorb,
    inputs,
    mean_of_values,
    padded,
    refusal,
    seen_keys,
)

MOST_QUERIES = 16
MOST_ROWS = 64  # of a tile; more heads times queries are more tiles, that read the keys again
SEGMENT = 256  # keys that are worth a program
PARTS = 8192  # elements of parts joined at a time: 64 registers a thread

# ------------------------------------------------------------------------------------------------- device


@triton.jit
def _finish(
    acc, total, out_ptr, v_ptr, first, batch, kv_head, heads, group, queries, keys, v_stride_k,
    MEAN: tl.constexpr, ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The rows' weighted means, written; row = query * group + head of the group, from `first` on."""
    rows = first + tl.arange(0, ROWS)
    value_dims = tl.arange(0, BLOCK_V)
    in_rows = rows < queries * group
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if MEAN:
        empty = (total == 0.0) & in_rows
        mean = mean_of_values(v_ptr, keys, v_stride_k, empty, VALUE_DIM, BLOCK_V)
        acc = tl.where(empty[:, None], mean[None, :], acc)
    at = ((batch * queries + rows // group) * heads + kv_head * group + rows % group) * VALUE_DIM
    tl.store(
        out_ptr + at[:, None] + value_dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & (value_dims < VALUE_DIM)[None, :],
    )


@triton.jit
def _joined(
    parts_ptr, peaks_ptr, totals_ptr, place, active,
    NATURAL: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(acc [KEPT, BLOCK_V], total [KEPT]) of all `active` segments, CHUNK of them at a time."""
    UNIT: tl.constexpr = 1.4426950408889634 if NATURAL else 1.0
    rows = tl.arange(0, KEPT)
    value_dims = tl.arange(0, BLOCK_V)
    acc = tl.zeros([KEPT, BLOCK_V], tl.float32)
    total = tl.zeros([KEPT], tl.float32)
    peak = tl.full([KEPT], float("-inf"), tl.float32)
    for start in range(0, active, CHUNK):
        segments = start + tl.arange(0, CHUNK)
        at = (place + segments)[:, None] * ROWS + rows[None, :]
        in_parts = (segments < active)[:, None]
        peaks = tl.load(peaks_ptr + at, mask=in_parts, other=float("-inf"), cache_modifier=".cg").to(
            tl.float32
        )
        totals = tl.load(totals_ptr + at, mask=in_parts, other=0.0, cache_modifier=".cg").to(tl.float32)
        parts = tl.load(
            parts_ptr + at[:, :, None] * BLOCK_V + value_dims[None, None, :],
            mask=in_parts[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        ).to(tl.float32)
        higher = tl.maximum(peak, tl.max(peaks, 0))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2((peak - anchor) * UNIT)
        weights = tl.exp2((peaks - anchor[None, :]) * UNIT)
        total = total * fade + tl.sum(weights * totals, 0)
        acc = acc * fade[:, None] + tl.sum(weights[:, :, None] * parts, 0)
        peak = higher
    return acc, total


@triton.jit
def _attention_split(
    q_ptr, k_ptr, v_ptr, out_ptr, parts_ptr, arrived_ptr, offset_ptr, padding_ptr, bias_ptr, sinks_ptr,
    scale, softcap, offset, window, tiles, kv_heads, group, queries, keys,
    q_stride_b, q_stride_h, q_stride_q, k_stride_b, k_stride_h, k_stride_k,
    v_stride_b, v_stride_h, v_stride_k, padding_stride_b, padding_stride_k,
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, sinks_stride,
    CAUSAL: tl.constexpr, MEAN: tl.constexpr, SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """out [B, Q, H, Dv]; programs (tile of rows of a kv head of a batch, segment of its keys)."""
    LOG2: tl.constexpr = 1.4426950408889634
    NATURAL: tl.constexpr = bias_ptr is not None and bias_ptr.dtype.element_ty != tl.int1
    pid = tl.program_id(0)
    segment = tl.program_id(1)
    first = pid % tiles * ROWS
    kv_head = (pid // tiles % kv_heads).to(tl.int64)
    batch = (pid // tiles // kv_heads).to(tl.int64)
    heads = kv_heads * group

    # The keys that any row sees, [low, bound), in blocks; this program's share of them.
    if offset_ptr is not None:
        offset += tl.load(offset_ptr).to(tl.int32)
    bound = keys
    if CAUSAL:
        bound = tl.maximum(tl.minimum(keys, queries + offset), 0)
    low = 0
    if window is not None:
        low = tl.maximum(offset - window + 1, 0) // BLOCK_N
    count = tl.maximum(tl.cdiv(bound, BLOCK_N) - low, 0)
    share = tl.maximum(tl.cdiv(count, tl.num_programs(1)), LEAST)
    active = tl.maximum(tl.cdiv(count, share), 1)
    begin = low + segment * share
    end = tl.minimum(begin + share, low + count)

    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_V)
    in_rows = rows < queries * group
    row_heads = kv_head * group + rows % group
    row_queries = rows // group
    positions = row_queries + offset

    if segment < active:
        q_ptr += batch * q_stride_b
        q = tl.load(
            q_ptr + (row_heads * q_stride_h + row_queries * q_stride_q)[:, None] + dims[None, :],
            mask=in_rows[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        k_ptr += batch * k_stride_b + kv_head * k_stride_h
        v_ptr += batch * v_stride_b + kv_head * v_stride_h
        acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        if sinks_ptr is not None:  # one more key of the first segment, that gives nothing
            sink = tl.load(sinks_ptr + row_heads * sinks_stride, mask=in_rows, other=0.0).to(tl.float32)
            sink = tl.where(segment == 0, sink if NATURAL else sink * LOG2, float("-inf"))
            total = tl.where(sink == float("-inf"), 0.0, 1.0)
            peak = sink

        for block in range(begin, end):
            start = block * BLOCK_N
            at = tl.cast(start, tl.int64) + columns
            in_keys = start + columns < bound
            k = tl.load(
                k_ptr + at[:, None] * k_stride_k + dims[None, :],
                mask=in_keys[:, None] & (dims < HEAD_DIM)[None, :],
                other=0.0,
            )
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            padding = None
            if padding_ptr is not None:
                kept_ptr = padding_ptr + batch * padding_stride_b + at * padding_stride_k
                padding = tl.load(kept_ptr, mask=in_keys, other=0) != 0
            chosen = None
            bias = None
            if bias_ptr is not None:
                row_at = batch * bias_stride_b + row_heads * bias_stride_h + row_queries * bias_stride_q
                loaded = tl.load(
                    bias_ptr + row_at[:, None] + at[None, :] * bias_stride_k,
                    mask=in_rows[:, None] & in_keys[None, :],
                    other=0,
                )
                if NATURAL:
                    bias = loaded.to(tl.float32)
                else:
                    chosen = loaded != 0
            seen = seen_keys(
                positions, start + columns, bound, window, padding, chosen, CAUSAL, True, ROWS, BLOCK_N
            )
            v = tl.load(
                v_ptr + at[:, None] * v_stride_k + value_dims[None, :],
                mask=in_keys[:, None] & (value_dims < VALUE_DIM)[None, :],
                other=0.0,
            )
            acc, total, peak = absorb(acc, total, peak, s, v, seen, bias, scale, softcap, True)

        if not SPLIT:
            _finish(
                acc, total, out_ptr, v_ptr, first, batch, kv_head, heads, group, queries, keys, v_stride_k,
                MEAN, ROWS, VALUE_DIM, BLOCK_V,
            )  # fmt: skip
        else:
            place = pid.to(tl.int64) * tl.num_programs(1)
            size = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * ROWS
            peaks_ptr = parts_ptr + size * BLOCK_V
            totals_ptr = peaks_ptr + size
            slots = (place + segment) * ROWS + tl.arange(0, ROWS)
            tl.store(peaks_ptr + slots, peak, mask=in_rows, cache_modifier=".cg")
            tl.store(totals_ptr + slots, total, mask=in_rows, cache_modifier=".cg")
            tl.store(
                parts_ptr + slots[:, None] * BLOCK_V + value_dims[None, :],
                acc,
                mask=in_rows[:, None],
                cache_modifier=".cg",
            )
            tl.debug_barrier()  # every thread's part is written before one thread says so
            arrived = tl.atomic_add(arrived_ptr + pid, 1, sem="acq_rel", scope="gpu")
            if arrived == active - 1:
                tl.store(arrived_ptr + pid, 0)  # for the next launch
                acc_all, total_all = _joined(
                    parts_ptr, peaks_ptr, totals_ptr, place, active, NATURAL, ROWS, KEPT, BLOCK_V, CHUNK
                )
                _finish(
                    acc_all, total_all, out_ptr, v_ptr, first, batch, kv_head, heads, group, queries, keys,
                    v_stride_k, MEAN, KEPT, VALUE_DIM, BLOCK_V,
                )  # fmt: skip


# --------------------------------------------------------------------------------------------------- host


@dataclass(frozen=True)
class Cut:
    """How one launch is cut: rows and tiles of rows of a kv head, keys of a block, segments."""

    rows: int
    tiles: int
    block_n: int
    segments: int
    warps: int
    stages: int


def cut_of(target: Target, dims: int, itemsize: int, rows: int, kv_heads: int, keys: int) -> Cut:
    """The cut for `kv_heads` (batch times kv heads), each with `rows` rows, of a padded size of `dims`."""
    tile = min(max(16, triton.next_power_of_2(rows)), MOST_ROWS if itemsize < 4 and dims <= 128 else 16)
    tiles = triton.cdiv(rows, tile)
    wanted = triton.cdiv(2 * target.multiprocessors, max(1, tiles * kv_heads))
    segments = max(1, min(wanted, keys // SEGMENT))
    if itemsize == 4:  # products without matrix instructions, whose operands stand in registers
        return Cut(tile, tiles, 32 if dims <= 128 else 16, segments, 8, 1)
    warps = 8 if tile > 16 and dims > 64 else 4
    stages = 1 if target.is_hip else 4 if target.capability >= 90 else 3
    return Cut(tile, tiles, 64 if dims <= 128 else 32, segments, warps, stages)


def attention_split(
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
    x = inputs(
        q, k, v, scale, causal, offset, offset_tensor, window, key_padding, bias, softcap, sinks,
        empty_rows_mean,
    )  # fmt: skip
    (batch, heads, queries, dim), (_, kv_heads, keys, value_dim) = q.shape, v.shape
    group = heads // kv_heads
    block_d, block_v = padded(dim), padded(value_dim)
    cut = cut_of(
        current_target(q), max(block_d, block_v), q.element_size(), group * queries, batch * kv_heads, keys
    )
    programs = cut.tiles * kv_heads * batch
    out = q.new_empty((batch, queries, heads, value_dim))
    parts = arrived = None
    if cut.segments > 1:
        parts = q.new_empty((programs * cut.segments * cut.rows * (block_v + 2),), dtype=torch.float32)
        arrived = counters(q, programs)
    kept = min(cut.rows, triton.next_power_of_2(max(1, group * queries)))
    launch(
        _attention_split,
        (programs, cut.segments),
        x.q, x.k, x.v, out, parts, arrived, offset_tensor, key_padding, x.bias, sinks,
        x.scale, x.softcap, offset, window, cut.tiles, kv_heads, group, queries, keys,
        *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3],
        *((0, 0) if key_padding is None else key_padding.stride()), *x.bias_strides,
        0 if sinks is None else sinks.stride(0),
        CAUSAL=causal, MEAN=x.mean, SPLIT=cut.segments > 1, HEAD_DIM=dim, VALUE_DIM=value_dim,
        ROWS=cut.rows, KEPT=kept, BLOCK_N=cut.block_n, BLOCK_D=block_d, BLOCK_V=block_v,
        CHUNK=max(1, PARTS // (kept * block_v)), LEAST=SEGMENT // cut.block_n,
        num_warps=cut.warps, num_stages=cut.stages, maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    return out.transpose(1, 2)


def attention_split_refuses(node: fx.Node) -> str | None:
    """More than 16 queries, or an unknown number of them; and what `attention_triton` refuses."""
    q = node.args[0]
    assert isinstance(q, fx.Node)
    queries = shape(q)[2]
    if not isinstance(queries, int):
        return f"{queries} queries is symbolic"
    if queries > MOST_QUERIES:
        return f"{queries} queries > {MOST_QUERIES}"
    return refusal(node)


# -------------------------------------------------------------------------------------------------- cases

CASES = (
    case("tidy", queries=1, keys=64, dim=64),
    case("ugly", heads=6, kv_heads=3, queries=5, keys=171, dim=20, batch=3, causal=True, offset=166),
    case("edge of a block", queries=16, keys=64, causal=True),
    case("two segments", queries=1, keys=512, dim=64),
    case("one short of two segments", queries=1, keys=511),
    case("five segments", queries=2, keys=1283, causal=True, offset=1281),
    case("five segments, mostly empty", queries=2, keys=1283, causal=True, offset=300),
    case("five segments, one used", queries=1, keys=1283, causal=True, offset=9),
    case("two tiles of rows", heads=9, kv_heads=1, queries=8, keys=530, batch=1),
    case("wide values", queries=1, value_dim=24, keys=600),
    case("narrow values", queries=1, dim=40, value_dim=8, keys=600),
    case("one dimension", queries=1, dim=1, keys=40),
    *(case(layout, queries=3, keys=520, layout=layout) for layout in ("contiguous", "sliced", "expanded")),
    case("one batch, one head", heads=1, kv_heads=1, queries=1, batch=1),
    case("one key", queries=2, keys=1),
    case("no query", queries=0, keys=600),
    case("no batch", batch=0, keys=600),
    case("no key", queries=1, keys=0),
    case("no key, mean", keys=0, empty_rows_mean=True, key_padding=Tensor((2, 0), torch.bool)),
    *(case(f"head_dim {d}", heads=2, kv_heads=1, queries=2, keys=520, dim=d) for d in (80, 96, 128, 256)),
    *(case(f"groups of {g}", heads=8, kv_heads=8 // g, queries=1, keys=520, batch=1) for g in (1, 4, 8)),
    *(
        case(name, heads=2, kv_heads=1, queries=3, keys=600, parts=parts)
        for name, parts in masks(3, 600).items()
    ),
)

# A cache's length comes from a tensor, which here holds 0: the int is what it would.
CACHE = {"causal": True, "offset": 4080, "offset_tensor": Tensor((1,), torch.int64)}
PADDING = Tensor((8, 4096), torch.bool)
SINKS = Tensor((32,), HALF)
MUST_ACCEPT = (
    *(must(f"decode {d}", d, 1, keys=4096, parts=CACHE) for d in (64, 80, 96, 128, 256)),
    must("decode, one head a group", 64, 1, kv_heads=32, keys=8192, parts=CACHE),
    must("decode, groups of 8", 64, 1, kv_heads=4, keys=32768, parts=CACHE),
    must("decode, one kv head", 128, 1, heads=64, kv_heads=1, keys=8192, parts=CACHE),
    must("decode, 71 heads on one", 64, 1, heads=71, kv_heads=1, keys=2048, parts=CACHE),
    must("decode, batch of 8", 128, 1, batch=8, keys=4096, key_padding=PADDING, parts=CACHE),
    must("decode, window, softcap", 256, 1, keys=4096, window=1024, softcap=50.0, parts=CACHE),
    must("decode, window, sinks", 64, 1, kv_heads=4, keys=4096, window=128, sinks=SINKS, parts=CACHE),
    must("four queries", 128, 4, keys=4096, parts=CACHE),
    must("decode, bias", 128, 1, batch=16, keys=4096, bias=Tensor((1, 32, 1, 4096), HALF)),
    must("full precision", 64, 1, keys=4096, dtype=None, parts=CACHE),
    must("full precision, batch of 8", 128, 1, batch=8, keys=4096, dtype=None, parts=CACHE),
)

KERNELS = (
    Kernel(
        "attention", "attention_split_triton", attention_split, attention_split_refuses, GPU, CASES,
        MUST_ACCEPT, (("_attention_split", "wide_loads"),),
    ),
)  # fmt: skip
