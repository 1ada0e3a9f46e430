"""Linear layers with what stands around them, in Triton: which kernel takes a product, and which layers."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import fx
from torch.nn import functional as F

from graphopt.graph import arg, dtype, same_size, shape
from graphopt.kernel import GPU, Case, Kernel, Tensor
from graphopt.kernels.layer_norm_triton import layer_norm
from graphopt.kernels.rms_norm_triton import rms_norm
from graphopt.targets import TARGETS
from graphopt.triton_gemm import gemm
from graphopt.triton_gemv import MOST_ROWS, gemv, skinny
from graphopt.triton_linear import Product
from graphopt.triton_math import DTYPES, dtype_refusal

FEW_ROWS = 64  # of x, up to which plain products are not left to cuBLAS
LEAST_GROUP = 16  # of K under one scale: what a matrix instruction takes at once


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: str | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_scale: bool,
    activation: str | None,
    gated: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """act(norm(x) @ weight^T + bias) + residual: one launch, and one for the norm of more than 16 rows.

    x and residual are copied where their leading dimensions have no common stride, vectors where their
    elements are apart; all else is read in place.
    """
    features = weight.shape[0] // (2 if gated else 1)
    made = x.dtype
    if residual is not None and residual.dim():  # a tensor without dimensions promotes nothing
        made = torch.promote_types(made, residual.dtype)
    y = x.new_empty((*x.shape[:-1], features), dtype=made)
    if not y.numel():
        return y
    rows = math.prod(x.shape[:-1])
    if norm is not None and rows > MOST_ROWS:  # else each row of tiles would do it again
        if norm == "rms":
            x = rms_norm(x, norm_weight, eps, weight_offset, cast_before_scale)
        else:
            x = layer_norm(x, norm_weight, norm_bias, eps)
        norm = norm_weight = norm_bias = None
    if not x.shape[-1]:  # nothing to scale
        weight, scales = weight.to(x.dtype), None
    bias, norm_weight, norm_bias = map(_vector, (bias, norm_weight, norm_bias))
    product = Product(
        x=_near(x.reshape(rows, x.shape[-1])),
        weight=weight,
        scales=scales,
        bias=bias,
        norm=norm,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=eps,
        weight_offset=weight_offset,
        cast_before_scale=cast_before_scale,
        activation=activation,
        gated=gated,
        residual=_near(residual.expand(y.shape).reshape(rows, features)) if residual is not None else None,
        y=y.view(rows, features),
    )
    if rows == 1:
        gemv(product)
    elif rows <= MOST_ROWS:
        skinny(product)
    else:
        gemm(product)
    return y


def _vector(x: torch.Tensor | None) -> torch.Tensor | None:
    """x, or a copy where neighbours are apart: kernels step through vectors by one."""
    return x if x is None else x.contiguous()


def _near(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or a copy where a row spans more elements than kernels count in: 32 bits."""
    return matrix if matrix.shape[1] * matrix.stride(1) < 2**31 else matrix.contiguous()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight^T + bias."""
    return linear_int8(x, weight, None, bias)


def linear_aten(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight^T + bias by cuBLAS or hipBLAS, but for few rows: their number may only be known now."""
    few = math.prod(x.shape[:-1]) <= FEW_ROWS
    return linear(x, weight, bias) if few else F.linear(x, weight, bias)


