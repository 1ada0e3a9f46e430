"""Faults that no single rewrite shows, and what was found of a whole graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx

from graphopt import defaults, whole
from graphopt import graph as g
from graphopt.pipeline import Context
from graphopt.verification import Whole
from graphopt.whole import judge_whole
from tests.block import agree
from tests.verifying import Ran

aten = torch.ops.aten


@dataclass(frozen=True)
class Planted:
    """A pass that edits without an id, so that nothing of it is written down: before Lower."""

    edit: Callable[[fx.Graph], None]

    name: ClassVar[str] = "planted"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})
    exactness: ClassVar[str] = "bitwise"  # which is not true

    def run(self, gm: fx.GraphModule, ctx: Context) -> None:
        self.edit(gm.graph)
        gm.recompile()


def plant(monkeypatch: pytest.MonkeyPatch, edit: Callable[[fx.Graph], None]) -> None:
    """Put a pass before the lowering."""
    monkeypatch.setattr(defaults, "PIPELINE", (*defaults.PIPELINE[:-1], Planted(edit), defaults.PIPELINE[-1]))


def calls(graph: fx.Graph, name: str) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and g.op_name(n) == name]


def subtracts(graph: fx.Graph) -> None:
    """The last sum becomes a difference."""
    node = calls(graph, "aten.add")[-1]
    node.target = aten.sub.Tensor


def other_activation(graph: fx.Graph) -> None:
    """What a rule has made of silu becomes gelu."""
    for node in graph.nodes:
        if "silu" in node.args:
            node.args = tuple("gelu" if a == "silu" else a for a in node.args)


def plants_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, subtracts)


def found(outcome: Ran) -> Whole:
    """What became of the last graph as a whole."""
    whole_graph = outcome.found.whole
    assert whole_graph is not None
    return whole_graph


def close(ours: object, eager: Tensor) -> bool:
    try:
        agree(ours, eager)  # type: ignore[arg-type]  # a tensor
    except AssertionError:
        return False
    return True


def count_judged(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The verdicts on whole graphs from now on."""
    verdicts: list[object] = []

    def judged(*args: object) -> object:
        verdicts.append(judge_whole(*args))  # type: ignore[arg-type]  # what it is given
        return verdicts[-1]

    monkeypatch.setattr(whole, "judge_whole", judged)
    return verdicts
