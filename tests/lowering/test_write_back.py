"""Write-backs run in place where nobody can tell, and stay copies where somebody could."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from graphopt import ops
from graphopt.lowering.write_back import update_fresh, write_in_place
from tests.graphs import Builder, calls

aten = torch.ops.aten
UPDATE = ops.cache_update.overload


def cache_graph() -> tuple[Builder, fx.Node, fx.Node, fx.Node]:
    build = Builder()
    return (
        build,
        build.input("cache", 1, 2, 6, 4),
        build.input("new", 1, 2, 2, 4),
        build.input("position", 2, dtype=torch.int64),
    )


def values() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 2, 6, 4), torch.randn(1, 2, 2, 4), torch.tensor([3, 1])]


def behaves(
    build: Callable[[], fx.GraphModule], inputs: list[torch.Tensor], in_place: bool
) -> fx.GraphModule:
    """Same outputs and same inputs afterwards, in place or not as said."""
    before, after = build(), build()
    assert write_in_place(after.graph) == int(in_place)
    after.graph.lint()
    after.recompile()
    ours, theirs = [x.clone() for x in inputs], [x.clone() for x in inputs]
    pointers = [x.data_ptr() for x in ours]
    for one, two in zip(after(*ours), before(*theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert pointers == [x.data_ptr() for x in ours]
    return after


def write_back(build: Builder, target: fx.Node, value: fx.Node) -> fx.Node:
    return build.call(aten.copy_.default, target, value, False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_a_cache_update_runs_in_place(dtype: torch.dtype) -> None:
    def graph() -> fx.GraphModule:
        build = Builder()
        cache, new = build.input("cache", 1, 2, 6, 4), build.input("new", 1, 2, 2, 4)
        updated = build.call(UPDATE, cache, new, build.input("position", 2, dtype=dtype))
        read = build.call(aten.sum.default, updated)
        write_back(build, cache, updated)
        return build.done(read)

    inputs = values()
    inputs[2] = inputs[2].to(dtype)
    gm = behaves(graph, inputs, in_place=True)
    assert calls(gm, aten.index_copy_.default) and not calls(gm, aten.copy_.default, UPDATE)


@pytest.mark.parametrize("op", [aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor])
def test_a_counter_runs_in_place(op: Callable[..., object]) -> None:
    def graph() -> fx.GraphModule:
        build = Builder()
        counter = build.input("counter", dtype=torch.int64)
        old = build.call(aten.add.Tensor, counter, 10)
        more = build.call(op, counter, 3)
        write_back(build, counter, more)
        return build.done(old)

    behaves(graph, [torch.tensor(5)], in_place=True)


@pytest.mark.parametrize("scatter", ["slice", "select"])
def test_a_part_is_written_through_a_view(scatter: str) -> None:
    def graph() -> fx.GraphModule:
        build, cache, new, _ = cache_graph()
        if scatter == "slice":
            updated = build.call(aten.slice_scatter.default, cache, new, 2, 1, 3, 1)
        else:
            row = build.call(aten.select.int, new, 2, 0)
            updated = build.call(aten.select_scatter.default, cache, row, 2, 4)
        read = build.call(aten.neg.default, updated)
        write_back(build, cache, updated)
        return build.done(read)

    behaves(graph, values(), in_place=True)


def test_updates_in_a_row_run_in_place() -> None:
    def graph() -> fx.GraphModule:
        build, cache, new, position = cache_graph()
        once = build.call(aten.index_copy.default, cache, 2, position, new)
        twice = build.call(aten.slice_scatter.default, once, new, 2, 0, 2, 1)
        third = build.call(aten.mul.Tensor, twice, 2.0)
        read = build.call(aten.neg.default, third)
        write_back(build, cache, third)
        return build.done(read)

    behaves(graph, values(), in_place=True)


def test_the_input_that_is_returned_aliases_the_input() -> None:
    def graph() -> fx.GraphModule:
        build, cache, new, position = cache_graph()
        updated = build.call(UPDATE, cache, new, position)
        written = write_back(build, cache, updated)
        return build.done(build.call(aten.slice.Tensor, written, 2, 0, 3, 1))

    gm = behaves(graph, values(), in_place=True)
    cache, new, position = values()
    assert gm(cache, new, position)[0].data_ptr() == cache.data_ptr()


def late_reader(build: Builder, cache: fx.Node, updated: fx.Node, new: fx.Node) -> fx.Node:
    return build.call(aten.sub.Tensor, updated, cache)


def late_reader_of_a_view(build: Builder, cache: fx.Node, updated: fx.Node, new: fx.Node) -> fx.Node:
    return build.call(
        aten.sum.default,
        build.call(aten.select.int, build.call(aten.permute.default, cache, [0, 1, 3, 2]), 0, 0),
    )


@pytest.mark.parametrize("reader", [late_reader, late_reader_of_a_view])
def test_a_later_reader_of_the_old_state_keeps_the_copy(reader: Callable[..., fx.Node]) -> None:
    def graph() -> fx.GraphModule:
        build, cache, new, position = cache_graph()
        updated = build.call(UPDATE, cache, new, position)
        read = reader(build, cache, updated, new)
        write_back(build, cache, updated)
        return build.done(read)

    behaves(graph, values(), in_place=False)


def test_a_view_taken_early_and_read_late_keeps_the_copy() -> None:
    def graph() -> fx.GraphModule:
        build, cache, new, position = cache_graph()
        view = build.call(aten.slice.Tensor, cache, 2, 0, 2, 1)
        updated = build.call(UPDATE, cache, new, position)
        read = build.call(aten.neg.default, view)
        write_back(build, cache, updated)
        return build.done(read)

    behaves(graph, values(), in_place=False)


def test_an_early_reader_does_no_harm() -> None:
    def graph() -> fx.GraphModule:
        build, cache, new, position = cache_graph()
        read = build.call(aten.neg.default, cache)
        write_back(build, cache, build.call(UPDATE, cache, new, position))
        return build.done(read)

    behaves(graph, values(), in_place=True)


def test_a_value_that_is_returned_keeps_the_copy() -> None:
    def graph() -> fx.GraphModule:
        build, cache, new, position = cache_graph()
        updated = build.call(UPDATE, cache, new, position)
        write_back(build, cache, updated)
        return build.done(updated)

    gm = behaves(graph, values(), in_place=False)
    cache, new, position = values()
    assert gm(cache, new, position)[0].data_ptr() != cache.data_ptr()


def test_a_shift_that_reads_what_it_writes_keeps_the_copy() -> None:
    def graph() -> fx.GraphModule:
        build = Builder()
        cache = build.input("cache", 1, 2, 6, 4)
        tail = build.call(aten.slice.Tensor, cache, 2, 1, 6, 1)
        shifted = build.call(aten.slice_scatter.default, cache, tail, 2, 0, 5, 1)
        write_back(build, cache, shifted)
        return build.done()

    behaves(graph, values()[:1], in_place=False)


@pytest.mark.parametrize("other", ["appended", "elsewhere", "dtype"])
def test_other_values_are_copied(other: str) -> None:
    def graph() -> fx.GraphModule:
        build, cache, new, position = cache_graph()
        if other == "appended":
            long = build.call(UPDATE, cache, new, None)
            updated = build.call(aten.slice.Tensor, long, 2, 2, 8, 1)
        elif other == "dtype":
            updated = build.call(
                aten.add.Tensor, cache, build.call(aten.to.dtype, cache, torch.float64, False, False, None)
            )
        else:
            updated = build.call(UPDATE, build.call(aten.neg.default, cache), new, position)
        write_back(build, cache, updated)
        return build.done()

    behaves(graph, values(), in_place=False)


# ------------------------------------------------------------------------------------------ fresh buffers


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("returned", [False, True])
def test_a_cache_that_the_graph_allocates_is_written_in_place(returned: bool, scatter: bool) -> None:
    def graph() -> fx.GraphModule:
        build, _, new, position = cache_graph()
        zeros = build.call(aten.zeros.default, [1, 2, 6, 4])
        if scatter:
            updated = build.call(aten.slice_scatter.default, zeros, new, 2, 1, 3, 1)
        else:
            updated = build.call(UPDATE, zeros, new, position)
        return build.done(updated if returned else build.call(aten.neg.default, updated))

    before, after = graph(), graph()
    assert update_fresh(after.graph) == 1 and not calls(after, UPDATE, aten.slice_scatter.default)
    after.graph.lint()
    after.recompile()
    for _ in range(2):
        assert torch.equal(after(*values())[0], before(*values())[0])


def test_buffers_that_somebody_else_reads_are_not() -> None:
    build, cache, new, position = cache_graph()
    zeros = build.call(aten.zeros.default, [1, 2, 6, 4])
    keys, vals = (build.call(UPDATE, zeros, new, position) for _ in range(2))
    of_input = build.call(UPDATE, cache, new, position)
    view = build.call(aten.permute.default, build.call(aten.neg.default, cache), [0, 1, 2, 3])
    of_view = build.call(UPDATE, view, new, position)
    appended = build.call(UPDATE, build.call(aten.neg.default, cache), new, None)
    gm = build.done(keys, vals, of_input, of_view, appended)
    assert update_fresh(gm.graph) == 0
