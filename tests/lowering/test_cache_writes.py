"""The writes of a layer's caches become one call, the lengths' advance another; everything else stays."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.lowering.cache_writes import advance_lengths, group_cache_writes
from tests.graphs import Builder, calls

aten = torch.ops.aten
ROPE, NORM = ops.rope.overload, ops.rms_norm.overload
ROPE_WRITE, CACHE_WRITE = ops.rope_write.overload, ops.cache_write.overload
WRITE, ADD, ADVANCE = aten.index_copy_.default, aten.add_.Tensor, aten._foreach_add_.Scalar
B, H, HK, S, D, L = 2, 4, 2, 3, 6, 8
INT = torch.int64


def effect(gm: fx.GraphModule) -> list[torch.Tensor]:
    """What a graph returns, and what it leaves in its inputs: random, a length of 2, positions from 2 on."""
    torch.manual_seed(0)
    inputs: list[object] = []
    for node in g.placeholders(gm.graph):
        if not g.is_tensor(node):
            inputs.append(S)
        elif g.dtype(node).is_floating_point:
            shape = [s if isinstance(s, int) else S for s in g.shape(node)]
            inputs.append(torch.randn(shape).to(g.dtype(node)))
        else:
            inputs.append((torch.arange(2, 2 + S) if g.rank(node) else torch.tensor(2)).to(g.dtype(node)))
    returned = gm(*inputs)
    return [x.clone() for x in (*returned, *inputs) if isinstance(x, torch.Tensor)]


def same(gm: fx.GraphModule, edit: Callable[[fx.Graph], int], count: int) -> fx.GraphModule:
    """Run an edit: it changes that many things, all at once, and no result."""
    before = effect(gm)
    assert edit(gm.graph) == count
    gm.graph.lint()
    gm.recompile()
    for one, two in zip(effect(gm), before, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert edit(gm.graph) == 0
    return gm


class Layer(Builder):
    """Draws what is before and between the writes of one layer."""

    def heads(self, name: str, heads: int, *, made: bool = True, norm: fx.Node | None = None) -> fx.Node:
        """[B, heads, S, D], a view of what a linear or a norm makes; or of an input."""
        x = self.input(name, B, S, heads, D)
        if made:
            x = self.call(aten.neg.default, x)
        if norm is not None:
            x = self.call(NORM, x, norm, 1e-6, 0.0, True)
        return self.call(aten.permute.default, x, [0, 2, 1, 3])

    def counted(self, length: fx.Node, steps: fx.Node | None = None) -> fx.Node:
        """The rows of the new tokens, from a length on."""
        return self.call(aten.add.Tensor, steps or self.call(aten.arange.default, S), length)

    def rotated(self, q: fx.Node, k: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Both after a rope."""
        cos, sin = self.input("cos", 1, S, D), self.input("sin", 1, S, D)
        both = self.call(ROPE, q, k, cos, sin, D, False, path="attn")
        return self.call(operator.getitem, both, 0), self.call(operator.getitem, both, 1)

    def write(self, name: str, position: fx.Node, new: fx.Node, path: str = "attn") -> fx.Node:
        """Rows of the cache of that name are overwritten."""
        return self.call(WRITE, self.input(name, B, HK, L, D), -2, position, new, path=path)

    def read(self, *nodes: fx.Node) -> fx.GraphModule:
        """Something reads each of these, at the end."""
        return self.done(*(self.call(aten.neg.default, n) for n in nodes))


def rotated_layer(
    before: Callable[[Layer, fx.Node, fx.Node], object] = lambda build, q, k: None,
    between: Callable[[Layer, fx.Node], object] = lambda build, written: None,
    **norms: fx.Node,
) -> fx.GraphModule:
    """Keys and values are written, the keys after a rope; the rest of the layer reads q and both caches."""
    build = Layer()
    length = build.input("length", dtype=INT)
    q, k, v = build.heads("q", H), build.heads("k", HK), build.heads("v", HK)
    position = build.counted(length)
    q, k = build.rotated(q, k)
    before(build, q, k)
    keys = build.write("keys", position, k)
    between(build, keys)
    return build.read(q, keys, build.write("values", position, v))


# -------------------------------------------------------------------------------------------- what is grouped


def test_the_rotation_and_both_writes_become_one_call() -> None:
    gm = same(rotated_layer(), group_cache_writes, 1)
    (write,) = calls(gm, ROPE_WRITE)
    assert not calls(gm, ROPE, WRITE, aten.add.Tensor, aten.arange.default)
    assert g.arg(write, "position") is None and str(g.arg(write, "start")) == "length"
    assert g.module_path(write) == "attn"


