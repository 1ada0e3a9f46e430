"""graphopt.listing: one readable line a node, and identical layers once."""

import operator

import pytest
import torch
from torch import fx

from graphopt import ops
from graphopt.graph import Origin
from graphopt.listing import call, describe, line, listing, literal, repeated_blocks
from tests.sketch import Sketch

aten = torch.ops.aten


def layers(
    count: int, *, odd: int | None = None, skip: int | None = None, loose: bool = False
) -> fx.GraphModule:
    """norm -> linear -> add, `count` times; layer `odd` has another eps, layer `skip` reads the embedding."""
    s = Sketch()
    x = embedding = s.input("embedding", 2, 7, 12)
    for i in range(count):
        s.weight(f"layers.{i}.norm.weight", 12)
        s.weight(f"layers.{i}.mlp.weight", 12, 12)
    weights = iter([n for n in s.graph.nodes][1:])
    for i in range(count):
        path = "" if loose else f"layers.{i}"
        read = embedding if i == skip else x
        eps = 1e-5 if i == odd else 1e-6
        h = s.call(ops.rms_norm.overload, read, next(weights), eps, path=f"{path}.norm".strip("."))
        y = s.call(aten.linear.default, h, next(weights), path=f"{path}.mlp".strip("."))
        x = s.call(aten.add.Tensor, x, y, path=path)
    return s.done(x)


def test_a_line_says_call_type_place_rule_and_source() -> None:
    s = Sketch()
    x, w = (
        s.input("x", 2, 7, 48, dtype=torch.bfloat16),
        s.weight("model.norm.weight", 48, tied=("copy.weight",)),
    )
    made_by = Origin("llama_rms_norm", "m1", ("mul",))
    y = s.call(
        ops.rms_norm.overload,
        x,
        w,
        1e-06,
        path="model.norm",
        source="/a/b/model.py:60 return w * h",
        origin=made_by,
    )
    lines = listing(s.done(y).graph).splitlines()
    assert lines[0].split("#")[0].rstrip() == "%0 x = input"
    assert lines[0].endswith("# [2,7,48] bf16")
    assert lines[1].split("  #")[0].rstrip() == "w:model.norm.weight = weight tied to copy.weight"
    assert (
        lines[2].split("  #")[0].rstrip() == "%2 rms_norm_default = rms_norm(%0, w:model.norm.weight, 1e-06)"
    )
    assert lines[2].endswith("# [2,7,48] f32  model.norm  llama_rms_norm  model.py:60")
    assert lines[3] == "return (%2,)"


def test_defaults_are_left_out_and_others_are_named() -> None:
    s = Sketch()
    q = s.input("q", 1, 2, 3, 4)
    plain = s.call(aten.softmax.int, q, -1, None)
    half = s.call(aten.softmax.int, q, -1, torch.float16)
    ours = s.call(ops.attention.overload, q, q, q, 0.5, True)
    made = s.call(aten.new_ones.default, q, [], dtype=torch.bool, device=torch.device("cpu"))
    assert call(plain) == "aten.softmax.int(%q, -1)"
    assert call(half) == "aten.softmax.int(%q, -1, dtype=f16)"
    assert call(ours) == "attention(%q, %q, %q, 0.5, causal=True)"
    assert call(made) == "aten.new_ones(%q, [], dtype=bool, device='cpu')"


def test_another_type_is_not_the_default() -> None:
    s = Sketch()
    x = s.input("x", 3)
    assert call(s.call(aten.add.Tensor, x, x, alpha=1)) == "aten.add.Tensor(%x, %x)"
    assert call(s.call(aten.add.Tensor, x, x, alpha=1.0)) == "aten.add.Tensor(%x, %x, alpha=1.0)"


def test_false_is_not_taken_for_a_default_zero() -> None:
    s = Sketch()
    x = s.input("x", 3)
    node = s.call(ops.rms_norm.overload, x, None, 1e-6, 0.0, False)
    assert call(node) == "rms_norm(%x, None, 1e-06, cast_before_scale=False)"


