"""Activations, alone and gated, in Triton: read once, computed in fp32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import fx

from graphopt.graph import arg, same_shape, shape
from graphopt.kernel import GPU, Case, Kernel, Tensor
from graphopt.kernels.mlp import ACTIVATION_CASES, GATED_CASES
from graphopt.launch import current_target, launch
from graphopt.triton_math import activate, collapsed, dtype_refusal

BLOCK = 1024  # 16 bytes a thread of 4 warps in half precision


@triton.jit
def _activation(
    gate_ptr, up_ptr, y_ptr, gate_outer_stride, gate_inner_stride, up_outer_stride, up_inner_stride, inner,
    N,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [rows, N] dense; gate and up by two row strides. Without up: the activation alone."""
    blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = (program % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_row = columns < N
    gate_at = (row // inner) * gate_outer_stride + (row % inner) * gate_inner_stride
    x = activate(tl.load(gate_ptr + gate_at + columns, mask=in_row, other=0.0).to(tl.float32), KIND)
    if up_ptr is not None:
        up_at = (row // inner) * up_outer_stride + (row % inner) * up_inner_stride
        x *= tl.load(up_ptr + up_at + columns, mask=in_row, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + columns, x.to(y_ptr.dtype.element_ty), mask=in_row)


def _walk(y: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[int, list[tuple[int, int]], int, int] | None:
    """(inner, each input's (outer, inner) stride, rows, columns): the longest rows that all share.

    All of a dense tensor is one row. None where more than two strides would be needed.
    """
    sizes, strides = collapsed(y.shape, y.stride(), [t.stride() for t in inputs])
    if not sizes:
        return 1, [(1, 0) for _ in inputs], 1, 1
    if len(sizes) > 3 or any(s[-1] != 1 for s in strides):
        return None
    *outer, columns = sizes
    if not outer:
        return 1, [(columns, 0) for _ in inputs], 1, columns
    if len(outer) == 1:
        return 1, [(s[0], 0) for s in strides], outer[0], columns
    return outer[1], [(s[0], s[1]) for s in strides], outer[0] * outer[1], columns


def _launch(gate: torch.Tensor, up: torch.Tensor | None, kind: str) -> torch.Tensor:
    """The one launch of both ops."""
    inputs = [gate] if up is None else [gate, up]
    dtype = gate.dtype if up is None else torch.result_type(gate, up)
    y = torch.empty_like(gate, dtype=dtype)  # dense, in gate's order
    if y.numel() == 0:
        return y
    walk = _walk(y, inputs)
    if walk is None:  # gate and up in different orders, or columns apart: no layer of a transformer has them
        inputs = [t.contiguous() for t in inputs]
        y = torch.empty(gate.shape, dtype=dtype, device=gate.device)
        walk = _walk(y, inputs)
    assert walk is not None  # dense tensors are one row
    inner, strides, rows, columns = walk
    launch(
        _activation,
        (rows * triton.cdiv(columns, BLOCK),),
        inputs[0],
        inputs[1] if up is not None else None,
        y,
        *strides[0],
        *strides[-1],
        inner,
        columns,
        KIND=kind,
        BLOCK_N=BLOCK,
        num_warps=4 * 32 // current_target(gate).warp_size,
    )
    return y


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """act(x), in x's dtype."""
    return _launch(x, None, kind)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up; the halves of a merged linear are read where they are."""
    return _launch(gate, up, kind)


def refuses(node: fx.Node) -> str | None:
    """Other dtypes than fp32, fp16 and bf16."""
    return dtype_refusal(node)


def gated_refuses(node: fx.Node) -> str | None:
    """As `refuses`, and operands that broadcast: both are read at the same place."""
    gate, up = arg(node, "gate"), arg(node, "up")
    assert isinstance(gate, fx.Node) and isinstance(up, fx.Node)
    if not same_shape(shape(gate), shape(up)):
        return f"gate is {tuple(shape(gate))}, up is {tuple(shape(up))}"
    return dtype_refusal(node)


STRIDED = {
    "block edge": Tensor((3, 1024), scale=3.0, layout="sliced"),
    "beyond a block": Tensor((2, 1025), scale=3.0, layout="sliced"),
    "transposed": Tensor((2, 3, 5, 24), layout="transposed"),
    "expanded": Tensor((7, 3, 24), layout="expanded"),
    "sliced heads": Tensor((2, 3, 5, 24), layout="sliced"),
    "large": Tensor((2, 24), scale=40.0),
    "scalar": Tensor(()),
}
CASES = (*ACTIVATION_CASES, *(Case(name, (x, "silu")) for name, x in STRIDED.items()))
GATED = (
    *GATED_CASES,
    *(Case(name, (x, x, "gelu_tanh")) for name, x in STRIDED.items()),
    Case("two dtypes", (Tensor((3, 7, 24)), Tensor((3, 7, 24), torch.float32), "silu")),
    Case("two orders", (Tensor((2, 3, 5, 24), layout="transposed"), Tensor((2, 3, 5, 24)), "silu")),
    Case("one half sliced", (Tensor((3, 7, 24)), Tensor((3, 7, 24), layout="sliced"), "silu")),
)


def _gated(rows: int, width: int, kind: str) -> Case:
    half = Tensor((rows, width), layout="sliced")
    return Case(f"{rows} x {width}, {kind}", (half, half, kind))


ROWS = (1, 4096)
ALONE = tuple(Case(f"{rows} x 3072, gelu", (Tensor((rows, 3072)), "gelu")) for rows in ROWS)
MUST = (
    *(_gated(rows, width, "silu") for width in (11008, 14336) for rows in ROWS),
    *(_gated(rows, 3072, "gelu_tanh") for rows in ROWS),
)

EXPECTS = (("_activation", "wide_loads"),)
KERNELS = (
    Kernel("activation", "activation_triton", activation, refuses, GPU, CASES, ALONE, EXPECTS),
    Kernel(
        "gated_activation",
        "gated_activation_triton",
        gated_activation,
        gated_refuses,
        GPU,
        GATED,
        MUST,
        EXPECTS,
    ),
)
