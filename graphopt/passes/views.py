"""Views by kind: which only rename elements, which permute them, and how a write through one becomes a value.

v = select(x, 0, i); v.add_(1)   ->   x1 = select_scatter(x, add(v, 1), 0, i)
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import fx

from graphopt import graph as g
from graphopt.aliasing import storage
from graphopt.errors import CaptureRefused
from graphopt.torch_private import OpOverload

aten = torch.ops.aten
Emit: TypeAlias = "Callable[..., fx.Node]"
Dims: TypeAlias = "Callable[[int, tuple], Sequence[int]]"  # rank and arguments -> the permutation


def overloads(*names: str) -> tuple[OpOverload, ...]:
    """The aten overloads of these names that this torch has: `add.Tensor`, or `relu` for `relu.default`."""
    found = []
    for name in names:
        packet_name, _, overload = name.partition(".")
        packet = getattr(aten, packet_name, None)
        if packet is not None and (overload or "default") in packet.overloads():
            found.append(getattr(packet, overload or "default"))
    return tuple(found)


def _swapped(rank: int, a: int, b: int) -> list[int]:
    dims = list(range(rank))
    if rank:
        dims[a], dims[b] = dims[b], dims[a]
    return dims


def _moved(rank: int, args: tuple) -> list[int]:
    sources = [args[1]] if isinstance(args[1], int) else list(args[1])
    targets = [args[2]] if isinstance(args[2], int) else list(args[2])
    if not rank:
        return []
    place = {t % rank: s % rank for s, t in zip(sources, targets, strict=True)}
    rest = iter(d for d in range(rank) if d not in set(place.values()))
    return [place[i] if i in place else next(rest) for i in range(rank)]


_PERMUTATIONS: tuple[tuple[Dims, tuple[str, ...]], ...] = (
    (lambda rank, a: a[1], ("permute",)),
    (lambda rank, a: _swapped(rank, a[1], a[2]), ("transpose.int", "swapaxes", "swapdims")),
    (lambda rank, a: range(rank)[::-1], ("t", "numpy_T")),
    (lambda rank, a: _swapped(rank, -1, -2), ("mT", "mH", "adjoint")),
    (_moved, ("movedim.int", "movedim.intlist", "moveaxis.int", "moveaxis.intlist")),
)
PERMUTATIONS: dict[OpOverload, Dims] = {o: dims for dims, names in _PERMUTATIONS for o in overloads(*names)}

# The same elements in the same order: the result's shape says everything.
RESHAPES = overloads(
    *("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims", "ravel"),
    *("flatten.using_ints", "unflatten.int", "view_as", "reshape_as"),
)
# May return their argument as it is.
SAME = overloads(
    *("contiguous", "detach", "detach_", "alias", "lift_fresh", "positive"),
    *("to.dtype", "to.device", "to.dtype_layout", "to.other", "type_as"),
)
EXPANDS = overloads("expand", "expand_as", "broadcast_to")
# Read from a storage at places of their own: meaningless on any other tensor than the one they were made of.
ABSOLUTE = overloads("as_strided")
# view(x, *args) = value  ->  scatter(x, value, *args)
SCATTERS: dict[OpOverload, OpOverload] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
SPLITS = overloads(
    "split.Tensor", "split.sizes", "split_with_sizes", "chunk", "tensor_split.sections", "unbind.int"
)


def permutation(node: fx.Node) -> list[int] | None:
    """The dimensions, in [0, rank), that a call reorders its argument to; None where it is no permutation."""
    dims = PERMUTATIONS.get(node.target)  # type: ignore[call-overload]  # any target may be asked for
    if dims is None:
        return None
    rank = g.rank(node)
    return [d % max(rank, 1) for d in dims(rank, node.args)]


def parent(node: fx.Node) -> fx.Node:
    """The argument whose storage a node shares.

    Raises:
        CaptureRefused: it aliases a tensor that it does not read.
    """
    key = storage(g.val(node))
    for argument in node.all_input_nodes:
        value = g.val(argument)
        pieces = value if isinstance(value, (list, tuple)) else (value,)
        if key in {storage(v) for v in pieces}:
            return argument
    raise CaptureRefused(
        f"{node.target} aliases a tensor that it does not read ({g.source(node) or node.name})"
    )


def scatter(
    emit: Emit, view: fx.Node, whole: fx.Node, value: fx.Node, read: Callable[[fx.Node], fx.Node]
) -> fx.Node:
    """view(whole) = value  ->  the whole's new value, with pure calls.

    Args:
        emit: makes a call: emit(target, args, abstract value, like).
        view: the old node of the view.
        whole: the new node with the newest value of what it is a view of.
        value: the new node with the view's new value.
        read: the newest value of an old node.

    Raises:
        CaptureRefused: through `expand` one element is written several times; `as_strided` knows no base.
    """
    base = parent(view)
    like = g.val(base)
    if view.target in EXPANDS and not g.same_shape(g.shape(view), g.shape(base)):
        raise CaptureRefused(f"a write through {view.target} has no meaning as a value ({_where(view)})")
    if view.target in ABSOLUTE:
        raise CaptureRefused(f"a write through {view.target} depends on the storage below ({_where(view)})")
    if view.target in SCATTERS:
        args = fx.node.map_arg(view.args[1:], read)
        return emit(SCATTERS[view.target], (whole, value, *args), like, view)
    if view.target is aten.narrow.default and all(isinstance(n, int) and n >= 0 for n in view.args[2:4]):
        dim, start, length = view.args[1:4]
        return emit(aten.slice_scatter.default, (whole, value, dim, start, start + length), like, view)  # type: ignore[operator]  # ints
    if view.target in RESHAPES:
        sizes = [
            s if isinstance(s, int) else emit(aten.sym_size.int, (whole, i), s, view)
            for i, s in enumerate(g.shape(base))
        ]
        return emit(aten.reshape.default, (value, sizes), like, view)
    if view.target in SAME or view.target in EXPANDS:
        return value
    dims = permutation(view)
    if dims is not None:
        return emit(aten.permute.default, (value, [dims.index(i) for i in range(len(dims))]), like, view)
    if view.target is operator.getitem and base.target in SPLITS:
        start, dim = _place(view, base)
        if base.target is aten.unbind.int:
            return emit(aten.select_scatter.default, (whole, value, dim, start), like_of_split(base), view)
        if isinstance(start, int):
            end = start + g.shape(view)[dim]
            if isinstance(end, int):
                return emit(
                    aten.slice_scatter.default, (whole, value, dim, start, end), like_of_split(base), view
                )
    return _written_copy(emit, view, whole, value, read)


def like_of_split(split: fx.Node) -> object:
    """The abstract value of what was split."""
    return g.val(parent(split))


def _place(piece: fx.Node, split: fx.Node) -> tuple[g.Size, int]:
    """Where a piece of a split begins (for `unbind`: its index), and along which dimension."""
    index, dim, pieces = piece.args[1], g.arg(split, "dim"), g.val(split)
    assert isinstance(index, int) and isinstance(dim, int) and isinstance(pieces, (list, tuple))
    dim %= g.rank(parent(split))
    if split.target is aten.unbind.int:
        return index % len(pieces), dim
    return sum(p.shape[dim] for p in pieces[: index % len(pieces)]), dim


def _written_copy(
    emit: Emit, view: fx.Node, whole: fx.Node, value: fx.Node, read: Callable[[fx.Node], fx.Node]
) -> fx.Node:
    """Any other view: private = clone(whole); copy_(view(private), value); the new value is `private`."""
    chain = [view]
    while isinstance(g.val(parent(chain[-1])), (list, tuple)):
        chain.append(parent(chain[-1]))
    base = parent(chain[-1])
    private = emit(aten.clone.default, (whole,), g.val(base), view)
    private.meta["keep"] = True
    inner, old = private, base
    for step in reversed(chain):
        swap = {old: inner}
        args, kwargs = fx.node.map_arg((step.args, step.kwargs), functools.partial(_swapped_or, swap, read))
        inner, old = emit(step.target, args, g.val(step), step, kwargs), step
    emit(aten.copy_.default, (inner, value, False), g.val(view), view)
    return private


def _swapped_or(swap: dict[fx.Node, fx.Node], read: Callable[[fx.Node], fx.Node], node: fx.Node) -> fx.Node:
    return swap.get(node) or read(node)


def _where(node: fx.Node) -> str:
    return g.source(node) or node.name
