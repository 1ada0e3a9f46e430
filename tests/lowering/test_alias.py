"""graphopt.lowering.alias: what may share memory with a value, who reads it, and whether it escapes."""

from __future__ import annotations

import operator

import torch

from graphopt.lowering.alias import escapes, family, readers, views_argument
from tests.graphs import Builder

aten = torch.ops.aten


def test_views_are_told_from_readers_by_their_schema() -> None:
    build = Builder()
    x = build.input("x", 4, 6)
    part = build.call(aten.slice.Tensor, x, 0, 0, 2)
    turned = build.call(aten.permute.default, part, [1, 0])
    doubled = build.call(aten.mul.Tensor, turned, 2)
    build.done(doubled)
    assert views_argument(part, x) and views_argument(turned, part)
    assert not views_argument(doubled, turned) and not views_argument(x, part)
    assert family(x) == {x, part, turned}
    assert readers(x) == {doubled}
    assert family(x, without=part) == {x} and readers(x, without=part) == set()


def test_pieces_of_a_split_are_of_the_family() -> None:
    build = Builder()
    x = build.input("x", 4, 6)
    pieces = build.call(aten.split.Tensor, x, 2)
    first = build.call(operator.getitem, pieces, 0)
    build.done(build.call(aten.neg.default, first))
    assert family(x) == {x, pieces, first}


def test_a_write_reads_and_its_result_is_a_view() -> None:
    build = Builder()
    x, y = build.input("x", 3), build.input("y", 3)
    written = build.call(aten.add_.Tensor, x, y)
    build.done(build.call(aten.neg.default, y))
    assert written in family(x) and written in readers(x)
    assert not views_argument(written, y)


def test_what_is_returned_or_written_escapes() -> None:
    build = Builder()
    x, y, z = (build.input(name, 3, 2) for name in "xyz")
    view = build.call(aten.permute.default, x, [1, 0])
    build.call(aten.add_.Tensor, z, y)
    build.done(view, build.call(aten.neg.default, y))
    assert escapes(x) and escapes(z)
    assert not escapes(build.call(aten.neg.default, x))