@pytest.mark.parametrize("swapped", [False, True], ids=["keys first", "values first"])
def test_either_may_be_written_first(swapped: bool) -> None:
    build = Layer()
    position = build.input("position", S, dtype=INT)
    v = build.heads("v", HK)
    q, k = build.rotated(build.heads("q", H), build.heads("k", HK))
    order = [("keys", k), ("values", v)]
    written = [build.write(name, position, new) for name, new in (order[::-1] if swapped else order)]
    (write,) = calls(same(build.read(q, *written), group_cache_writes, 1), ROPE_WRITE)
    assert str(g.arg(write, "k_cache")) == "keys" and str(g.arg(write, "position")) == "position"


@pytest.mark.parametrize("after", [False, True], ids=["norm, permute", "permute, norm"])
def test_norms_of_q_and_k_go_with_the_rotation(after: bool) -> None:
    build = Layer()
    position, weights = build.input("position", S, dtype=INT), [build.weight(n, D) for n in ("wq", "wk")]
    q, k = (
        build.heads(name, n, norm=None if after else w)
        for name, n, w in zip(("q", "k"), (H, HK), weights, strict=True)
    )
    if after:
        q, k = (build.call(NORM, x, w, 1e-6, 0.0, True) for x, w in zip((q, k), weights, strict=True))
    v = build.heads("v", HK)
    q, k = build.rotated(q, k)
    gm = build.read(q, build.write("keys", position, k), build.write("values", position, v))
    (write,) = calls(same(gm, group_cache_writes, 1), ROPE_WRITE)
    assert not calls(gm, NORM) and g.arg(write, "q_norm") is weights[0] and g.arg(write, "eps") == 1e-6


def test_writes_without_a_rotation_become_one_call() -> None:
    build = Layer()
    position = build.counted(build.input("length", dtype=torch.int32))
    k, v = build.heads("k", HK), build.heads("v", HK)
    gm = same(
        build.read(build.write("keys", position, k), build.write("values", position, v)),
        group_cache_writes,
        1,
    )
    (write,) = calls(gm, CACHE_WRITE)
    assert str(g.arg(write, "start")) == "length"


def test_rows_that_were_cast_for_index_copy_are_read_as_they_are() -> None:
    build = Layer()
    position = build.input("position", S, dtype=torch.int32)
    new = [build.heads("k", HK), build.heads("v", HK)]
    casts = [build.call(aten.to.dtype, position, INT, False, False, None) for _ in new]
    written = [build.write(n, p, x) for n, p, x in zip(("keys", "values"), casts, new, strict=True)]
    gm = same(build.read(*written), group_cache_writes, 1)
    assert not calls(gm, aten.to.dtype) and g.arg(*calls(gm, CACHE_WRITE), "position") is position


def test_each_layer_has_a_call_of_its_own() -> None:
    build = Layer()
    position = build.input("position", S, dtype=INT)
    written = []
    for layer in range(3):
        new = [build.heads(f"{name}{layer}", HK) for name in "kv"]
        written += [
            build.write(f"c{layer}{i}", position, x, path=f"layers.{layer}") for i, x in enumerate(new)
        ]
    gm = same(build.read(*written), group_cache_writes, 3)
    assert [g.module_path(n) for n in calls(gm, CACHE_WRITE)] == [f"layers.{i}" for i in range(3)]


def test_caches_that_the_graph_makes_itself_are_written_too() -> None:
    build = Layer()
    position = build.input("position", S, dtype=INT)
    new = [build.heads("k", HK), build.heads("v", HK)]
    fresh = [build.call(aten.zeros.default, [B, HK, L, D]) for _ in new]
    written = [build.call(WRITE, c, -2, position, x) for c, x in zip(fresh, new, strict=True)]
    same(build.done(*written), group_cache_writes, 1)


def test_symbolic_lengths() -> None:
    build = Layer()
    size = build.size("s", S)
    position = build.call(
        aten.add.Tensor, build.call(aten.arange.default, size), build.input("length", dtype=INT)
    )
    new = [build.call(aten.neg.default, build.input(name, B, HK, size, D)) for name in "kv"]
    written = [build.write(name, position, x) for name, x in zip(("keys", "values"), new, strict=True)]
    gm = same(build.read(*written), group_cache_writes, 1)
    assert str(g.arg(*calls(gm, CACHE_WRITE), "start")) == "length"


# ------------------------------------------------------------------------------------------------- what stays


def neg(build: Layer, node: fx.Node) -> fx.Node:
    return build.call(aten.neg.default, node)


def test_a_rotation_stays_where_something_else_reads_the_keys() -> None:
    build = Layer()
    position, v = build.input("position", S, dtype=INT), build.heads("v", HK)
    q, k = build.rotated(build.heads("q", H), build.heads("k", HK))
    gm = build.read(q, k, build.write("keys", position, k), build.write("values", position, v))
    same(gm, group_cache_writes, 1)
    assert len(calls(gm, ROPE)) == len(calls(gm, CACHE_WRITE)) == 1


