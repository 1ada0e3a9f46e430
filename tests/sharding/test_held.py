"""A cache with a rank's own heads is never read whole, whichever graph reads it: it is an error, or right."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from torch import fx

from graphopt import ops
from graphopt.errors import ShardError
from graphopt.passes.shard import HELD
from graphopt.runtime.held import MARKS, Held, Marks
from graphopt.runtime.ranks import Mesh, Ranked
from tests.graphs import Builder
from tests.sharding.drawing import shared
from tests.sharding.test_caches import (
    DIM,
    KV,
    NEW,
    PAST,
    Update,
    appended,
    block,
    copied,
    joined,
    rolled,
    updated,
)

aten = torch.ops.aten
MESH = Mesh("tp", 2, 0, "0", "gloo")


def held_of(gm: fx.GraphModule) -> Held:
    """What the first of two ranks' graphs does with caches; `x` is there to be read whole."""
    found = shared(gm, 2)[0].meta[HELD]
    assert isinstance(found, Held)
    return dataclasses.replace(found, whole=tuple((i, name) for i, name in found.whole if name != "x"))


def names(does: Held) -> list[str]:
    return [name for _, name in does.whole]


@pytest.mark.parametrize("update", [updated, copied, rolled])
def test_attention_reads_its_own_heads_and_the_cache_is_written_with_them(update: Update) -> None:
    does = held_of(block(update, True))
    assert does.whole == does.returned == does.passed == ()
    assert does.written == (1, 2)


@pytest.mark.parametrize("update", [appended, joined])
def test_caches_that_grow_are_returned_with_own_heads(update: Update) -> None:
    does = held_of(block(update, False))
    assert does == Held(returned=(1, 2))


def test_keys_that_no_cache_is_behind_hold_all_heads() -> None:
    assert held_of(block(None, False)) == Held()


def reader(kind: str) -> fx.GraphModule:
    """A graph that gets a cache, and reads it in one way; a linear beside it is shared."""
    build = Builder()
    x = build.input("x", 2, 6)
    cache = build.input("k_cache", 2, KV, PAST, DIM)
    up = build.call(ops.linear.overload, x, build.weight("up.weight", 8, 6), None)
    y = build.call(ops.linear.overload, up, build.weight("down.weight", 6, 8), None)
    recent = build.call(aten.slice.Tensor, cache, 2, 1, PAST, 1)
    if kind == "cut":
        return build.done(y, recent)
    if kind == "itself":
        return build.done(y, cache)
    if kind == "head":
        return build.done(y, build.call(aten.slice.Tensor, cache, 1, 0, 1, 1))
    if kind == "joined":
        return build.done(y, build.call(aten.cat.default, [cache, cache], 1))
    if kind == "moved":
        moved = build.call(aten.permute.default, recent, [0, 2, 1, 3])
        return build.done(y, build.call(aten.reshape.default, moved, [2, PAST - 1, KV * DIM]))
    assert kind == "scores"
    turned = build.call(aten.permute.default, cache, [0, 1, 3, 2])
    return build.done(y, build.call(aten.matmul.default, cache, turned))


@pytest.mark.parametrize("kind", ["head", "joined", "moved", "scores"])
def test_what_reads_more_than_own_heads_is_known(kind: str) -> None:
    does = held_of(reader(kind))
    assert names(does) == ["k_cache"]
    assert [i for i, _ in does.whole] == [1]


@pytest.mark.parametrize("kind", ["cut", "itself"])
def test_what_passes_a_cache_on_reads_nothing(kind: str) -> None:
    assert held_of(reader(kind)) == Held(passed=((1, 1),))


def test_an_input_without_heads_is_no_cache() -> None:
    build = Builder()
    row = build.input("row", 6)
    assert held_of(build.done(build.call(aten.add.Tensor, row, row))) == Held()


# --------------------------------------------------------------------------------------------- at run time


def ranked(does: Held, result: object = None) -> Ranked:
    """A program that all ranks agree in."""
    run = Ranked(lambda *args: result, MESH, "", does)
    run.agreed = True
    return run


def test_a_cache_that_one_graph_wrote_is_not_read_whole_by_another() -> None:
    cache = torch.zeros(2, KV, NEW, DIM)
    reads, writes = ranked(Held(whole=((0, "k_cache"),))), ranked(Held(written=(0,)))
    reads(cache)  # whatever it is, all of it is there
    writes(cache)
    for view in (cache, cache[:, :, 1:], cache.transpose(1, 2)):
        with pytest.raises(ShardError, match=r"'k_cache'.*this rank's heads alone.*graph break.*fullgraph"):
            reads(view)
    reads(cache.clone())  # whoever copies it knows
    writes(cache)


def test_outputs_are_marked_and_what_is_made_of_them_too() -> None:
    keys, cut, other = torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4)
    ranked(Held(returned=(1,)), (other, keys))()
    ranked(Held(passed=((0, 1), (1, 0))), (cut, other))(other, keys)
    assert [MARKS.has(x) for x in (keys, cut, other)] == [True, True, False]


def test_marks_end_with_the_memory() -> None:
    marks, last = Marks(), torch.zeros(2)
    for _ in range(1000):
        last = torch.zeros(2)
        assert not marks.has(last)  # even where an address is used again
        marks.add(last)
    gc.collect()
    assert marks.has(last) and len(marks) < 200


def test_what_is_no_tensor_is_not_marked() -> None:
    marks = Marks()
    marks.add(None)
    marks.add(3)
    assert len(marks) == 0 and not marks.has(None)
