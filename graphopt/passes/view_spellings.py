"""Spellings of views, splits and casts: reshape, permute, expand, slice, select and to.dtype say them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import fx

from graphopt import graph as g
from graphopt.aliasing import root
from graphopt.errors import CaptureRefused
from graphopt.passes.layout import dim_order
from graphopt.passes.views import PERMUTATIONS

if TYPE_CHECKING:
    from graphopt.passes.speller import Speller

aten = torch.ops.aten
Result: TypeAlias = "fx.Node | int | float | bool | Pieces | None"
Spelling: TypeAlias = "Callable[[Speller, fx.Node, tuple, dict[str, object]], Result]"


class Pieces(tuple[fx.Node, ...]):
    """The results of a split: a tuple of canonical slices, picked by `getitem`."""


# ------------------------------------------------------------------------------------------------- views


def identity(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """clone(x), contiguous(x), detach(x) -> x"""
    return args[0]


def reshape(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """view, unsqueeze, squeeze, flatten … -> reshape(x, [sizes]); a reshape of a reshape reads the first
    tensor.
    """
    return s.reshape(args[0], g.val(node), node)


def permute(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """transpose, t, mT, movedim … -> permute(x, [dims]); permutations compose, the identity goes."""
    rank = g.rank(args[0])
    dims = PERMUTATIONS[node.target](rank, args)  # type: ignore[index]  # the row's own overloads
    return s.permute(args[0], [d % max(rank, 1) for d in dims], g.val(node), node)


def expand(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """expand(x, [2, -1]), expand_as, broadcast_to -> expand(x, [all sizes]); to the same sizes it goes."""
    value = g.val(node)
    assert isinstance(value, torch.Tensor)
    if g.same_shape(g.shape(args[0]), tuple(value.shape)):
        return args[0]
    return s.emit(aten.expand.default, (args[0], s.sizes(value.shape)), {"implicit": False}, value, node)


def repeat_interleave(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """repeat_interleave(x, 1, dim) -> x"""
    if args[2] is not None and g.same_shape(g.shape(args[0]), g.shape(node)):
        return args[0]
    return s.generic(node, args, kwargs)


def slice_(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """slice(x, dim, None, maxint) -> slice(x, dim - rank, 0, size, 1); a slice of everything goes."""
    x, dim, start, end, step = args
    return s.slice(x, dim % g.rank(x), start, end, step, g.val(node), node)


def narrow(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """narrow(x, dim, start, length) -> slice"""
    x, dim, start, length = args
    if not isinstance(start, int) or not isinstance(length, int):
        return s.generic(node, args, kwargs)
    return s.slice(x, dim % g.rank(x), start, start + length, 1, g.val(node), node)


def select(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """select(x, dim, -1) -> select(x, dim - rank, size - 1)"""
    x, dim, index = args
    size = g.shape(x)[dim]
    if isinstance(index, int) and index < 0 and isinstance(size, int):
        index += size
    return s.emit(aten.select.int, (x, dim % g.rank(x) - g.rank(x), index), {}, g.val(node), node)


def view_as_complex(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """view_as_complex(x [.., 2]) -> complex(x[.., 0], x[.., 1]), which takes any strides of x"""
    x = args[0]
    old = g.tensor(x)
    assert old is not None
    parts = [s.emit(aten.select.int, (x, -1, i), {}, old.select(-1, i), node) for i in (0, 1)]
    return s.emit(aten.complex.default, tuple(parts), {}, g.val(node), node)


def as_strided(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """as_strided(x, sizes, strides) -> slices, reshapes and unfolds of x's elements as eager stores them

    What passes make of x may lie in memory otherwise: a merged linear's piece has other strides.

    Raises:
        CaptureRefused: x is not dense, or it reads outside of it; a size or the start is not fixed.
    """
    old = g.tensor(node.args[0])  # type: ignore[arg-type]  # a node: its row of the schema
    assert old is not None
    order, (sizes, strides, offset) = dim_order(old), args[1:4]
    numbers = [*old.shape, *sizes, *strides, 0 if offset is None else offset]
    if order is None or not all(isinstance(n, int) for n in numbers) or 0 in sizes:
        raise CaptureRefused(
            f"{node.name} (as_strided) reads the memory of a tensor of strides {tuple(old.stride())} and "
            f"shape {tuple(old.shape)}; known are dense tensors of fixed sizes"
        )
    if offset is not None and root(node).op == "placeholder":
        raise CaptureRefused(
            f"{node.name} (as_strided) counts from the start of an input's memory; another call may pass a "
            "view that starts elsewhere"
        )
    start = 0 if offset is None else offset - old.storage_offset()
    end = start + 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if start < 0 or end > old.numel():
        raise CaptureRefused(
            f"{node.name} (as_strided) reads elements {start} to {end - 1} of a tensor that has {old.numel()}"
        )
    value = old.permute(order)
    x = s.permute(args[0], order, value, node)
    value = value.reshape(-1)
    x, value = s.reshape(x, value, node), value[start:end]
    x = s.slice(x, 0, start, end, 1, value, node)
    steps = [(n, step) for n, step in zip(sizes, strides, strict=True) if n > 1 and step > 0]
    for i, (n, step) in enumerate(steps):
        inner = 1 + sum((m - 1) * smaller for m, smaller in steps[i + 1 :])
        last, rank = (n - 1) * step + inner, value.dim()
        value = value.narrow(-1, 0, last)
        x = s.slice(x, rank - 1, 0, last, 1, value, node)
        if inner == step:
            value = value.reshape(*value.shape[:-1], n, inner)
            x = s.reshape(x, value, node)
        else:
            value = value.unfold(-1, inner, step)
            x = s.emit(aten.unfold.default, (x, -1, inner, step), {}, value, node)
    value = value.reshape([n if step else 1 for n, step in zip(sizes, strides, strict=True)])
    x, wide = s.reshape(x, value, node), value.expand(sizes)
    if 0 not in strides:
        return x
    return s.emit(aten.expand.default, (x, list(sizes)), {"implicit": False}, wide, node)


def pieces(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """split, chunk, tensor_split … -> a slice for each piece"""
    x, values = args[0], g.val(node)
    assert isinstance(values, (list, tuple))
    dim = g.arg(node, "dim")
    assert isinstance(dim, int)
    dim %= g.rank(x)
    found, start = [], 0
    for i, value in enumerate(values):
        size = value.shape[dim]
        if not isinstance(size, int) or not isinstance(start, int):
            return s.generic(node, args, kwargs)
        last = i == len(values) - 1
        end = g.shape(x)[dim] if last else start + size
        found.append(s.slice(x, dim, start, end, 1, value, node))
        start += size
    return Pieces(found)


def unbind(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """unbind(x, dim) -> select(x, dim, i) for each i"""
    values = g.val(node)
    assert isinstance(values, (list, tuple))
    dim = args[1] % g.rank(args[0]) - g.rank(args[0])
    return Pieces(s.emit(aten.select.int, (args[0], dim, i), {}, v, node) for i, v in enumerate(values))


def getitem(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """getitem(split(x), i) -> that slice"""
    if isinstance(args[0], Pieces):
        return args[0][args[1]]
    return s.generic(node, args, kwargs)


# ------------------------------------------------------------------------------------------------- casts


def cast(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """to.*, type_as, float(), _to_copy -> to.dtype(x, dtype); a cast to the same dtype goes; a move stays a
    move.
    """
    x, value = args[0], g.val(node)
    assert isinstance(value, torch.Tensor)
    if value.device != g.device(x):
        return s.emit(aten.to.device, (x, value.device, value.dtype, False, False, None), {}, value, node)
    return s.cast(x, value.dtype, node)


def softmax(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """softmax(x, dim, dtype) -> softmax(to(x, dtype), dim - rank)"""
    x, value = args[0], g.val(node)
    assert isinstance(value, torch.Tensor)
    x = s.cast(x, value.dtype, node)
    return s.emit(
        aten.softmax.int, (x, args[1] % max(g.rank(x), 1) - max(g.rank(x), 1), None), {}, value, node
    )
