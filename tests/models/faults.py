"""Faults for a graph, raw or recognised: an accuracy test must fail on each, or it tests nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from graphopt import graph

aten = torch.ops.aten

WRONG_SCALE = 1.25  # a wrong head_dim gives at least sqrt(2)
MORE_EPS = 0.1  # ten times the fixtures' eps; near the mean of squares, so that half precision shows it too


@dataclass(frozen=True)
class Fault:
    """One mistake a rewrite could make.

    `sites` lists the nodes where it can be made; `damage` makes it at one of them, in place.
    """

    name: str
    sites: Callable[[fx.Graph], list[fx.Node]]
    damage: Callable[[fx.Node], None]

    def __str__(self) -> str:
        return self.name


def inject(fault: Fault, gm: fx.GraphModule, site: int | None = None) -> fx.GraphModule:
    """A copy of the graph (weights shared) with the fault at one of its sites, or at all of them.

    A wrong rule errs in every layer; one site is the harder test (`match` took one node for another).

    Raises:
        IndexError: the graph has no such site.
    """
    copied = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        env[node] = copied.node_copy(node, env.__getitem__)
    sites = fault.sites(copied)
    if not sites:
        raise IndexError(f"no place for the fault {fault.name!r} in this graph")
    for node in sites if site is None else [sites[site]]:
        fault.damage(node)
    copied.lint()
    return fx.GraphModule(gm, copied)


# ----------------------------------------------------------------------------------------------- helpers


def _calls(*names: str) -> Callable[[fx.Graph], list[fx.Node]]:
    """The calls of operators by their short names (`attention`, `aten.layer_norm`)."""
    return lambda g: [n for n in g.nodes if graph.op_name(n) in names]


def _set(node: fx.Node, name: str, value: object) -> None:
    """Give an operator's argument another value, wherever its schema has it."""
    if node.target._schema.arguments[graph.argument_names(node.target).index(name)].kwarg_only:
        node.kwargs = {**node.kwargs, name: value}
        return
    names = graph.argument_names(node.target)
    positional = [graph.arg(node, n) for n in names[: max(len(node.args), names.index(name) + 1)]]
    positional[names.index(name)] = value
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in names[: len(positional)]}
    node.args = tuple(positional)


def _insert(before: fx.Node, target: Callable[..., object], like: object, *args: object) -> fx.Node:
    """A new call in front of a node, with the abstract value of another argument."""
    with before.graph.inserting_before(before):
        new = before.graph.call_function(target, args)
    if isinstance(like, fx.Node):
        graph.set_val(new, graph.val(like))
    return new


def _changed(node: fx.Node, x: object, op: Callable[[object, object], object], y: float) -> object:
    """op(x, y), of a literal at once, of a node that holds a number as a new node."""
    return _insert(node, op, x, x, y) if isinstance(x, fx.Node) else op(x, y)


# ------------------------------------------------------------------------------------------------ faults

_ATTENTIONS = ("attention", "attention_lse")
_SDPA = "aten.scaled_dot_product_attention"
_MASKS = {"causal": False, "window": None, "key_padding": None, "bias": None}
_SDPA_MASKS = {"is_causal": False, "attn_mask": None}


def _scaled(g: fx.Graph) -> list[fx.Node]:
    """Attentions; in a raw graph also the literal that multiplies a matmul."""
    products = [n for n in g.nodes if graph.is_call(n, aten.mul.Tensor) and isinstance(n.args[1], float)]
    spelled = [n for n in products if graph.is_call(n.args[0], aten.matmul.default)]
    return _calls(*_ATTENTIONS, _SDPA)(g) + spelled


def _scale(node: fx.Node) -> None:
    """scale -> scale * 1.25"""
    if graph.is_call(node, aten.mul.Tensor):
        node.update_arg(1, node.args[1] * WRONG_SCALE)
        return
    scale = graph.arg(node, "scale")
    if scale is None:
        scale = graph.shape(node.args[0])[-1] ** -0.5
    _set(node, "scale", _changed(node, scale, operator.mul, WRONG_SCALE))


def _masked(g: fx.Graph) -> list[fx.Node]:
    """Attentions that hide keys; in a raw graph also softmaxes of a sum."""

    def hides(node: fx.Node) -> bool:
        masks = _SDPA_MASKS if graph.op_name(node) == _SDPA else _MASKS
        return any(graph.arg(node, name) != nothing for name, nothing in masks.items())

    spelled = [n for n in _calls("aten.softmax")(g) if graph.is_call(n.args[0], aten.add.Tensor)]
    return [n for n in _calls(*_ATTENTIONS, _SDPA)(g) if hides(n)] + spelled


def _unmask(node: fx.Node) -> None:
    """attention(causal, window, key_padding, bias) -> attention()"""
    if graph.op_name(node) == "aten.softmax":
        node.update_arg(0, node.args[0].args[0])
        return
    for name, nothing in (_SDPA_MASKS if graph.op_name(node) == _SDPA else _MASKS).items():
        _set(node, name, nothing)


