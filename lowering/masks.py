"""Make one additive mask of attention's causal, offset, window, padding and bias; all layers share it.

attention(q, k, v, s, causal=True, offset_tensor=t, key_padding=p)   ->   attention(q, k, v, s, bias=mask),
where mask is built once, before the first layer:
mask = where((arange(K) <= arange(Q)[:, None] + t) & p[:, None, None, :], 0, -inf)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.lowering.build import insert_call

aten = torch.ops.aten
ATTENTION = ops.attention.overload


def lower_masks(graph: fx.Graph) -> int:
    """Rewrite every `attention` whose mask is more than one additive tensor; returns how many.

    A plain causal triangle with offset 0 stays (kernels have it built in), and terms that hide nothing go.
    Rows without a key: hidden entries are -inf, which kernels turn into zeros; for `empty_rows_mean` they
    are the dtype's minimum, which makes the scores of such a row equal. `attention_lse` is left alone: its
    lse tells -inf from a minimum.
    """
    maker = _Maker(graph)
    return sum(maker.lower(node) for node in list(graph.nodes) if g.is_call(node, ATTENTION))


@dataclass(frozen=True)
class _Mask:
    """What one attention hides: the arguments that say so, without those that hide nothing."""

    causal: bool
    offset: object  # an int or a node that holds one
    offset_tensor: fx.Node | None
    window: object
    key_padding: fx.Node | None
    bias: fx.Node | None

    @property
    def hides(self) -> bool:
        """Whether there is anything but a float bias."""
        boolean = self.bias is not None and g.dtype(self.bias) == torch.bool
        return self.causal or self.window is not None or self.key_padding is not None or boolean


def mask_of(node: fx.Node) -> _Mask:
    """The mask of an attention node; a triangle or window that hides nothing is dropped."""
    offset, position = g.arg(node, "offset"), g.arg(node, "offset_tensor")
    window, causal = g.arg(node, "window"), bool(g.arg(node, "causal"))
    queries, keys = sizes(node)
    if position is None:
        last = g.expression(keys) - 1  # type: ignore[operator]  # an int or a sympy expression
        if causal and _never_negative(g.number(offset) - last):  # type: ignore[operator]  # as above
            causal = False  # j <= i + offset holds for every j: one query, and all keys are its past
        end = g.number(offset) + g.expression(queries)  # type: ignore[operator]  # as above
        if window is not None and _never_negative(g.number(window) - end):
            window = None  # j > i + offset - window holds for every i: the window is wider than the past
    padding, bias = g.arg(node, "key_padding"), g.arg(node, "bias")
    positioned = causal or window is not None
    return _Mask(
        causal,
        offset if positioned else 0,
        position if positioned else None,  # type: ignore[arg-type]  # a node or None
        window,
        padding,  # type: ignore[arg-type]  # a node or None
        bias,  # type: ignore[arg-type]  # a node or None
    )


def sizes(node: fx.Node) -> tuple[g.Size, g.Size]:
    """The number of queries and of keys."""
    q, k = node.args[:2]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node)
    return g.shape(q)[2], g.shape(k)[2]


def _never_negative(expr: object) -> bool:
    """Whether a size expression is known to be >= 0, whatever its symbols are."""
    return expr >= 0 if isinstance(expr, (int, float)) else bool(getattr(expr, "is_nonnegative", False))


@dataclass
class _Maker:
    """Builds masks in one graph; equal calls are made once, before the first node that needs them."""

    graph: fx.Graph
    known: dict[object, fx.Node] = field(default_factory=dict)
    held: dict[object, object] = field(
        default_factory=dict
    )  # size expression -> the literal or node that holds it

    def lower(self, node: fx.Node) -> bool:
        """Rewrite one attention; False where it can stay as it is."""
        mask = mask_of(node)
        plain = not (g.arg(node, "softcap") is not None or g.arg(node, "sinks") is not None)
        triangle = mask.causal and mask.window is None and mask.key_padding is None and mask.bias is None
        if triangle and plain and mask.offset_tensor is None and g.number(mask.offset) == 0:
            self.set(node, causal=True, offset=0, window=None, empty_rows_mean=False)
            return False
        if not mask.hides and mask.bias is None:
            self.set(node)
            return False
        with self.graph.inserting_before(node):
            bias = self.additive(node, mask)
        changed = bias is not mask.bias or mask.hides
        self.set(node, bias=bias, empty_rows_mean=bool(g.arg(node, "empty_rows_mean")) and not mask.hides)
        return changed

    def set(self, node: fx.Node, **changes: object) -> None:
        """Give an attention node its new mask arguments; those not named become what hides nothing."""
        cleared = dict.fromkeys(("offset_tensor", "window", "key_padding", "bias"))
        values = {**cleared, "causal": False, "offset": 0, **changes}
        names = g.argument_names(ATTENTION)
        node.args = tuple(values[n] if n in values else g.arg(node, n) for n in names)  # type: ignore[misc]  # arguments
        node.kwargs = {}

    # --------------------------------------------------------------------------------------------- building

    def additive(self, node: fx.Node, mask: _Mask) -> fx.Node:
        """A float tensor that broadcasts to [B, H, Q, K], in a dtype that kernels take with q's."""
        q = node.args[0]
        assert isinstance(q, fx.Node)
        mean = bool(g.arg(node, "empty_rows_mean"))
        # fp16's minimum does not swallow a score; fp32's does, and kernels take an fp32 mask beside a half q.
        dtype = torch.float32 if mean and g.dtype(q) == torch.float16 else g.dtype(q)
        bias = mask.bias if mask.bias is not None and g.dtype(mask.bias) != torch.bool else None
        if bias is not None and g.dtype(bias) == torch.float32:
            dtype = torch.float32 if g.dtype(q) != torch.float64 else dtype
        if bias is not None and g.dtype(bias) != dtype:
            bias = self.call(node, aten.to.dtype, bias, dtype, False, False, None)
        terms = self.terms(node, mask)
        if not terms:
            assert bias is not None
            return bias
        keep = reduce(lambda a, b: self.call(node, aten.logical_and.default, a, b), terms)
        if bias is None:
            bias = self.call(node, aten.full.default, [], 0.0, dtype=dtype, device=g.device(q))
        hidden = torch.finfo(dtype).min if mean else -torch.inf
        return self.call(node, aten.where.ScalarOther, keep, bias, hidden)

    def terms(self, node: fx.Node, mask: _Mask) -> list[fx.Node]:
        """Booleans that broadcast to [B, H, Q, K], True where a key is seen; shared ones first."""
        terms = []
        queries, keys = sizes(node)
        q, k = node.args[:2]
        if mask.causal or mask.window is not None:
            position, key = self.positions(node, mask, q, queries), self.arange(node, k, keys)
            if mask.causal:
                terms.append(self.call(node, aten.le.Tensor, key, position))
            if mask.window is not None:
                past = self.call(node, aten.sub.Tensor, position, mask.window)
                terms.append(self.call(node, aten.lt.Tensor, past, key))
        if mask.key_padding is not None:
            padding = mask.key_padding
            if g.dtype(padding) != torch.bool:
                padding = self.call(node, aten.ne.Scalar, padding, 0)
            batch = self.size(node, padding, 0)
            padding = self.call(node, aten.reshape.default, padding, [batch, 1, 1, self.size(node, k, 2)])
            terms.append(padding)
        if mask.bias is not None and g.dtype(mask.bias) == torch.bool:
            terms.append(mask.bias)
        return terms

    def positions(self, node: fx.Node, mask: _Mask, q: object, queries: g.Size) -> fx.Node:
        """The queries' positions, [Q, 1]: i + offset + offset_tensor."""
        position = self.arange(node, q, queries)
        position = self.call(node, aten.reshape.default, position, [self.size(node, q, 2), 1])
        if g.number(mask.offset) != 0:
            position = self.call(node, aten.add.Tensor, position, mask.offset)
        if mask.offset_tensor is None:
            return position
        start = mask.offset_tensor
        if g.rank(start) != 0:
            start = self.call(node, aten.reshape.default, start, [])
        return self.call(node, aten.add.Tensor, position, start)

    def arange(self, node: fx.Node, of: object, size: g.Size) -> fx.Node:
        """0 .. size - 1 on the device of a tensor whose dimension 2 it counts."""
        assert isinstance(of, fx.Node)
        return self.call(node, aten.arange.default, self.size(node, of, 2), device=g.device(of))

    def size(self, node: fx.Node, of: object, dim: int) -> object:
        """A size as an argument: the literal, or the node that holds it."""
        assert isinstance(of, fx.Node)
        size = g.expression(g.shape(of)[dim])
        if isinstance(size, int):
            return size
        if size not in self.held:
            self.held[size] = insert_call(self.graph, node, aten.sym_size.int, of, dim)
        return self.held[size]

    def call(self, like: fx.Node, target: Callable[..., object], *args: object, **kwargs: object) -> fx.Node:
        """A call, or the equal one made before."""
        key = (target, repr(args), repr(kwargs))
        if key not in self.known:
            new = self.known[key] = insert_call(self.graph, like, target, *args, **kwargs)
            new.meta.pop("origin", None)
            new.meta |= {
                "module_path": "",
                "source": "attention mask, shared by all layers",
            }  # no layer's own
        return self.known[key]
