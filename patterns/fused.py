"""What one kernel does at once: a linear takes up the norm before it, and what stands behind it.

    linear(x, w) -> fused_linear(x, w), which grows:
    silu(linear(rms_norm(x), w)[..., :n]) * linear(rms_norm(x), w)[..., n:]  ->  one call
    add_rms_norm(linear(x, w), r)  ->  s = linear(x, w) + r; rms_norm(s)

Each equation of a linear stands here twice: for a weight in the model's dtype and for one in int8 with
scales. The table has three stages: `Fuse` brings one to an end before it begins the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from graphopt import flops, ops
from graphopt import graph as g
from graphopt.binding import Binding
from graphopt.patterns.norm import LAYER, RMS, residual_layer_norm, residual_rms_norm
from graphopt.patterns.norm import RULES as NORMS
from graphopt.rule import Float, Rule, Spec, T, Text, rule
from graphopt.translate import Translation

# Each program of the linear's kernel normalises the rows that it reads: for few rows that costs less than a
# launch, for many it is done again for each tile of columns.
NORM_ROWS = 64

PARTS = (
    "norm",
    "norm_weight",
    "norm_bias",
    "eps",
    "weight_offset",
    "cast_before_scale",
    "activation",
    "gated",
    "residual",
)


def _fused(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    weight_offset: float = 0.0,
    cast_before_scale: bool = True,
    activation: str | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`fused_linear` with only those parts that are given."""
    return ops.fused_linear(
        x,
        weight,
        scales,
        bias,
        norm,
        norm_weight,
        norm_bias,
        eps,
        weight_offset,
        cast_before_scale,
        activation,
        gated,
        residual,
    )


# --------------------------------------------------------------------------------------- what stands behind


def activated_linear(x: Tensor, weight: Tensor, kind: str, scales: Tensor | None = None) -> Tensor:
    """act(linear(x))"""
    return ops.activation(_fused(x, weight, scales), kind)


def gated_linear(x: Tensor, weight: Tensor, kind: str, scales: Tensor | None = None) -> Tensor:
    """act(gate) * up, both of one merged linear"""
    y = _fused(x, weight, scales)
    half = y.shape[-1] // 2
    return ops.gated_activation(y[..., :half], y[..., half:], kind)


def linear_residual(x: Tensor, weight: Tensor, residual: Tensor, scales: Tensor | None = None) -> Tensor:
    """linear(x) + residual"""
    return _fused(x, weight, scales) + residual


def gemma_norm_residual(x: Tensor, residual: Tensor) -> Tensor:
    """rms_norm(x) + residual: a norm behind a block"""
    return ops.rms_norm(x, None, 1e-6) + residual


def opened_residual_rms_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """add_rms_norm(x, residual), so that what is added to can take the sum up"""
    return ops.add_rms_norm(x, residual, None, 1e-6)


def opened_last_rms_norm(x: Tensor, residual: Tensor) -> Tensor:
    """As `opened_residual_rms_norm`, where nothing else reads the sum."""
    return ops.add_rms_norm(x, residual, None, 1e-6)[0]


def opened_residual_layer_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """add_layer_norm(x, residual), so that what is added to can take the sum up"""
    return ops.add_layer_norm(x, residual, None, None, 1e-6)


def opened_last_layer_norm(x: Tensor, residual: Tensor) -> Tensor:
    """As `opened_residual_layer_norm`, where nothing else reads the sum."""
    return ops.add_layer_norm(x, residual, None, None, 1e-6)[0]


# --------------------------------------------------------------------------------------------- norms before


def rms_normed_linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    offset: float,
    scales: Tensor | None = None,
) -> Tensor:
    """linear(rms_norm(x)), cast before it is scaled (Llama)"""
    return _fused(ops.rms_norm(x, norm_weight, eps, offset, True), weight, scales)


