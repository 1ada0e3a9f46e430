"""Spellings of views, splits and casts: reshape, permute, expand, slice, select and to.dtype say them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import fx

from graphopt import graph as g
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
