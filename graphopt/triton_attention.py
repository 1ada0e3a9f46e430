"""What attention's Triton kernels share: one tile of keys taken into a running softmax, and what both refuse.

All of it computes in fp32. Scores are in units of log 2 (weights are 2^(s - peak)) unless a bias is added:
then they are natural, as a bias of finfo.min times log2(e) would become -inf and hide what it must not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import fx

from graphopt.graph import arg, dtype, number, shape
from graphopt.triton_math import tanh

LOG2E = 1.4426950408889634  # log2(e)
LN2 = 0.6931471805599453
MOST_DIM = 256  # a wider accumulator of 64 rows leaves no registers for the scores
# NVIDIA's assembler, left to itself, spills 8 bytes here and there to stay at 96 or 128; saying its limit of
# 255 stops that.
MOST_REGISTERS = 255
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


# ------------------------------------------------------------------------------------------------- device


@triton.jit
def seen_keys(
    positions, keys, bound, window, padding, chosen,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """True where a row sees a key [ROWS, BLOCK_N]; without EDGE position hides none."""
    seen = tl.full([ROWS, BLOCK_N], True, tl.int1)
    if EDGE:
        seen = seen & (keys < bound)[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= positions[:, None])
        if window is not None:
            seen = seen & (keys[None, :] > positions[:, None] - window)
    if padding is not None:
        seen = seen & padding[None, :]
    if chosen is not None:
        seen = seen & chosen
    return seen


@triton.jit
def absorb(
    acc, total, peak, s, v, seen, bias, scale, softcap,
    HIDES: tl.constexpr,
):  # fmt: skip
    """A tile of products s = q @ k^T [ROWS, BLOCK_N] and its values taken into (acc, total, peak).

    Args:
        acc, total, peak: weighted values [ROWS, BLOCK_V], sum of weights and greatest score [ROWS], fp32.
        seen: None where every row sees every key.
        bias: fp32 [ROWS, BLOCK_N] or None.
        scale, softcap: in the units that `scales` gives.
        HIDES: whether a row may have seen no key yet.
    """
    LOG2: tl.constexpr = 1.4426950408889634
    if softcap is not None:
        s = softcap * tanh(s * scale)
    elif bias is not None:
        s = s * scale
    if bias is not None:
        s = s + bias
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    highest = tl.max(s, 1)
    if softcap is None and bias is None:
        highest = highest * scale  # not on the tile: there it joins the subtraction in one instruction
        s = s * scale
    higher = tl.maximum(peak, highest)
    anchor = higher
    if HIDES:
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
    if bias is not None:
        weights = tl.exp2((s - anchor[:, None]) * LOG2)
        fade = tl.exp2((peak - anchor) * LOG2)
    else:
        weights = tl.exp2(s - anchor[:, None])
        fade = tl.exp2(peak - anchor)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, total, higher


@triton.jit
def mean_of_values(v_ptr, keys, v_stride_k, empty, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr):
    """The mean of all rows of v [BLOCK_V] where any row is `empty`; else zeros, and nothing is read."""
    CHUNK: tl.constexpr = 16
    columns = tl.arange(0, BLOCK_V)
    needed = tl.max(empty.to(tl.int32), 0) * keys
    sums = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, needed, CHUNK):
        rows = start + tl.arange(0, CHUNK)
        in_v = (rows < keys)[:, None] & (columns < VALUE_DIM)[None, :]
        v = tl.load(v_ptr + rows.to(tl.int64)[:, None] * v_stride_k + columns[None, :], mask=in_v, other=0.0)
        sums += tl.sum(v.to(tl.float32), 0)
    return sums / tl.maximum(keys, 1).to(tl.float32)


# --------------------------------------------------------------------------------------------------- host


@dataclass(frozen=True)
class Inputs:
    """What both launchers pass on, made fit for the kernels.

    Attributes:
        q, k, v: last dimension contiguous; q negated where the scale is negative.
        scale, softcap: in the kernels' units.
        bias: a view of the scores' shape (stride 0 where it is broadcast), or None.
        bias_strides: its strides, zeros for None.
        mean: whether a row without a key may exist and gets the mean of v.
        hides: whether a row may see no key of a tile that is inside the triangle and the window.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    softcap: float | None
    bias: torch.Tensor | None
    bias_strides: tuple[int, ...]
    mean: bool
    hides: bool


def inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, offset: int,
    offset_tensor: torch.Tensor | None, window: int | None, key_padding: torch.Tensor | None,
    bias: torch.Tensor | None, softcap: float | None, sinks: torch.Tensor | None, empty_rows_mean: bool,
) -> Inputs:  # fmt: skip
    """The launchers' arguments in the kernels' terms."""
    if scale <= 0:  # the kernels take scale * max(s) for max(scale * s): q takes the sign
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    added = bias is not None and bias.dtype != torch.bool
    unit = 1.0 if added else LOG2E
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    hides = key_padding is not None or bias is not None
    late = offset < 0 or offset_tensor is not None or window is not None
    return Inputs(
        _rows_contiguous(q),
        _rows_contiguous(k),
        _rows_contiguous(v),
        scale * unit if softcap is None else scale / softcap,
        None if softcap is None else softcap * unit,
        bias,
        (0, 0, 0, 0) if bias is None else bias.stride(),
        empty_rows_mean and sinks is None and (hides or ((causal or window is not None) and late)),
        hides,
    )


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where neighbours of the last dimension are apart: they are loaded 16 bytes at a time."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def padded(dim: int) -> int:
    """The size of a tile that holds a head: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(dim))


def refusal(node: fx.Node) -> str | None:
    """What neither kernel does: fp64, mixed dtypes, heads wider than 256."""
    q, k, v = node.args[:3]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    if dtype(q) not in FLOATS:
        return f"dtype {dtype(q)} is not float16, bfloat16 or float32"
    if dtype(k) != dtype(q) or dtype(v) != dtype(q):
        return f"q is {dtype(q)}, k {dtype(k)}, v {dtype(v)}"
    for name, dim in (("head_dim", shape(q)[3]), ("value dim", shape(v)[3])):
        if not isinstance(dim, int):
            return f"{name} {dim} is symbolic"
        if not 1 <= dim <= MOST_DIM:
            return f"{name} {dim} > {MOST_DIM}" if dim else f"{name} 0 < 1"
    for name in ("bias", "sinks"):
        x = arg(node, name)
        if isinstance(x, fx.Node) and dtype(x) == torch.float64:
            return f"{name} is torch.float64, q is {dtype(q)}"
    window = number(arg(node, "window"))
    if isinstance(window, int) and window >= 2**30:  # less a position before all keys it must fit 32 bits
        return f"window {window} >= 2^30"
    return None