def _causal(g: fx.Graph) -> list[fx.Node]:
    return [n for n in _calls(*_ATTENTIONS)(g) if graph.arg(n, "causal")]


def _late(node: fx.Node) -> None:
    """Each query sees one key of its future."""
    _set(node, "offset", _changed(node, graph.arg(node, "offset"), operator.add, 1))


def _windowed(g: fx.Graph) -> list[fx.Node]:
    return [n for n in _calls(*_ATTENTIONS)(g) if graph.arg(n, "window") is not None]


def _widen(node: fx.Node) -> None:
    """The window is one key longer."""
    _set(node, "window", _changed(node, graph.arg(node, "window"), operator.add, 1))


def _padded(g: fx.Graph) -> list[fx.Node]:
    return [n for n in _calls(*_ATTENTIONS)(g) if graph.arg(n, "key_padding") is not None]


def _rotated(g: fx.Graph) -> list[fx.Node]:
    return _calls("rope")(g) or _calls("aten.sin")(g)


def _turn_back(node: fx.Node) -> None:
    """sin -> -sin"""
    if graph.op_name(node) == "rope":
        sin = graph.arg(node, "sin")
        _set(node, "sin", _insert(node, aten.neg.default, sin, sin))
        return
    negative = _insert(node.next, aten.neg.default, node, node)
    node.replace_all_uses_with(negative, lambda user: user is not negative)


def _swappable(g: fx.Graph) -> list[fx.Node]:
    return [n for n in _calls(*_ATTENTIONS, _SDPA)(g) if graph.same_shape(*map(graph.shape, n.args[1:3]))]


def _swap(node: fx.Node) -> None:
    """attention(q, k, v) -> attention(q, v, k)"""
    q, k, v, *rest = node.args
    node.args = (q, v, k, *rest)


def _placed(g: fx.Graph) -> list[fx.Node]:
    return [n for n in _calls("cache_update")(g) if graph.arg(n, "position") is not None]


def _shift(node: fx.Node) -> None:
    """A new token's key or value is written one row too far."""
    position = graph.arg(node, "position")
    _set(node, "position", _insert(node, aten.add.Tensor, position, position, 1))


_NORMS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "aten.layer_norm", "aten.rms_norm")


def _normed(g: fx.Graph) -> list[fx.Node]:
    """Norms; in a raw graph also the literal added to a mean of squares."""
    sums = [n for n in g.nodes if graph.is_call(n, aten.add.Tensor) and isinstance(n.args[1], float)]
    return _calls(*_NORMS)(g) + [n for n in sums if graph.is_call(n.args[0], aten.mean.dim)]


def _thicken(node: fx.Node) -> None:
    """eps -> eps + 0.1"""
    if graph.is_call(node, aten.add.Tensor):
        node.update_arg(1, node.args[1] + MORE_EPS)
        return
    _set(node, "eps", _changed(node, graph.arg(node, "eps"), operator.add, MORE_EPS))


def _residuals(g: fx.Graph) -> list[fx.Node]:
    """Ops that add a residual, and sums of two hidden states [batch, length, width] of one shape."""

    def adds_hidden_states(node: fx.Node) -> bool:
        if not graph.is_call(node, aten.add.Tensor) or not all(map(graph.is_tensor, node.args[:2])):
            return False
        x, y = node.args[:2]
        if graph.rank(x) != 3 or not graph.same_shape(graph.shape(x), graph.shape(y)):
            return False
        return graph.dtype(node).is_floating_point

    taking = _calls("add_rms_norm", "add_layer_norm", "fused_linear")(g)
    sums = [n for n in g.nodes if adds_hidden_states(n)]
    return [n for n in taking if graph.arg(n, "residual") is not None] + sums


def _drop(node: fx.Node) -> None:
    """x + residual -> x, where the residual is the operand that was there first"""
    if graph.op_name(node) == "fused_linear":
        _set(node, "residual", None)
    elif graph.is_call(node, aten.add.Tensor):
        node.replace_all_uses_with(_last(node))
    else:
        first, last = _first(node), _last(node)
        node.args = (last, _insert(node, aten.mul.Tensor, first, first, 0.0), *node.args[2:])


def _first(node: fx.Node) -> fx.Node:
    """Of a call's two first arguments, the one that was computed first."""
    return next(n for n in node.graph.nodes if n in node.args[:2])


def _last(node: fx.Node) -> fx.Node:
    """Of a call's two first arguments, the one that was computed last."""
    return next(n for n in reversed(node.graph.nodes) if n in node.args[:2])


FAULTS = (
    Fault("scale", _scaled, _scale),
    Fault("mask dropped", _masked, _unmask),
    Fault("mask off by one", _causal, _late),
    Fault("window off by one", _windowed, _widen),
    Fault("padding dropped", _padded, lambda node: _set(node, "key_padding", None)),
    Fault("rope sign", _rotated, _turn_back),
    Fault("cache position", _placed, _shift),
    Fault("k and v swapped", _swappable, _swap),
    Fault("eps", _normed, _thicken),
    Fault("dropped residual", _residuals, _drop),
)