def test_a_rotation_stays_where_its_query_is_read_before_the_writes() -> None:
    gm = same(rotated_layer(before=lambda build, q, k: neg(build, q)), group_cache_writes, 1)
    assert len(calls(gm, ROPE)) == 1
    gm = same(rotated_layer(before=lambda build, q, k: None), group_cache_writes, 1)
    assert not calls(gm, ROPE)


def test_writes_stay_where_something_between_reads_the_new_cache() -> None:
    def between(build: Layer, written: fx.Node) -> None:
        build.call(aten.mul_.Tensor, build.input("other", B, HK, L, D), written)

    gm = same(rotated_layer(between=between), group_cache_writes, 0)
    assert len(calls(gm, WRITE)) == 2 and len(calls(gm, ROPE)) == 1


def test_writes_stay_where_something_between_reads_a_view_of_the_cache() -> None:
    def between(build: Layer, written: fx.Node) -> None:
        keys = next(n for n in build.graph.nodes if n.name == "keys")
        view = build.call(aten.select.int, keys, 0, 0)
        build.call(aten.mul_.Tensor, build.input("other", HK, L, D), view)

    same(rotated_layer(between=between), group_cache_writes, 0)


def test_writes_stay_where_something_between_writes_what_they_read() -> None:
    build = Layer()
    position, k = build.input("position", S, dtype=INT), build.heads("k", HK, made=False)
    v = build.heads("v", HK)
    keys = build.write("keys", position, k)
    build.call(aten.mul_.Tensor, next(n for n in build.graph.nodes if n.name == "k"), 2.0)
    same(build.read(keys, build.write("values", position, v)), group_cache_writes, 0)


@pytest.mark.parametrize("what", ["rows", "attention", "shape", "memory", "rank"])
def test_writes_that_are_not_of_one_layer_stay(what: str) -> None:
    build = Layer()
    rows = build.input("position", S, dtype=INT)
    k, v = build.heads("k", HK), build.heads("v", HK)
    if what == "memory":
        cache = build.input("keys", 2 * B, HK, L, D)
        halves = [build.call(aten.slice.Tensor, cache, 0, i * B, (i + 1) * B, 1) for i in range(2)]
        written = [
            build.call(WRITE, c, -2, rows, x, path="attn") for c, x in zip(halves, (k, v), strict=True)
        ]
    elif what == "rank":
        flat = [build.call(aten.reshape.default, x, [B * HK, S, D]) for x in (k, v)]
        written = [
            build.call(WRITE, build.input(f"c{i}", B * HK, L, D), -2, rows, x, path="attn")
            for i, x in enumerate(flat)
        ]
    else:
        other = build.input("other", S, dtype=INT) if what == "rows" else rows
        wide = build.heads("w", H) if what == "shape" else v
        cache = build.input("values", B, H if what == "shape" else HK, L, D)
        written = [build.write("keys", rows, k), build.call(WRITE, cache, -2, other, wide, path="attn")]
    if what == "attention":  # of one module, as keys of two layers may be
        q = build.heads("q", H)
        written = [build.call(ops.attention.overload, q, cache, cache, 0.3) for cache in written]
    gm = same(build.read(*written), group_cache_writes, 0)
    assert len(calls(gm, WRITE)) == 2


def test_a_length_that_has_advanced_is_not_read_in_place_of_positions() -> None:
    def between(build: Layer, written: fx.Node) -> None:
        build.call(ADD, next(n for n in build.graph.nodes if n.name == "length"), 1)

    gm = rotated_layer(between=between)
    (write,) = calls(same(gm, group_cache_writes, 1), ROPE_WRITE)
    assert g.arg(write, "start") is None and g.is_call(g.arg(write, "position"), aten.add.Tensor)


@pytest.mark.parametrize("steps", ["from 1", "scaled", "float"])
def test_positions_that_do_not_count_from_the_length_are_read(steps: str) -> None:
    build = Layer()
    length, k, v = build.input("length", dtype=INT), build.heads("k", HK), build.heads("v", HK)
    if steps == "from 1":
        position = build.counted(length, build.call(aten.arange.start, 1, S + 1))
    elif steps == "scaled":
        position = build.call(aten.add.Tensor, build.call(aten.arange.default, S), length, alpha=2)
    else:
        position = build.call(
            aten.add.Tensor, build.call(aten.arange.default, S), build.input("shift", S, dtype=INT)
        )
        position = build.call(aten.clamp.default, position, 0, L - 1)
        k, v = (build.call(aten.mul.Tensor, x, 0.0) for x in (k, v))  # rows repeat
    gm = build.read(build.write("keys", position, k), build.write("values", position, v))
    (write,) = calls(same(gm, group_cache_writes, 1), CACHE_WRITE)
    assert g.arg(write, "position") is position and g.arg(write, "start") is None


