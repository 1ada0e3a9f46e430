"""Floating-point operations of a graph, counted from shapes: what share of the work did recognition miss?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import fx

from graphopt.graph import Size, arg, inputs, is_call, op_name, schema_arguments, shape, tensor, val

# Views, gathers and plumbing: they move or rename data and compute nothing.
FREE = frozenset(
    {
        *("aten.reshape", "aten.view", "aten._unsafe_view", "aten.permute", "aten.transpose", "aten.t"),
        *("aten.expand", "aten.slice", "aten.select", "aten.unsqueeze", "aten.squeeze", "aten.split"),
        *("aten.chunk", "aten.unbind", "aten.narrow", "aten.clone", "aten.contiguous", "aten.detach"),
        *("aten.alias", "aten.copy_", "aten.cat", "aten.stack", "aten.repeat", "aten.repeat_interleave"),
        *("aten.pad", "aten.constant_pad_nd", "aten.embedding", "aten.gather", "aten.index"),
        *("aten.index_select", "aten.index_copy", "aten.index_put", "aten.arange", "aten.zeros", "aten.ones"),
        *("aten.full", "aten.empty", "aten.zeros_like", "aten.ones_like", "aten.full_like"),
        *("aten.empty_like", "aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.scalar_tensor"),
        *("aten.sym_size", "aten.item", "cache_update", "aten.real", "aten.imag", "aten.complex"),
        *("aten.view_as_real", "aten.view_as_complex"),
    }
)

# Elementwise work of a fused op, in operations for each element of its largest operand.
PER_ELEMENT = {
    "rms_norm": 4,  # square, mean, scale, weight
    "add_rms_norm": 5,
    "layer_norm": 6,
    "add_layer_norm": 7,
    "aten.layer_norm": 6,
    "aten.rms_norm": 4,
    "rope": 3,
    "rope_write": 3,
    "rms_norm_residual": 5,
    "gated_activation": 2,
}


def hint(size: Size) -> int:
    """A size as a number: itself, a symbol's value in the example, 1 where it has none."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    known = size.node.hint
    return 1 if known is None else int(known)


def elements(value: object) -> int:
    """The number of elements of a tensor, or of all tensors of a tuple; 0 for anything else."""
    if isinstance(value, torch.Tensor):
        return math.prod(hint(s) for s in value.shape)
    if isinstance(value, (tuple, list)):
        return sum(elements(v) for v in value)
    return 0


def flops(node: fx.Node) -> int:
    """Operations of one call; a multiply-add counts as two.

    Matrix products, convolutions and attention are counted exactly from their shapes (masked scores are
    counted as computed, whatever a kernel skips). Anything else counts one operation for each element of its
    largest operand or result, a fused op as in `PER_ELEMENT`; views, copies and other nodes count nothing.
    """
    name = op_name(node)
    if not is_call(node) or name in FREE:
        return 0
    if name in HEAVY and schema_arguments(node.target):  # a kernel may have an op's name
        return HEAVY[name](node)
    return PER_ELEMENT.get(name, 1) * _largest(node)


def total(graph: fx.Graph) -> int:
    """Operations of one call of the graph."""
    return sum(flops(node) for node in graph.nodes)


def unmatched(graph: fx.Graph) -> dict[str, float]:
    """The share of the graph's operations in each kind of heavy work that is not an op of our vocabulary.

    Heavy work is what `HEAVY` names: matrix products, linears, convolutions, scaled_dot_product_attention and
    softmax, as calls of ATen or of a library. In a recognised graph each of them is a part of the model that
    no rule understood. Elementwise ATen counts in the total but is never missed: residual adds and masks stay
    ATen for good.
    Returns {op name: share in 0..1}, largest first; empty where nothing was missed.
    """
    whole = total(graph)
    missed: dict[str, int] = {}
    for node in graph.nodes:
        name = op_name(node)
        if is_call(node) and name in HEAVY and "." in name:  # ours, and kernels, have no namespace
            missed[name] = missed.get(name, 0) + flops(node)
    ordered = sorted(missed.items(), key=lambda item: -item[1])
    return {name: count / whole for name, count in ordered if count}


def unmatched_share(graph: fx.Graph) -> float:
    """The share, in 0..1, of the operations that is heavy work outside our vocabulary; see `unmatched`."""
    return math.fsum(unmatched(graph).values())


def _largest(node: fx.Node) -> int:
    return max([elements(val(node)), *(elements(val(n)) for n in inputs(node))])