def late_rms_normed_linear(
    x: Tensor, weight: Tensor, norm_weight: Tensor, eps: float, offset: float, scales: Tensor | None = None
) -> Tensor:
    """linear(rms_norm(x)), scaled before it is cast (Gemma)"""
    return _fused(ops.rms_norm(x, norm_weight, eps, offset, False), weight, scales)


def layer_normed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    scales: Tensor | None = None,
) -> Tensor:
    """linear(layer_norm(x))"""
    return _fused(ops.layer_norm(x, norm_weight, norm_bias, eps), weight, scales, bias)


def _few_rows(binding: Binding) -> str | None:
    """Why a norm is better computed once than in each of the linear's programs."""
    x = binding.leaves["x"]
    assert isinstance(x, fx.Node)
    rows = math.prod(flops.hint(size) for size in g.shape(x)[:-1])
    return f"{rows} rows > {NORM_ROWS}" if rows > NORM_ROWS else None


def _few_rows_of_one_dtype(binding: Binding) -> str | None:
    """As `_few_rows`, and why the norm does not give what it is given."""
    x, norm_weight = binding.leaves["x"], binding.leaves.get("norm_weight")
    if isinstance(x, fx.Node) and isinstance(norm_weight, fx.Node):
        wide = torch.promote_types(g.dtype(norm_weight), g.dtype(x))
        if wide != g.dtype(x):
            return f"the norm's weight is {g.dtype(norm_weight)}: {g.dtype(x)} comes out as {wide}"
    return _few_rows(binding)


# -------------------------------------------------------------------------------------------- there and back


def _empty(node: fx.Node) -> dict[str, object]:
    """x and bias of a linear, with no other part."""
    plain: dict[str, object] = dict.fromkeys(PARTS)
    return plain | {
        "x": g.arg(node, "x"),
        "bias": g.arg(node, "bias"),
        "scales": None,
        "eps": 0.0,
        "weight_offset": 0.0,
        "cast_before_scale": True,
        "gated": False,
    }


def _opened(node: fx.Node) -> Mapping[str, object]:
    """linear(x, w, b) as a `fused_linear`."""
    return _empty(node) | {"weight": g.arg(node, "weight")}


def _opened_int8(node: fx.Node) -> Mapping[str, object]:
    """linear_int8(x, packed, scales, b) as a `fused_linear`."""
    return _empty(node) | {"weight": g.arg(node, "packed"), "scales": g.arg(node, "scales")}


def _alone(node: fx.Node) -> str | None:
    """What a `fused_linear` has taken up."""
    taken = [name for name in ("norm", "activation", "residual") if g.arg(node, name) is not None]
    return f"it has its {' and '.join(taken)}" if taken else None


def _closed(node: fx.Node) -> Mapping[str, object] | str:
    """A `fused_linear` without parts as a linear, which a library may do best."""
    if g.arg(node, "scales") is not None:
        return "it has scales"
    return _alone(node) or {name: g.arg(node, name) for name in ("x", "weight", "bias")}


def _closed_int8(node: fx.Node) -> Mapping[str, object] | str:
    """A `fused_linear` of a packed weight without other parts as a linear_int8."""
    if g.arg(node, "scales") is None:
        return "it has no scales"
    return _alone(node) or {
        "x": g.arg(node, "x"),
        "packed": g.arg(node, "weight"),
        "scales": g.arg(node, "scales"),
        "bias": g.arg(node, "bias"),
    }


FUSED = ops.fused_linear.overload
NORM = ("norm", "norm_weight", "norm_bias", "eps", "weight_offset", "cast_before_scale")
BEHIND = ("activation", "gated", "residual")
_EPS, _KIND = Float(1e-5), Text("quick_gelu")
_SUM = {"x": T("... n"), "residual": T("...|1 n")}
# A linear's operands: in the model's dtype; packed, with scales of j groups.
_OPERANDS: tuple[Mapping[str, Spec], ...] = (
    {"x": T("... k"), "weight": T("n k")},
    {"x": T("... k"), "weight": T("n k", "int8"), "scales": T("n j")},
)
_GATED: tuple[Mapping[str, Spec], ...] = (
    {"x": T("... k"), "weight": T("2*n k")},
    {"x": T("... k"), "weight": T("2*n k", "int8"), "scales": T("2*n j")},
)

