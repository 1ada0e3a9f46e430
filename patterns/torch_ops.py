"""torch's own fused operators in our vocabulary: SDPA, linear, norms and activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.translate import Translation

aten = torch.ops.aten


def sdpa(node: fx.Node) -> Mapping[str, object] | str:
    """scaled_dot_product_attention -> attention; `is_causal` counts from the first key: its offset is 0."""
    q, k, v = g.arg(node, "query"), g.arg(node, "key"), g.arg(node, "value")
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    ranks = [g.rank(x) for x in (q, k, v)]
    if ranks != [4, 4, 4]:
        return f"q, k and v have {ranks} dimensions, not 4"
    if g.arg(node, "dropout_p"):
        return f"dropout {g.arg(node, 'dropout_p')} is on"
    (batch, heads, *_), (kv_batch, kv_heads, *_), (v_batch, v_heads, *_) = g.shape(q), g.shape(k), g.shape(v)
    if not g.same_size(kv_heads, v_heads):
        return f"k has {kv_heads} heads and v {v_heads}"
    shared = g.same_size(kv_heads, 1) or g.arg(
        node, "enable_gqa"
    )  # one kv head is broadcast to all query heads
    if not g.same_size(heads, kv_heads) and not shared:
        return f"{heads} query heads and {kv_heads} kv heads without enable_gqa"
    if not g.same_size(batch, kv_batch) or not g.same_size(batch, v_batch):
        return f"q, k and v have the batch sizes {batch}, {kv_batch} and {v_batch}"
    scale = g.arg(node, "scale")
    if scale is None:
        return "the scale depends on a symbolic head_dim"
    bias = g.arg(node, "attn_mask")
    return {"q": q, "k": k, "v": v, "scale": scale, "causal": bool(g.arg(node, "is_causal")), "bias": bias}


def linear(node: fx.Node) -> Mapping[str, object] | str:
    """linear -> linear"""
    weight = g.arg(node, "weight")
    assert isinstance(weight, fx.Node)
    if g.rank(weight) != 2:
        return f"the weight has {g.rank(weight)} dimensions, not 2"
    return {"x": g.arg(node, "input"), "weight": weight, "bias": g.arg(node, "bias")}


def _over_last(node: fx.Node) -> str | None:
    sizes = g.arg(node, "normalized_shape")
    if isinstance(sizes, (list, tuple)) and len(sizes) == 1:
        return None
    return f"it normalises over {sizes}, not one dimension"


def layer_norm(node: fx.Node) -> Mapping[str, object] | str:
    """layer_norm over the last dimension -> layer_norm"""
    return _over_last(node) or {
        "x": g.arg(node, "input"),
        "weight": g.arg(node, "weight"),
        "bias": g.arg(node, "bias"),
        "eps": g.arg(node, "eps"),
    }


def rms_norm(node: fx.Node) -> Mapping[str, object] | str:
    """rms_norm over the last dimension -> rms_norm; torch scales in fp32, before the cast back."""
    x = g.arg(node, "input")
    assert isinstance(x, fx.Node)
    eps = g.arg(node, "eps")
    if eps is None:
        eps = g.rms_norm_eps(g.dtype(x))
    return _over_last(node) or {
        "x": x,
        "weight": g.arg(node, "weight"),
        "eps": eps,
        "cast_before_scale": False,
    }


def activation(kind: str) -> Callable[[fx.Node], Mapping[str, object] | str]:
    """silu(x) -> activation(x, "silu")"""

    def arguments(node: fx.Node) -> Mapping[str, object] | str:
        dtype = g.dtype(node)
        return {"x": node.args[0], "kind": kind} if dtype.is_floating_point else f"x is {dtype}, not floating"

    return arguments


def gelu(node: fx.Node) -> Mapping[str, object] | str:
    """gelu(x, approximate) -> activation(x, "gelu" or "gelu_tanh")"""
    kinds = {"none": "gelu", "tanh": "gelu_tanh"}
    approximate = g.arg(node, "approximate")
    if approximate not in kinds:
        return f"approximate {approximate!r} is not one of {', '.join(kinds)}"
    return {"x": node.args[0], "kind": kinds[str(approximate)]}


def literal(name: str) -> Callable[[fx.Node], Mapping[str, object] | str]:
    """where(m, x, full([], c)) -> where(m, x, c); masked_fill(x, m, full([], c)) -> masked_fill(x, m, c)"""

    def arguments(node: fx.Node) -> Mapping[str, object] | str:
        given = {n: g.arg(node, n) for n in g.argument_names(node.target)}
        full, x = given[name], given["self"]
        number = _constant(full)
        if number is None:
            return f"{name} is no constant"
        assert isinstance(full, fx.Node) and isinstance(x, fx.Node)
        if isinstance(number, fx.Node) or g.dtype(x) != g.dtype(node) or not g.dtype(x).is_floating_point:
            return f"{name} decides the dtype, or is known at run time only"
        if not g.same_shape(g.shape(x), g.shape(node)):
            return f"{name} decides the shape"
        kept = torch.tensor(number, dtype=g.dtype(full), device="cpu").item()
        if g.dtype(full) != g.dtype(x) and kept != number:
            return f"{name} is {number} as {g.dtype(full)}: {kept}"
        return {**given, name: number}

    return arguments


def floor(node: fx.Node) -> Mapping[str, object] | str:
    """maximum(x, full([], c)) -> clamp_min(x, c); torch rounds c to x's dtype first."""
    x, other = node.args[:2]
    number = _constant(other)
    assert isinstance(x, fx.Node) and isinstance(other, fx.Node)
    if not isinstance(number, (int, float)):
        return "other is no constant"
    if g.dtype(x) != g.dtype(node) or not g.dtype(x).is_floating_point:
        return "other decides the dtype, or x is no float"
    if not g.same_shape(g.shape(x), g.shape(node)):
        return "other decides the shape"
    kept = torch.tensor(number, dtype=g.dtype(other), device="cpu").to(g.dtype(x))
    return {"self": x, "min": kept.item()}


def _constant(x: object) -> object:
    """What a `full` or a constant of one element holds everywhere; None where it is something else."""
    if g.is_call(x, *FULL):
        assert isinstance(x, fx.Node)
        return g.arg(x, "s" if x.target is aten.scalar_tensor.default else "fill_value")
    if not isinstance(x, fx.Node) or x.op != "get_attr":
        return None
    value = getattr(x.graph.owning_module, str(x.target), None)
    if type(value) is not torch.Tensor or value.numel() != 1 or value.is_meta:  # a parameter, a fake
        return None
    return value.item()


FULL = (aten.full.default, aten.full_like.default, aten.scalar_tensor.default)

RULES = (
    Translation("where_full", aten.where.self, aten.where.ScalarOther, literal("other")),
    Translation("fill_full", aten.masked_fill.Tensor, aten.masked_fill.Scalar, literal("value")),
    Translation("maximum_full", aten.maximum.default, aten.clamp_min.default, floor),
    Translation("torch_sdpa", aten.scaled_dot_product_attention.default, ops.attention.overload, sdpa),
    Translation("torch_linear", aten.linear.default, ops.linear.overload, linear),
    Translation("torch_layer_norm", aten.layer_norm.default, ops.layer_norm.overload, layer_norm),
    Translation("torch_rms_norm", aten.rms_norm.default, ops.rms_norm.overload, rms_norm),
    Translation("torch_silu", aten.silu.default, ops.activation.overload, activation("silu")),
    Translation("torch_relu", aten.relu.default, ops.activation.overload, activation("relu")),
    Translation("torch_gelu", aten.gelu.default, ops.activation.overload, gelu),
)