@pytest.mark.parametrize("difference", ["one only", "eps", "read", "no weight", "an input"])
def test_norms_that_are_not_alike_or_not_for_the_rotation_alone_stay(difference: str) -> None:
    build = Layer()
    position, weight = build.input("position", S, dtype=INT), build.weight("w", D)
    q, k = build.heads("q", H, made=difference != "an input"), build.heads("k", HK)
    q = build.call(NORM, q, None if difference == "no weight" else weight, 1e-6, 0.0, True)
    if difference != "one only":
        k = build.call(NORM, k, weight, 0.5 if difference == "eps" else 1e-6, 0.0, True)
    also = [q] if difference == "read" else []
    v = build.heads("v", HK)
    q, k = build.rotated(q, k)
    gm = build.read(q, *also, build.write("keys", position, k), build.write("values", position, v))
    (write,) = calls(same(gm, group_cache_writes, 1), ROPE_WRITE)
    assert g.arg(write, "q_norm") is None and calls(gm, NORM)


def test_a_graph_without_caches_is_left_alone() -> None:
    build = Layer()
    gm = build.read(build.input("x", 2, 3))
    before = g.fingerprint(gm.graph)
    same(gm, group_cache_writes, 0)
    same(gm, advance_lengths, 0)
    assert g.fingerprint(gm.graph) == before


# ---------------------------------------------------------------------------------------------------- lengths


def test_lengths_advance_in_one_call_at_the_end() -> None:
    build = Builder()
    lengths = [build.input(f"t{i}", dtype=INT) for i in range(3)]
    reads = [build.call(aten.neg.default, t) for t in lengths]
    later = build.call(aten.add.Tensor, lengths[0], 4)
    for t in lengths[1:]:
        build.call(ADD, t, 4)
    last = build.call(aten.neg.default, lengths[0])
    build.call(aten.copy_.default, lengths[0], later, False)
    gm = same(build.done(*reads, last), advance_lengths, 3)
    (advance,) = calls(gm, ADVANCE)
    assert advance.args[1] == 4 and advance.next.op == "output" and not calls(gm, ADD, aten.copy_.default)
    assert set(advance.args[0]) == set(lengths)  # type: ignore[arg-type]  # a list


def test_different_steps_and_dtypes_are_different_calls() -> None:
    build = Builder()
    for i, (dtype, step) in enumerate(((INT, 1), (INT, 2), (torch.int32, 1), (INT, 1))):
        build.call(ADD, build.input(f"t{i}", dtype=dtype), step)
    gm = same(build.done(build.input("x", 2)), advance_lengths, 4)
    assert [len(n.args[0]) for n in calls(gm, ADVANCE)] == [2, 1, 1]  # type: ignore[arg-type]  # lists


def test_a_symbolic_step() -> None:
    build = Builder()
    size = build.size("s", S)
    for i in range(2):
        build.call(ADD, build.input(f"t{i}", dtype=INT), size)
    gm = same(build.done(build.input("x", 2)), advance_lengths, 2)
    assert calls(gm, ADVANCE)[0].args[1] is size


@pytest.mark.parametrize(
    "why", ["result read", "read later", "returned", "float", "a vector", "a tensor", "a weight"]
)
def test_lengths_that_stay(why: str) -> None:
    build = Builder()
    x = build.input("x", 2, dtype=INT)
    shape = (3,) if why == "a vector" else ()
    t = (
        build.weight("w")
        if why == "a weight"
        else build.input("t", *shape, dtype=torch.float32 if why == "float" else INT)
    )
    new = build.call(ADD, t, build.input("k", dtype=INT) if why == "a tensor" else 1)
    outputs = [x]
    if why == "result read":
        outputs.append(build.call(aten.neg.default, new))
    if why == "read later":
        outputs.append(build.call(aten.add.Tensor, x, t))
    if why == "returned":
        outputs.append(t)
    gm = same(build.done(*outputs), advance_lengths, 0)
    assert len(calls(gm, ADD)) == 1


def test_a_length_that_is_set_is_not_advanced() -> None:
    build = Builder()
    t, other = build.input("t", dtype=INT), build.input("u", dtype=INT)
    build.call(aten.copy_.default, t, build.call(aten.add.Tensor, other, 1), False)
    build.call(aten.copy_.default, other, build.call(aten.neg.default, t), False)
    same(build.done(build.input("x", 2)), advance_lengths, 0)