OPENING: tuple[Rule | Translation, ...] = (
    Translation("opened_linear", ops.linear.overload, FUSED, _opened),
    Translation("opened_int8_linear", ops.linear_int8.overload, FUSED, _opened_int8),
    rule(opened_residual_rms_norm, residual_rms_norm, _SUM, carry=RMS),
    rule(opened_last_rms_norm, lambda x, residual: residual_rms_norm(x, residual)[0], _SUM, carry=RMS),
    rule(opened_residual_layer_norm, residual_layer_norm, _SUM, carry=LAYER),
    rule(opened_last_layer_norm, lambda x, residual: residual_layer_norm(x, residual)[0], _SUM, carry=LAYER),
)

ABSORPTION: tuple[Rule | Translation, ...] = (
    *(
        rule(
            rms_normed_linear,
            lambda x, weight, norm_weight, eps, offset, scales=None: _fused(
                x, weight, scales, norm="rms", norm_weight=norm_weight, eps=eps, weight_offset=offset
            ),
            operands,
            carry=("bias", *BEHIND),
            guard=_few_rows_of_one_dtype,
            norm_weight=T("k", "W", optional=True),
            eps=_EPS,
            offset=Float(1.0),
        )
        for operands in _OPERANDS
    ),
    *(
        rule(
            late_rms_normed_linear,
            lambda x, weight, norm_weight, eps, offset, scales=None: _fused(
                x,
                weight,
                scales,
                norm="rms",
                norm_weight=norm_weight,
                eps=eps,
                weight_offset=offset,
                cast_before_scale=False,
            ),
            operands,
            carry=("bias", *BEHIND),
            guard=_few_rows,
            norm_weight=T("k", "W"),
            eps=_EPS,
            offset=Float(1.0),
        )
        for operands in _OPERANDS
    ),
    *(
        rule(
            layer_normed_linear,
            lambda x, weight, bias, norm_weight, norm_bias, eps, scales=None: _fused(
                x, weight, scales, bias, norm="layer", norm_weight=norm_weight, norm_bias=norm_bias, eps=eps
            ),
            operands,
            carry=BEHIND,
            guard=_few_rows,
            bias=T("n", optional=True),
            norm_weight=T("k"),  # few models have none, and it would double the variants
            norm_bias=T("k", optional=True),
            eps=_EPS,
        )
        for operands in _OPERANDS
    ),
    *(
        rule(
            activated_linear,
            lambda x, weight, kind, scales=None: _fused(x, weight, scales, activation=kind),
            operands,
            carry=("bias", *NORM),
            kind=_KIND,
        )
        for operands in _OPERANDS
    ),
    *(
        rule(
            gated_linear,
            lambda x, weight, kind, scales=None: _fused(x, weight, scales, activation=kind, gated=True),
            operands,
            carry=("bias", *NORM),
            kind=_KIND,
        )
        for operands in _GATED
    ),
    *(
        rule(
            linear_residual,
            lambda x, weight, residual, scales=None: _fused(x, weight, scales, residual=residual),
            operands,
            carry=("bias", *NORM, "activation"),
            residual=T("... n"),
        )
        for operands in _OPERANDS
    ),
    rule(
        gemma_norm_residual,
        lambda x, residual: ops.rms_norm_residual(x, None, 1e-6, 0.0, True, residual),
        carry=RMS,
        x=T("... n"),
        residual=T("... n"),
    ),
)

CLOSING: tuple[Rule | Translation, ...] = (
    Translation("closed_linear", FUSED, ops.linear.overload, _closed),
    Translation("closed_int8_linear", FUSED, ops.linear_int8.overload, _closed_int8),
    # What no linear took up is one call again.
    *(r for r in NORMS if r.name in ("residual_rms_norm", "residual_layer_norm")),
)

FUSIONS = (OPENING, ABSORPTION, CLOSING)
