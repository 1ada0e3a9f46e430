"""Caches keep the caller's shape: a rank writes its own heads, in place, and zeros stand for the others'."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.lowering.module import Lower
from graphopt.pipeline import Context
from graphopt.sharding.lockstep import lockstep
from tests.graphs import Builder, calls
from tests.sharding.drawing import Refusals, check, gathers, reductions, shared, values
from tests.tolerances import close

aten = torch.ops.aten
Update = Callable[[Builder, fx.Node, fx.Node], fx.Node]
HEADS, KV, DIM, PAST, NEW = 4, 2, 3, 6, 2


def appended(build: Builder, cache: fx.Node, new: fx.Node) -> fx.Node:
    return build.call(ops.cache_update.overload, cache, new, None)


def joined(build: Builder, cache: fx.Node, new: fx.Node) -> fx.Node:
    return build.call(aten.cat.default, [cache, new], -2)


def updated(build: Builder, cache: fx.Node, new: fx.Node) -> fx.Node:
    return build.call(ops.cache_update.overload, cache, new, rows(build))


def copied(build: Builder, cache: fx.Node, new: fx.Node) -> fx.Node:
    return build.call(aten.index_copy.default, cache, 2, rows(build), new)


def rolled(build: Builder, cache: fx.Node, new: fx.Node) -> fx.Node:
    moved = build.call(aten.roll.default, cache, [-NEW], [-2])
    return build.call(aten.index_put.default, moved, [None, None, rows(build)], new)


def rows(build: Builder) -> fx.Node:
    return build.call(aten.arange.start, 3, 3 + NEW)


def block(update: Update | None, write_back: bool) -> fx.GraphModule:
    """Attention on a cache: its result, and the caches as outputs or written back."""
    build = Builder()
    x = build.input("x", 2, NEW, 6)
    old = [build.input(n, 2, KV, PAST, DIM) for n in ("k_cache", "v_cache")]

    def projected(name: str, heads: int) -> fx.Node:
        y = build.call(ops.linear.overload, x, build.weight(f"attn.{name}.weight", heads * DIM, 6), None)
        split = build.call(aten.reshape.default, y, [2, NEW, heads, DIM])
        return build.call(aten.permute.default, split, [0, 2, 1, 3])

    q, *new = projected("q", HEADS), projected("k", KV), projected("v", KV)
    kept = [update(build, c, n) for c, n in zip(old, new, strict=True)] if update else new
    out = build.call(ops.attention.overload, q, *kept, 0.3)
    laid = build.call(aten.permute.default, out, [0, 2, 1, 3])
    flat = build.call(aten.reshape.default, laid, [2, NEW, HEADS * DIM])
    y = build.call(ops.linear.overload, flat, build.weight("attn.o.weight", 6, HEADS * DIM), None)
    if not write_back:
        return build.done(y, *kept)
    for cache, value in zip(old, kept, strict=True):
        build.call(aten.copy_.default, cache, value)
    return build.done(y)


def run_all(
    gm: fx.GraphModule, ranks: list[fx.GraphModule]
) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """(result, caches) of the whole graph and of each rank, caches zero but for what was written."""
    gm.recompile()

    def args() -> list[torch.Tensor]:
        names = [n.name for n in g.placeholders(gm.graph)]
        return [torch.zeros_like(v) if "cache" in n else v for n, v in zip(names, values(gm), strict=True)]

    given, all_given = args(), [args() for _ in ranks]
    want = list(gm(*given))
    found = [list(o) for o in lockstep(ranks, all_given)]  # type: ignore[call-overload]  # tuples
    written = [i for i, n in enumerate(g.placeholders(gm.graph)) if "cache" in n.name]
    if len(want) == 1:
        want += [given[i] for i in written]
        for outputs, mine in zip(found, all_given, strict=True):
            outputs += [mine[i] for i in written]
    return want, found


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("update", "write_back"),
    [(appended, False), (joined, False), (updated, True), (copied, True), (rolled, True)],
)
def test_each_rank_has_its_heads_of_the_cache(update: Update, write_back: bool, world: int) -> None:
    gm = block(update, write_back)
    ranks = shared(gm, world)
    assert [reductions(rank) for rank in ranks] == [1] * world
    want, found = run_all(gm, ranks)
    for rank, (y, *caches) in enumerate(found):
        close(y, want[0], torch.float32)
        head = rank * KV // world
        for cache, whole in zip(caches, want[1:], strict=True):
            assert cache.shape == whole.shape
            close(cache[:, head], whole[:, head], torch.float32)
            others = [h for h in range(KV) if h != head]
            assert not cache[:, others].any()


@pytest.mark.parametrize("world", [2, 4])
def test_keys_that_no_cache_is_behind_are_returned_whole(world: int) -> None:
    """They may begin a cache, or be a result that anything reads; attention is shared nevertheless."""
    for rank in check(block(None, False), world):
        assert (reductions(rank), gathers(rank)) == (1, 2)


def test_what_is_cut_out_of_a_concatenation_with_a_cache_goes_on_as_one() -> None:
    def window(build: Builder, cache: fx.Node, new: fx.Node) -> fx.Node:
        cut = build.call(aten.slice.Tensor, cache, 2, 1, PAST, 1)
        return build.call(aten.cat.default, [cut, new], 2)

    for rank in shared(block(window, False), 2):
        assert gathers(rank) == 0


@pytest.mark.parametrize("update", [updated, copied])
def test_a_cache_is_still_written_in_place(update: Update) -> None:
    gm = block(update, True)
    rank = shared(gm, 2)[1]
    Lower().run(rank, Context())
    inputs = [n for n in g.placeholders(rank.graph) if "cache" in n.name]
    writes = calls(rank, torch.Tensor.index_copy_)
    assert [n.args[0] for n in writes] == inputs
    assert not calls(rank, torch.Tensor.copy_)


def test_keys_that_something_else_needs_whole_are_not_shared() -> None:
    """A result is not taken for a cache: what no attention reads is returned whole."""
    build, heard = Builder(), Refusals()
    x = build.input("x", 2, NEW, 6)
    y = build.call(ops.linear.overload, x, build.weight("k.weight", KV * DIM, 6), None)
    split = build.call(aten.reshape.default, y, [2, NEW, KV, DIM])
    gm = build.done(build.call(aten.permute.default, split, [0, 2, 1, 3]))
    want, found = run_all(gm, shared(gm, 2, heard))
    for (keys,) in found:
        close(keys, want[0], torch.float32)
    assert list(heard.reasons.values()) == ["left whole: it is returned"]


@pytest.mark.parametrize("update", [updated, copied, rolled])
def test_a_cache_that_no_attention_of_the_graph_reads_is_written_whole(update: Update) -> None:
    """Its reader is behind a graph break, and may be in no graph at all."""
    build = Builder()
    x, cache = build.input("x", 2, NEW, 6), build.input("k_cache", 2, KV, PAST, DIM)
    y = build.call(ops.linear.overload, x, build.weight("k.weight", KV * DIM, 6), None)
    split = build.call(aten.reshape.default, y, [2, NEW, KV, DIM])
    keys = build.call(aten.permute.default, split, [0, 2, 1, 3])
    build.call(aten.copy_.default, cache, update(build, cache, keys))
    gm = build.done(build.call(aten.relu.default, x))
    gm.recompile()
    names = [n.name for n in g.placeholders(gm.graph)]
    at = names.index("k_cache")
    whole = values(gm)
    gm(*whole)
    mine = [[v.clone() for v in values(gm)] for _ in range(2)]
    lockstep(shared(gm, 2), mine)
    for args in mine:
        close(args[at], whole[at], torch.float32)
