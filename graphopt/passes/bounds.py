"""Between which numbers integers lie that a choice made: masks of what is never so, and clamps, go.

    masked_fill(x, topk(scores [..., E]).indices >= E, value)   is x
    clamp(topk(scores [..., E]).indices, 0, E - 1)              is the indices

A library masks and clamps experts that another rank holds; where no rank does, nothing is masked.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from graphopt import graph as g
from graphopt.passes.view_spellings import Result

if TYPE_CHECKING:
    from graphopt.passes.speller import Speller

aten = torch.ops.aten

PLACES = (aten.argmax.default, aten.argmin.default, aten.argsort.default, aten.argsort.stable)
CHOICES = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim)
# Their first argument's numbers, some of them, in another place.
VIEWS = (aten.reshape.default, aten.permute.default, aten.expand.default, aten.slice.Tensor)
TAKING = (*VIEWS, aten.index.Tensor, aten.gather.default, aten.index_select.default, aten.select.int)


def bounds(x: object) -> tuple[int, int] | None:
    """The least and the largest number that may be among integers; None where nothing says so."""
    if not isinstance(x, fx.Node) or not g.is_tensor(x) or g.dtype(x) not in (torch.int64, torch.int32):
        return None
    if g.is_call(x, *PLACES):
        return _places(x)
    if x.target is operator.getitem and g.is_call(x.args[0], *CHOICES):
        choice = x.args[0]
        assert isinstance(choice, fx.Node)
        return _places(choice) if x.args[1] == 1 else bounds(choice.args[0])
    if g.is_call(x, *TAKING):
        return bounds(x.args[0])
    if g.is_call(x, aten.cat.default, aten.stack.default):
        return _of_all([bounds(part) for part in x.args[0]])  # type: ignore[union-attr]  # a list of tensors
    if g.is_call(x, aten.to.dtype):  # to 32 bits, from numbers that fit
        inner = bounds(x.args[0])
        return inner if inner and max(map(abs, inner)) < 2**31 else None
    if g.is_call(x, aten.clamp.default):
        return _clamped(bounds(x.args[0]), *x.args[1:3])
    if g.is_call(x, aten.clamp_min.default):
        return _clamped(bounds(x.args[0]), x.args[1], None)
    if g.is_call(x, aten.clamp_max.default):
        return _clamped(bounds(x.args[0]), None, x.args[1])
    return None


def never(mask: object) -> bool:
    """Whether a boolean tensor is false everywhere, whatever the inputs: it asks what is out of bounds."""
    while g.is_call(mask, *VIEWS):
        mask = mask.args[0]  # type: ignore[attr-defined]  # a call
    if not isinstance(mask, fx.Node) or len(mask.args) < 2 or not isinstance(mask.args[1], int):
        return False
    known, limit = bounds(mask.args[0]), mask.args[1]
    if known is None:
        return False
    least, most = known
    return (
        (g.is_call(mask, aten.ge.Scalar) and most < limit)
        or (g.is_call(mask, aten.gt.Scalar) and most <= limit)
        or (g.is_call(mask, aten.lt.Scalar) and least >= limit)
        or (g.is_call(mask, aten.le.Scalar) and least > limit)
        or (g.is_call(mask, aten.eq.Scalar) and not least <= limit <= most)
    )


def masked_fill(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """masked_fill(x, mask, value) -> x, where the mask is false everywhere"""
    x, mask = args[:2]
    if never(mask) and g.same_shape(g.shape(x), g.shape(node)):
        return x
    return s.generic(node, args, kwargs)


def clamp(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """clamp(x, least, most) -> x, where x's integers lie between anyway; clamp(x, least) -> clamp_min"""
    x, least, most = args
    known = bounds(x)
    if known and g.dtype(node) == g.dtype(x) and _clamped(known, least, most) == known:
        return x
    if most is None:
        return s.emit(aten.clamp_min.default, (x, least), {}, g.val(node), node)
    if least is None:
        return s.emit(aten.clamp_max.default, (x, most), {}, g.val(node), node)
    return s.generic(node, args, kwargs)


def _places(choice: fx.Node) -> tuple[int, int] | None:
    """Of indices along a dimension of literal size."""
    dim, sizes = g.arg(choice, "dim"), g.shape(choice.args[0])  # type: ignore[arg-type]  # a tensor's node
    size = sizes[dim] if isinstance(dim, int) and sizes else None
    return (0, max(size - 1, 0)) if isinstance(size, int) else None


def _of_all(parts: Sequence[tuple[int, int] | None]) -> tuple[int, int] | None:
    """Of numbers that lie within any of these bounds."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def _clamped(known: tuple[int, int] | None, least: object, most: object) -> tuple[int, int] | None:
    """Bounds after a clamp with literals; as torch does it, the largest wins where the least is above it."""
    if known is None or not all(x is None or isinstance(x, int) for x in (least, most)):
        return None
    low, high = known
    if isinstance(least, int):
        low, high = max(low, least), max(high, least)
    if isinstance(most, int):
        low, high = min(low, most), min(high, most)
    return low, high