def linear_int8(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """x @ (packed * scales)^T + bias."""
    return fused_linear(x, packed, scales, bias, None, None, None, 0.0, 0.0, True, None, False, None)


# ------------------------------------------------------------------------------------------------ refusals


def refuses(node: fx.Node) -> str | None:
    """Dtypes that do not meet in the product."""
    refusal = dtype_refusal(node)
    x, weight = arg(node, "x"), arg(node, "weight")
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    if refusal is None and dtype(weight) != dtype(x):
        return f"weight is {dtype(weight)}, x is {dtype(x)}"
    return refusal


def refuses_int8(node: fx.Node) -> str | None:
    """Groups that no product of tiles keeps to."""
    packed, scales = arg(node, "packed"), arg(node, "scales")
    assert isinstance(packed, fx.Node) and isinstance(scales, fx.Node)
    return dtype_refusal(node) or _group_refusal(packed, scales)


def refuses_fused(node: fx.Node) -> str | None:
    """What `refuses` and `refuses_int8` do; norms that change the dtype; residuals that change the shape."""
    weight, scales = arg(node, "weight"), arg(node, "scales")
    x, norm_weight = arg(node, "x"), arg(node, "norm_weight")
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    refusal = refuses(node) if scales is None else dtype_refusal(node)
    if refusal is None and isinstance(scales, fx.Node):
        refusal = _group_refusal(weight, scales)
    if refusal is not None:
        return refusal
    if arg(node, "norm") == "rms" and arg(node, "cast_before_scale") and isinstance(norm_weight, fx.Node):
        if dtype(norm_weight) != dtype(x):  # the normed row gets the promotion of both
            return f"norm_weight is {dtype(norm_weight)}, x is {dtype(x)}, and the row is cast before it"
    residual = arg(node, "residual")
    if not isinstance(residual, fx.Node):
        return None
    if dtype(residual) not in DTYPES:
        return f"residual is {dtype(residual)}, which is not floating point"
    return _residual_refusal(node, x, weight, residual)


def _group_refusal(packed: fx.Node, scales: fx.Node) -> str | None:
    k, groups = shape(packed)[1], shape(scales)[1]
    if not isinstance(k, int) or not isinstance(groups, int) or not groups:
        return None
    group = k // groups
    return f"group {group} is no multiple of {LEAST_GROUP}" if group % LEAST_GROUP else None


def _residual_refusal(node: fx.Node, x: fx.Node, weight: fx.Node, residual: fx.Node) -> str | None:
    features = shape(weight)[0] // (2 if arg(node, "gated") else 1)
    result = (*shape(x)[:-1], features)
    found = shape(residual)
    ends = result[len(result) - len(found) :]
    fits = len(found) <= len(result) and all(
        same_size(a, b) or same_size(a, 1) for a, b in zip(found, ends, strict=True)
    )
    return None if fits else f"residual is {tuple(found)}, the result is {result}"


def refuses_aten(node: fx.Node) -> str | None:
    """Few rows, which are read faster without tiles, and products that torch has no kernel for."""
    x = arg(node, "x")
    assert isinstance(x, fx.Node)
    rows = math.prod(shape(x)[:-1])
    if isinstance(rows, int) and rows <= FEW_ROWS:
        return f"{rows} rows <= {FEW_ROWS}"
    return refuses(node)


# --------------------------------------------------------------------------------------------------- cases


def _weights(rows: int, k: int, group: int) -> tuple[Tensor, Tensor | None]:
    """A weight that keeps its input's scale, and its scales: random int8 where there is a group."""
    if not group:
        return Tensor((rows, k), scale=max(k, 1) ** -0.5), None
    return Tensor((rows, k), torch.int8, below=128), Tensor((rows, k // group), scale=max(k, 1) ** -0.5 / 64)


def _linear(name: str, x: Tensor, features: int, bias: bool = False) -> Case:
    weight, _ = _weights(features, x.shape[-1], 0)
    return Case(name, (x, weight, Tensor((features,)) if bias else None))


def _int8(name: str, x: Tensor, features: int, group: int, bias: bool = False) -> Case:
    weight, scales = _weights(features, x.shape[-1], group)
    return Case(name, (x, weight, scales, Tensor((features,)) if bias else None))


def _fused(
    name: str,
    x: Tensor,
    features: int,
    *,
    norm: str | None = None,
    bias: bool = False,
    activation: str | None = None,
    gated: bool = False,
    residual: Tensor | bool = False,
    group: int = 0,
    weight_offset: float = 0.0,
    norm_dtype: torch.dtype | None = None,
) -> Case:
    """A call of `fused_linear`; a norm whose weights have a dtype of their own is cast after them."""
    k, rows = x.shape[-1], features * (2 if gated else 1)
    weight, scales = _weights(rows, k, group)
    added = Tensor((*x.shape[:-1], features)) if residual is True else residual or None
    vector = Tensor((k,), norm_dtype) if norm else None
    arguments = (x, weight, scales, Tensor((rows,)) if bias else None, norm, vector)
    rest = (vector if norm == "layer" else None, 1e-5, weight_offset, norm_dtype is None)
    return Case(name, (*arguments, *rest, activation, gated, added))


def _half(case: Case) -> Case:
    """The same call in bf16 whatever it is asked for: a compiled variant less."""
    made = (
        dataclasses.replace(a, dtype=torch.bfloat16) if isinstance(a, Tensor) and a.dtype is None else a
        for a in case.arguments
    )
    return Case(case.name, tuple(made))


# The rows decide which kernel runs (1, up to 16, more); K of 1100 is several steps of each.
CASES = (
    _linear("tidy", Tensor((2, 8, 64)), 32, True),
    _linear("ugly", Tensor((3, 7, 123)), 45),
    _linear("one row", Tensor((1, 1, 1100)), 13, True),
    _linear("sixteen rows", Tensor((16, 1100)), 33),
    _linear("two tiles of rows", Tensor((65, 136)), 72, True),
    _linear("a vector", Tensor((64,)), 10, True),
    _linear("one column", Tensor((2, 5, 24)), 1),
    _linear("one input", Tensor((17, 1)), 5, True),
    _linear("sliced", Tensor((2, 9, 24), layout="sliced"), 10, True),
    _linear("transposed", Tensor((2, 5, 3, 24), layout="transposed"), 10),
    _linear("expanded", Tensor((2, 5, 24), layout="expanded"), 10),
    Case("part of a merged weight", (Tensor((3, 24)), Tensor((10, 24), layout="sliced", scale=0.2), None)),
    _linear("no rows", Tensor((0, 5, 24)), 10, True),
    _linear("no columns", Tensor((2, 24)), 0),
    _linear("no inputs", Tensor((20, 0)), 10, True),
)
INT8_CASES = (
    _int8("tidy", Tensor((2, 8, 128)), 32, 64, True),
    _int8("ugly", Tensor((3, 7, 96)), 45, 48),
    _int8("one row", Tensor((1, 1152)), 13, 64, True),
    _int8("five rows", Tensor((5, 1152)), 13, 128),
    _int8("two tiles of rows", Tensor((65, 192)), 72, 64, True),
    _int8("one group", Tensor((2, 96)), 1, 96),
    _int8("sliced", Tensor((2, 9, 64), layout="sliced"), 10, 16),
    _int8("no rows", Tensor((0, 64)), 10, 64, True),
    _int8("no inputs", Tensor((2, 0)), 10, 64, True),
)
FUSED_CASES = tuple(
    dataclasses.replace(case, name=f"{case.name}, {rows}")
    for rows, x in (
        ("one row", Tensor((1, 1, 123))),
        ("six rows", Tensor((2, 3, 64))),
        ("21 rows", Tensor((3, 7, 64))),
    )
    for case in (
        _fused("nothing", x, 20),
        _fused("rms", x, 20, norm="rms", residual=True),
        _fused("rms, 1 + w in fp32", x, 20, norm="rms", weight_offset=1.0, norm_dtype=torch.float32),
        _fused("layer", x, 20, norm="layer", bias=True, activation="gelu_tanh"),
        _fused("gated", x, 20, norm="rms", activation="silu", gated=True, residual=True),
        _fused("gated with bias", x, 7, bias=True, activation="gelu", gated=True),
        _fused("broadcast residual", x, 20, residual=Tensor((20,))),
        _fused("residual in fp32", x, 20, bias=True, residual=Tensor((1, 1, 20), torch.float32)),
    )
) + (
    _fused("three rows of 1100", Tensor((3, 1100)), 20, norm="layer", residual=True),
    _fused("one row of 4100", Tensor((1, 4100)), 5, norm="layer", bias=True),
    _fused("int8, one row", Tensor((1, 128)), 20, norm="rms", activation="silu", gated=True, group=64),
    _fused("int8, five rows", Tensor((5, 128)), 20, norm="rms", activation="silu", gated=True, group=64),
    _fused("int8, 20 rows", Tensor((20, 128)), 20, activation="silu", gated=True, residual=True, group=64),
    _fused("strided residual", Tensor((2, 9, 24)), 10, residual=Tensor((2, 9, 10), layout="sliced")),
    _fused("no rows", Tensor((0, 24)), 10, norm="rms", residual=True),
)

# Decoding (1 row, 4 and 16), a short prompt, a long one; the widths of models of 1B and 8B with rms norms
# and of a small one with layer norms; one vocabulary. All four sizes of tiles occur.
LINEAR_SHAPES = tuple(_half(_linear(f"{m} rows", Tensor((m, 2048)), 3072)) for m in (1, 4, 16, 64, 512, 4096))
INT8_SHAPES = tuple(_half(_int8(f"{m} rows", Tensor((m, 2048)), 3072, 64)) for m in (4, 16, 512, 4096))
_BOTH = (
    _fused("qkv, 1 row", Tensor((1, 2048)), 3072, norm="rms"),
    _fused("down, 4 rows", Tensor((4, 8192)), 2048, residual=True),
    _fused("down, 4096 rows", Tensor((4096, 8192)), 2048, residual=True),
    _fused("head, 4 rows", Tensor((4, 2048)), 128256, norm="rms"),
    _fused("down int8, 1 row", Tensor((1, 8192)), 2048, residual=True, group=64),
    _fused("down int8, 4096 rows", Tensor((4096, 8192)), 2048, residual=True, group=64),
    _fused("ragged, 1 row", Tensor((1, 2047)), 3071, norm="rms"),
    _fused("ragged columns, 512 rows", Tensor((512, 2048)), 3071, bias=True, residual=True),
    _fused("ragged, 512 rows", Tensor((512, 2047)), 3071, bias=True, residual=True),
)
_HALF = (
    _fused("qkv, 16 rows", Tensor((16, 2048)), 3072, norm="rms"),
    _fused("qkv, 512 rows", Tensor((512, 4096)), 6144, norm="rms"),
    _fused("gate and up, 1 row", Tensor((1, 2048)), 8192, norm="rms", activation="silu", gated=True),
    _fused("gate and up, 16 rows", Tensor((16, 4096)), 14336, norm="rms", activation="silu", gated=True),
    _fused("gate and up, 64 rows", Tensor((64, 2048)), 8192, activation="silu", gated=True),
    _fused("gate and up, 4096 rows", Tensor((4096, 2048)), 8192, activation="silu", gated=True),
    _fused("down, 1 row", Tensor((1, 14336)), 4096, residual=True),
    _fused("down, 64 rows", Tensor((64, 8192)), 2048, residual=True),
    _fused("head, 1 row", Tensor((1, 2048)), 128256, norm="rms"),
    _fused("layer, qkv, 1 row", Tensor((1, 768)), 2304, norm="layer", bias=True),
    _fused("layer, up, 1 row", Tensor((1, 768)), 3072, norm="layer", bias=True, activation="gelu_tanh"),
    _fused("layer, up, 16 rows", Tensor((16, 768)), 3072, norm="layer", bias=True, activation="gelu_tanh"),
    _fused("up, 4096 rows", Tensor((4096, 768)), 3072, bias=True, activation="gelu_tanh"),
    _fused("down with bias, 1 row", Tensor((1, 3072)), 768, bias=True, residual=True),
)
_HALF_INT8 = tuple(
    _fused(
        f"gate and up int8, {m} rows",
        Tensor((m, 2048)),
        8192,
        norm="rms" if m <= MOST_ROWS else None,
        activation="silu",
        gated=True,
        group=64,
    )
    for m in (1, 16, 4096)
)
FUSED_SHAPES = (*_BOTH, *(_half(c) for c in (*_HALF, *_HALF_INT8)))

EXPECTS = (("_gemv", "wide_loads"), ("_skinny", "wide_loads"), ("_gemm", "matrix"), ("_gemm", "wide_loads"))

KERNELS = (
    # First: without an epilogue cuBLAS is at the peak for many rows, and the number of rows may be unknown.
    # The order follows the marks to be reached, until a benchmark on a GPU settles it.
    *(Kernel("linear", "linear_aten", linear_aten, refuses_aten, target) for target in TARGETS),
    Kernel("linear", "linear_triton", linear, refuses, GPU, CASES, LINEAR_SHAPES, EXPECTS),
    Kernel("linear_int8", "linear_int8_triton", linear_int8, refuses_int8, GPU, INT8_CASES, INT8_SHAPES),
    Kernel(
        "fused_linear",
        "fused_linear_triton",
        fused_linear,
        refuses_fused,
        GPU,
        FUSED_CASES,
        FUSED_SHAPES,
        EXPECTS,
    ),
)
