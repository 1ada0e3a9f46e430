"""graphopt.tools.diff: rewrites by name, edits by line, identical layers once, else nothing."""

import io
import json

import pytest
import torch
from rich.console import Console
from torch import fx

from graphopt import ops
from graphopt.graph import Origin
from graphopt.tools.diff import diff
from graphopt.tools.snapshots import snapshot
from tests.sketch import Sketch

aten = torch.ops.aten


def norms(
    layers: int,
    *,
    fused: bool | int = False,
    eps: float = 1e-6,
    cast: bool = False,
    names: str = "",
    odd: int | None = None,
) -> fx.GraphModule:
    """x -> norm -> linear a layer; `fused` norms (an int: that layer's) carry the spelled ones' names."""
    s = Sketch()
    x = s.input("x", 2, 7, 12)
    for i in range(layers):
        w, m = s.weight(f"layers.{i}.norm.weight", 12), s.weight(f"layers.{i}.mlp.weight", 12, 12)
        path = f"layers.{i}.norm"
        if fused is True or (fused is not False and fused == i):
            replaced = tuple(f"{n}{names}_{i}" for n in ("mean", "add", "rsqrt", "mul", "out"))
            origin = Origin(
                "spelled_norm",
                f"match-{i}",
                replaced,
            )
            h = s.call(ops.rms_norm.overload, x, w, eps, path=path, origin=origin, name=f"rms{names}_{i}")
        else:
            square = s.call(
                aten.pow.Tensor_Scalar, x, 2, path=path, name=f"pow{names}_{i}"
            )  # in no origin: left dead
            mean = s.call(aten.mean.dim, square, [-1], True, path=path, name=f"mean{names}_{i}")
            add = s.call(
                aten.add.Tensor, mean, eps * (10 if i == odd else 1), path=path, name=f"add{names}_{i}"
            )
            root = s.call(aten.rsqrt.default, add, path=path, name=f"rsqrt{names}_{i}")
            scaled = s.call(aten.mul.Tensor, x, root, path=path, name=f"mul{names}_{i}")
            h = s.call(aten.mul.Tensor, scaled, w, path=path, name=f"out{names}_{i}")
        if cast:
            h = s.call(aten.to.dtype, h, torch.float32, path=path, name=f"to{names}_{i}")
        x = s.call(aten.linear.default, h, m, path=f"layers.{i}.mlp", name=f"linear{names}_{i}")
    return s.done(x)


def test_a_graph_does_not_differ_from_itself_or_its_copy() -> None:
    gm = norms(3)
    for other in (gm, snapshot(gm), norms(3), norms(3, names="_other")):
        found = diff(gm, other)
        assert not found.changed
        assert str(found) == f"no difference: {len(gm.graph.nodes)} nodes"


def test_a_rewrite_shows_what_it_took_and_made() -> None:
    found = diff(norms(1), norms(1, fused=True))
    (hunk,) = found.hunks
    assert (hunk.rule, hunk.places, hunk.matches) == ("spelled_norm", ("layers.0.norm",), ("match-0",))
    assert [text.split(" = ")[0] for text in hunk.removed] == [
        "%pow_0",
        "%mean_0",
        "%add_0",
        "%rsqrt_0",
        "%mul_0",
        "%out_0",
    ]
    assert [text.split("  ")[0] for text in hunk.added] == [
        "%rms_0 = rms_norm(%x, w:layers.0.norm.weight, 1e-06)"
    ]
    assert hunk.changed == ()
    lines = str(found).splitlines()
    assert lines[0] == "@@ layers.0.norm  spelled_norm: 6 nodes -> 1"
    assert [line[0] for line in lines[1:8]] == ["-"] * 6 + ["+"]
    assert lines[-1] == "11 -> 6 nodes: 6 removed, 1 added, 0 changed; 1 rewrite by 1 rule"


def test_identical_layers_are_shown_once() -> None:
    found = diff(norms(32), norms(32, fused=True))
    (hunk,) = found.hunks
    assert (
        hunk.places[0] == "layers.0.norm" and hunk.places[-1] == "layers.31.norm" and len(hunk.matches) == 32
    )
    assert str(found).startswith("@@ layers.0.norm .. layers.31.norm  x 32  spelled_norm: 6 nodes -> 1\n")
    assert "192 removed, 32 added" in found.summary()


def test_a_layer_that_differs_is_shown_apart() -> None:
    a = norms(5, odd=3)
    found = diff(a, norms(5, fused=True))
    assert [h.places for h in found.hunks] == [
        ("layers.0.norm", "layers.1.norm", "layers.2.norm", "layers.4.norm"),
        ("layers.3.norm",),
    ]


def test_only_the_rewritten_layer_is_shown() -> None:
    (hunk,) = diff(norms(5), norms(5, fused=2)).hunks
    assert hunk.places == ("layers.2.norm",)


def test_rewrites_that_both_graphs_have_are_no_difference() -> None:
    assert not diff(norms(3, fused=True), norms(3, fused=True)).changed
    (hunk,) = diff(norms(3, fused=1), norms(3, fused=True)).hunks
    assert hunk.places == ("layers.0.norm", "layers.2.norm")