def _shape(node: fx.Node, name: str) -> tuple[int, ...]:
    operand = arg(node, name)
    assert isinstance(operand, fx.Node), f"{node.target}: {name} is not a node"
    return tuple(hint(s) for s in shape(operand))


def _result(node: fx.Node) -> int:
    return elements(val(node))


def _product(left: str) -> Callable[[fx.Node], int]:
    """[.., M, K] @ [.., K, N]: twice the inner size K for each element of the result."""
    return lambda node: 2 * _result(node) * _shape(node, left)[-1]


def _linear(node: fx.Node) -> int:
    """x [.., K] with weight [N, K]: 2 * elements(x) * N, and one operation an element for what follows it."""
    follows = sum(_given(node, name) for name in ("bias", "activation", "residual"))
    x = "input" if is_call(node, torch.ops.aten.linear.default) else "x"
    before = PER_ELEMENT["layer_norm"] if _given(node, "norm") else 0
    rows = math.prod(_shape(node, x))
    return rows * (2 * _shape(node, "weight")[0] + before) + follows * _result(node)


def _given(node: fx.Node, name: str) -> bool:
    try:
        return arg(node, name) is not None
    except KeyError:
        return False


def _attention(query: str, key: str, value: str) -> Callable[[fx.Node], int]:
    """q [B, H, Q, D], k [B, Hk, K, D], v [B, Hk, K, Dv] -> B*H*Q*K * (2*D + 2*Dv + 1 for the softmax)."""

    def count(node: fx.Node) -> int:
        *batch, queries, size = _shape(node, query)
        keys, wide = _shape(node, key)[-2], _shape(node, value)[-1]
        return math.prod(batch) * queries * keys * (2 * size + 2 * wide + 1)

    return count


def _convolution(node: fx.Node) -> int:
    """Weight [out, in / groups, *window]: each result element reads in / groups * window inputs."""
    return 2 * _result(node) * math.prod(_shape(node, "weight")[1:])


def _einsum(node: fx.Node) -> int:
    """'bhqd,bhkd->bhqk': two operations a point of the space of all letters; an ellipsis counts as 1."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, Iterable)
    letters: dict[str, int] = {}
    for term, operand in zip(equation.split("->")[0].replace(" ", "").split(","), operands, strict=False):
        if isinstance(operand, fx.Node) and tensor(operand) is not None and "." not in term:
            letters.update(zip(term, (hint(s) for s in shape(operand)), strict=False))
    return 2 * math.prod(letters.values())


def _expert_matmul(node: fx.Node) -> int:
    """x [S, K] with one of weight [E, K, N] a row."""
    return 2 * _result(node) * _shape(node, "x")[-1] + _given(node, "bias") * _result(node)


def _experts(node: fx.Node) -> int:
    """ids [T, k] choose of gate_up [E, rows, H] and down [E, N, I]: k times two products and their middle.

    Without ids all are chosen.
    """
    rows, width = _shape(node, "gate_up")[1:]
    out, inner = _shape(node, "down")[1:]
    biases = _given(node, "gate_up_bias") * rows + _given(node, "down_bias") * out
    one = 2 * rows * width + PER_ELEMENT["gated_activation"] * inner + 2 * out * inner + biases + out
    chosen = _shape(node, "ids")[1] if _given(node, "ids") else _shape(node, "down")[0]
    return _shape(node, "x")[0] * chosen * one


HEAVY: dict[str, Callable[[fx.Node], int]] = {
    "linear": _linear,
    "linear_int8": _product("x"),
    "fused_linear": _linear,
    "expert_matmul": _expert_matmul,
    "experts": _experts,
    "aten._grouped_mm": _product("self"),
    "transformers.grouped_mm_fallback": _product("input"),
    "attention": _attention("q", "k", "v"),
    "attention_lse": _attention("q", "k", "v"),
    "aten.linear": _linear,
    "aten.scaled_dot_product_attention": _attention("query", "key", "value"),
    "aten.mm": _product("self"),
    "aten.bmm": _product("self"),
    "aten.matmul": _product("self"),
    "aten.mv": _product("self"),
    "aten.dot": lambda node: 2 * _largest(node),
    "aten.addmm": _product("mat1"),
    "aten.baddbmm": _product("batch1"),
    "aten.einsum": _einsum,
    "aten.convolution": _convolution,
    "aten.conv1d": _convolution,
    "aten.conv2d": _convolution,
    "aten.conv3d": _convolution,
    "aten.softmax": _largest,
    "aten._softmax": _largest,
    "aten._safe_softmax": _largest,
}
