"""Replay: what was missed at a node is not looked for again where one looks alike; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from graphopt import defaults, ops
from graphopt import graph as g
from graphopt.binding import Binding, Miss
from graphopt.match import match
from graphopt.passes.canonicalize import canonicalize
from graphopt.replay import Replay
from graphopt.rewrite import Rewriter
from graphopt.rule import T, Variant, rule, variants
from tests.rewriting import canonical


def block(x: Tensor, w: Tensor, scale: float = 2.0) -> Tensor:
    """A norm, a gate and a residual: some rules match, most do not."""
    h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return x + (torch.nn.functional.silu(w * h) * h).tanh() / scale


def stacked(layers: int) -> fx.GraphModule:
    def model(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(layers):
            x = block(x, w)
        return x

    return canonical(model, torch.randn(3, 8), torch.randn(8))


def recognised(gm: fx.GraphModule) -> Rewriter:
    rewriter = Rewriter(gm, defaults.RULES, canonicalize)
    rewriter.run()
    return rewriter


def test_a_further_identical_layer_costs_its_matches_only() -> None:
    tried = {n: recognised(stacked(n)).replay.tried for n in (2, 4, 8)}
    calls = {n: len([c for c in stacked(n).graph.nodes if c.op == "call_function"]) for n in (2, 8)}
    assert tried[8] - tried[4] == 2 * (tried[4] - tried[2])  # linear
    per_layer = (tried[8] - tried[2]) / 6
    assert per_layer < (calls[8] - calls[2]) / 6  # fewer attempts than a layer has calls


def test_the_graph_is_the_same_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = stacked(4), stacked(4)
    with_replay = recognised(first).replay.tried
    monkeypatch.setattr(Replay, "match", without)
    assert recognised(second).replay.tried > 2 * with_replay
    assert g.fingerprint(first.graph) == g.fingerprint(second.graph)


def without(self: Replay, variant: Variant, node: fx.Node) -> Binding | Miss:
    self.tried += 1
    return match(variant, node)


def _only(gm: fx.GraphModule, target: object) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is target]


@pytest.mark.parametrize(
    ("program", "alike"),
    [
        (lambda x, y: (x.tanh() * y, y.tanh() * x), True),
        (lambda x, y: (x.tanh() * 2.0, y.tanh() * 3.0), False),
        (lambda x, y: (x.tanh() * y, x.sigmoid() * y), False),
        (lambda x, y: (x.tanh() * y, x[:1].tanh() * y[:1]), False),
        (lambda x, y: (x * y, x.double() * y), False),
    ],
)
def test_what_looks_alike(program: Callable[..., object], alike: bool) -> None:
    gm = canonical(program, torch.randn(2, 3), torch.randn(2, 3))
    one, two = _only(gm, torch.ops.aten.mul.Tensor)
    assert (Replay().look(one) == Replay().look(two)) is alike


def test_a_guard_is_asked_every_time() -> None:
    asked: list[object] = []

    def guard(binding: Binding) -> str | None:
        asked.append(binding["x"])
        return "not here" if len(asked) == 1 else None

    hand = rule(lambda x: torch.tanh(x), lambda x: ops.activation(x, "tanh"), guard=guard, x=T("..."))
    gm = canonical(lambda x, y: (x.tanh(), y.tanh()), torch.randn(2, 3), torch.randn(2, 3))
    replay, (variant,) = Replay(), variants(hand, [torch.float32], canonicalize)
    one, two = _only(gm, torch.ops.aten.tanh.default)
    assert isinstance(replay.match(variant, one), Miss) and isinstance(replay.match(variant, two), Binding)
    assert len(asked) == 2