def test_symbolic_sizes_and_tuples() -> None:
    from graphopt.torch_private import symbolic_int

    s = Sketch()
    size = symbolic_int(s.mode, "s", 5)
    x = s.input("x", size, 4)
    n = s.call(aten.sym_size.int, x, 0)
    m = s.call(operator.add, n, 1)
    both = s.call(aten.topk.default, x, 2)
    assert describe(x.meta["val"]) == f"[{size},4] f32"
    assert call(m) == "add(%sym_size_int, 1)"
    assert line(m).endswith(f"# {size} + 1")
    assert describe(both.meta["val"]) == f"([{size},2] f32, [{size},2] i64)"
    assert literal({"a": [x, None]}) == "{'a': [%x, None]}"


def test_unfolded_listing_has_every_node() -> None:
    gm = layers(5)
    assert len(listing(gm.graph).splitlines()) == len(gm.graph.nodes)


def test_layers_are_printed_once() -> None:
    text = listing(layers(32).graph, fold_layers=True)
    assert "x 32: layers.0 .. layers.31" in text
    assert text.count("rms_norm(") == 1
    assert "layers.31.mlp.weight" not in text.replace(".. layers.31", "")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_layers(count: int) -> None:
    blocks = repeated_blocks(list(layers(count).graph.nodes))
    assert [b.times for b in blocks] == ([] if count == 1 else [count, count])  # the weights, the calls


def test_an_odd_layer_is_printed() -> None:
    text = listing(layers(9, odd=4).graph, fold_layers=True)
    assert "1e-05" in text
    assert text.count("rms_norm(") == 3  # 4 before, the odd one, 4 after
    assert "x 4: layers.0" in text and "x 4: layers.5" in text


def test_a_layer_wired_otherwise_is_printed() -> None:
    straight = [(b.period, b.times) for b in repeated_blocks(list(layers(9).graph.nodes))]
    wired = [(b.period, b.times) for b in repeated_blocks(list(layers(9, skip=6).graph.nodes))]
    assert straight == [(2, 9), (3, 9)]
    assert (3, 9) not in wired and (3, 6) in wired


def test_layers_without_module_paths_are_told_by_their_weights() -> None:
    text = listing(layers(9, loose=True).graph, fold_layers=True)
    assert text.count("rms_norm(") == 1 and text.count("x 9: layers.0 .. layers.8") == 2


def test_folding_a_long_chain_takes_no_quadratic_time() -> None:
    s = Sketch()
    x = s.input("x", 3)
    for _ in range(1500):
        x = s.call(aten.neg.default, x)
    assert repeated_blocks(list(s.done(x).graph.nodes)) == ()


def test_equal_calls_that_are_no_layers_stay() -> None:
    """A chain of equal calls at one place is not folded: nothing moves."""
    s = Sketch()
    x = s.input("x", 3)
    for _ in range(6):
        x = s.call(aten.neg.default, x, path="model")
    gm = s.done(x)
    assert listing(gm.graph, fold_layers=True) == listing(gm.graph)


def test_caches_are_folded_with_their_layers() -> None:
    s = Sketch()
    caches = [s.input(f"cache_{i}", 1, 2, 8, 4) for i in range(5)]
    new, at = s.input("new", 1, 2, 1, 4), s.input("at", 1, dtype=torch.int64)
    for i, cache in enumerate(caches):
        update = s.call(ops.cache_update.overload, cache, new, at, path=f"layers.{i}.attn")
        new = s.call(aten.slice.Tensor, update, -2, 0, 1, path=f"layers.{i}.attn")
    blocks = repeated_blocks(list(s.done(new).graph.nodes))
    assert [(b.period, b.times) for b in blocks] == [(1, 5), (2, 5)]
    assert (blocks[0].first, blocks[0].last) == ("cache_0", "cache_4")
    assert (blocks[1].first, blocks[1].last) == ("layers.0", "layers.4")
