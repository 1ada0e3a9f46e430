"""graphopt.tools.align: which node stands for which: by origin, by sequence, then by name."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.graph import Origin
from graphopt.tools.align import Sameness, align, reads, skeleton
from tests.sketch import Sketch

aten = torch.ops.aten


def chain(*calls: tuple[str, object], origin: Origin | None = None) -> dict[str, fx.Node]:
    """x -> the named calls one after the other; nodes by name. The last has the origin."""
    s = Sketch()
    x = s.input("x", 2, 3)
    for i, (name, target) in enumerate(calls):
        last = origin if i == len(calls) - 1 else None
        x = s.call(target, x, name=name, path="layer", source=f"{name}:1", origin=last)  # type: ignore[arg-type]
    s.done(x)
    return {n.name: n for n in s.graph.nodes}


SIN, EXP, ABS = ("sin", aten.sin.default), ("exp", aten.exp.default), ("abs", aten.abs.default)


def test_equal_graphs_are_paired_throughout() -> None:
    old, new = chain(SIN, EXP), chain(SIN, EXP)
    found = align(list(old.values()), list(new.values()))
    assert found.old_of == {new[name]: old[name] for name in old}
    assert not (found.rewrites or found.removed or found.added)
    same = Sameness(found)
    assert all(same.calls(old[name], new[name]) for name in old)


def test_nodes_in_one_graph_only_are_removed_or_added() -> None:
    old, new = chain(SIN, EXP), chain(SIN, ABS, EXP)
    found = align(list(old.values()), list(new.values()))
    assert found.removed == [] and [n.target for n in found.added] == [aten.abs.default]
    found = align(list(new.values()), list(old.values()))
    assert len(found.removed) == 1 and found.added == []


def test_a_rewrite_takes_what_it_replaced_and_what_died_of_it() -> None:
    old = chain(SIN, EXP, ABS)
    replaced = tuple(n.name for n in old.values() if n.target in (aten.exp.default, aten.abs.default))
    new = chain(("tanh", aten.tanh.default), origin=Origin("a_rule", "match-0", replaced))
    found = align(list(old.values()), list(new.values()))
    (rewrite,) = found.rewrites
    assert rewrite.rule == "a_rule" and [n.name for n in rewrite.added] == ["tanh"]
    # sin was read by replaced nodes only: it died of the rewrite, too.
    assert [n.target for n in rewrite.removed] == [aten.sin.default, aten.exp.default, aten.abs.default]
    assert not found.removed and not found.added


def test_a_call_with_another_literal_is_paired_but_not_the_same() -> None:
    def scaled(factor: float) -> list[fx.Node]:
        s = Sketch()
        x = s.input("x", 2)
        s.done(s.call(aten.mul.Tensor, x, factor, path="layer", source="m:1", name="mul"))
        return list(s.graph.nodes)

    old, new = scaled(2.0), scaled(3.0)
    found = align(old, new)
    assert found.old_of[new[1]] is old[1] and not Sameness(found).calls(old[1], new[1])
    assert "2.0" in skeleton(old[1]) and skeleton(old[0]) == "placeholder"


def test_reads_keep_order_and_repetition() -> None:
    s = Sketch()
    x, y = s.input("x", 2), s.input("y", 2)
    node = s.call(aten.cat.default, [y, x, y])
    assert reads(node) == [y, x, y]