def test_what_an_earlier_rewrite_left_over_is_an_edit() -> None:
    """Both graphs have the rewrite; only the first still has one of the nodes that it stands for."""

    def model(left_over: bool) -> fx.GraphModule:
        s = Sketch()
        x = s.input("x", 3)
        outputs = [s.call(aten.neg.default, x, name="old")] if left_over else []
        origin = Origin("rule", "match-1", ("old",))
        return s.done(s.call(aten.abs.default, x, origin=origin, name="new"), *outputs)

    (hunk,) = diff(model(True), model(False)).hunks
    assert (hunk.rule, len(hunk.removed), hunk.added, len(hunk.changed)) == ("", 1, (), 1)  # and the outputs


def test_a_changed_literal_is_one_changed_line() -> None:
    (hunk,) = diff(norms(4), norms(4, eps=1e-5)).hunks
    assert (len(hunk.places), hunk.rule, hunk.removed, hunk.added) == (4, "", (), ())
    ((old, new),) = hunk.changed
    assert old.startswith("%add_0 = aten.add.Tensor(%mean_0, 1e-06)")
    assert new.startswith("%add_0 = aten.add.Tensor(%mean_0, 1e-05)")
    assert str(hunk).splitlines()[1].startswith("~ %add_0") and "was %add_0" in str(hunk)


def test_a_removed_cast_does_not_change_its_readers() -> None:
    (hunk,) = diff(norms(3, cast=True), norms(3)).hunks
    assert (
        [t.split(" = ")[0] for t in hunk.removed] == ["%to_0"]
        and hunk.changed == ()
        and len(hunk.places) == 3
    )
    (hunk,) = diff(norms(3), norms(3, cast=True)).hunks
    assert [t.split(" = ")[0] for t in hunk.added] == ["%to_0"] and hunk.changed == ()


def test_a_rewired_input_is_seen() -> None:
    def model(swapped: bool) -> fx.GraphModule:
        s = Sketch()
        x, y = s.input("x", 3), s.input("y", 3)
        return s.done(s.call(aten.sub.Tensor, *((y, x) if swapped else (x, y))))

    (hunk,) = diff(model(False), model(True)).hunks
    ((old, new),) = hunk.changed
    assert "(%x, %y)" in old and "(%y, %x)" in new


def test_another_weight_is_seen() -> None:
    def model(first: bool) -> fx.GraphModule:
        s = Sketch()
        x, a, b = s.input("x", 2, 3), s.weight("a.weight", 3, 3), s.weight("b.weight", 3, 3)
        return s.done(s.call(aten.linear.default, x, a if first else b), s.call(aten.linear.default, x, b))

    (hunk,) = diff(model(True), model(False)).hunks
    ((old, new),) = hunk.changed
    assert "w:a.weight" in old and "w:b.weight" in new


def test_other_shapes_and_outputs_are_seen() -> None:
    def model(rows: int, twice: bool = False) -> fx.GraphModule:
        s = Sketch()
        y = s.call(aten.neg.default, s.input("x", rows, 3))
        return s.done(*([y, y] if twice else [y]))

    assert len([c for h in diff(model(2), model(5)).hunks for c in h.changed]) == 2
    (hunk,) = diff(model(2), model(2, twice=True)).hunks
    assert hunk.changed == (("return (%neg_default,)", "return (%neg_default, %neg_default)"),)


SPELLED = ("mean_0", "add_0", "rsqrt_0", "mul_0", "out_0")


@pytest.mark.parametrize("replaced", [("rms_0",), (*SPELLED, "rms_0")])
def test_a_rewrite_of_a_rewrite_keeps_its_rules_name(replaced: tuple[str, ...]) -> None:
    """The first graph never saw `rms_0`, which the second rule replaced; its own old nodes may be named."""
    a = norms(1)
    s = Sketch()
    x, w, m = (
        s.input("x", 2, 7, 12),
        s.weight("layers.0.norm.weight", 12),
        s.weight("layers.0.mlp.weight", 12, 12),
    )
    origin = Origin("absorb", "match-9", replaced)
    h = s.call(ops.rms_norm.overload, x, w, 1e-6, 1.0, path="layers.0.norm", origin=origin)
    found = diff(a, s.done(s.call(aten.linear.default, h, m, path="layers.0.mlp", name="linear_0")))
    assert [(h.rule, len(h.removed), len(h.added)) for h in found.hunks if h.rule] == [
        ("absorb", 6 if SPELLED[0] in replaced else 0, 1)
    ]
    assert "6 removed, 1 added" in found.summary()


def test_anything_with_a_graph_and_nothing_else() -> None:
    class Holder:
        gm = norms(1)

    assert not diff(Holder(), norms(1)).changed
    with pytest.raises(TypeError, match=r"int holds no graph; give an fx\.GraphModule"):
        diff(norms(1), 3)  # type: ignore[arg-type]


def test_json_and_colours() -> None:
    found = diff(norms(2), norms(2, fused=True))
    told = json.loads(found.to_json())
    assert told["changed"] is True and told["before"] == 20 and told["hunks"][0]["rule"] == "spelled_norm"
    assert len(told["hunks"][0]["places"]) == 2
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=200).print(found)
    assert "\x1b[31m- %pow_0" in out.getvalue() and "\x1b[32m+ %rms_0" in out.getvalue()
