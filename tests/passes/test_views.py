"""graphopt.passes.views: permutations by name, parents by storage, writes through views as values."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx

from graphopt.errors import CaptureRefused
from graphopt.graph import set_val
from graphopt.passes import views
from tests.graphs import Builder

aten = torch.ops.aten

PERMUTATIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple[object, ...]]] = {
    "permute": (aten.permute.default, ([2, 0, -2],)),
    "transpose": (aten.transpose.int, (-1, 0)),
    "mT": (aten.mT.default, ()),
    "movedim": (aten.movedim.int, (0, -1)),
    "movedim of several": (aten.movedim.intlist, ([0, 1], [2, 0])),
}


@pytest.mark.parametrize("name", PERMUTATIONS)
def test_a_permutation_is_what_torch_does(name: str) -> None:
    target, args = PERMUTATIONS[name]
    build = Builder()
    node = build.call(target, build.input("x", 2, 3, 5), *args)
    dims = views.permutation(node)
    assert dims is not None and sorted(dims) == [0, 1, 2]
    x = torch.arange(30).view(2, 3, 5)
    assert torch.equal(x.permute(dims), target(x, *args))


def test_other_calls_are_no_permutation() -> None:
    build = Builder()
    assert views.permutation(build.call(aten.neg.default, build.input("x", 2, 3))) is None


def test_overloads_that_this_torch_lacks_are_left_out() -> None:
    assert views.overloads("relu", "add.Tensor", "no_such_operator", "add.NoSuchOverload") == (
        aten.relu.default,
        aten.add.Tensor,
    )


def test_the_parent_is_the_argument_whose_memory_is_shared() -> None:
    build = Builder()
    x = build.input("x", 4, 6)
    pieces = build.call(aten.split.Tensor, x, 2)
    piece = build.call(operator.getitem, pieces, 1)
    assert views.parent(piece) is pieces and views.parent(pieces) is x
    with pytest.raises(CaptureRefused, match=r"aten.neg.default aliases a tensor that it does not read"):
        views.parent(build.call(aten.neg.default, x))


# Views of x [4, 6] that are written to; the last has no scatter of its own.
WRITTEN: dict[str, tuple[Callable[..., torch.Tensor], tuple[object, ...]]] = {
    "select": (aten.select.int, (1, -2)),
    "slice": (aten.slice.Tensor, (0, 1, 4, 2)),
    "narrow": (aten.narrow.default, (1, 2, 3)),
    "diagonal": (aten.diagonal.default, (1,)),
    "view": (aten.view.default, ([2, 12],)),
    "transpose": (aten.transpose.int, (0, 1)),
    "unfold": (aten.unfold.default, (1, 2, 2)),
}


def emitter(build: Builder) -> views.Emit:
    """`emit` as `functionalize` gives it: a call with the abstract value it is told."""

    def emit(
        target: Callable[..., object], args: tuple, value: object, like: fx.Node, kwargs: dict | None = None
    ) -> fx.Node:
        new = build.graph.call_function(target, args, kwargs or {})
        set_val(new, value)
        return new

    return emit


@pytest.mark.parametrize("name", WRITTEN)
def test_a_write_through_a_view_is_the_same_value(name: str) -> None:
    target, args = WRITTEN[name]
    build = Builder()
    x = build.input("x", 4, 6)
    view = build.call(target, x, *args)
    value = build.call(aten.add.Tensor, view, 1)
    gm = build.done(views.scatter(emitter(build), view, x, value, lambda node: node))
    given = torch.randn(4, 6)
    expected = given.clone()
    target(expected, *args).add_(1)
    before = given.clone()
    assert torch.equal(gm(given)[0], expected) and torch.equal(given, before)


@pytest.mark.parametrize(
    ("target", "args", "reason"),
    [
        (aten.expand.default, ([3, 4, 6],), "has no meaning as a value"),
        (aten.as_strided.default, ([2, 2], [1, 1]), "depends on the storage below"),
    ],
)
def test_a_write_that_is_no_value_is_refused(
    target: Callable[..., object], args: tuple[object, ...], reason: str
) -> None:
    build = Builder()
    x = build.input("x", 4, 6)
    view = build.call(target, x, *args)
    with pytest.raises(CaptureRefused, match=reason):
        views.scatter(emitter(build), view, x, view, lambda node: node)
