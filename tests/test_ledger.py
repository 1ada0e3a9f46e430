"""The ledger: what rewrites of any pass took away and made can be run apart, on the program's inputs."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor

from graphopt import defaults
from graphopt.capture import Captured, capture
from graphopt.certificates import Certificates, key_of
from graphopt.ledger import Ledger
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.fuse import Fuse
from graphopt.passes.merge import Merge
from graphopt.passes.recognise import Recognise
from graphopt.pipeline import Pipeline
from graphopt.values import Values
from graphopt.verify import Budget, verify
from tests.block import block, example

ROAD = Pipeline((Canonicalize(), Recognise(), Merge(), Fuse()))


class Norms(torch.nn.Module):
    """Two blocks, each behind a norm: something to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(20, eps=1e-5) for _ in range(2))
        self.blocks = torch.nn.ModuleList(block(i) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, inner in zip(self.norms, self.blocks, strict=True):
            x = x + inner(norm(x))
        return x


@pytest.fixture(scope="module")
def road() -> tuple[Captured, Ledger, list[object]]:
    """A program after recognition, merging and fusion, its ledger, and values of its placeholders."""
    model, x, ledger = Norms().eval(), example(), Ledger()
    captured = capture(model, x)
    done, _ = ROAD.run(captured, dataclasses.replace(defaults.context(), ledger=ledger))
    return done, ledger, list(captured.bind((x,), {}))


def test_each_match_is_written_down_once(road: tuple[Captured, Ledger, list[object]]) -> None:
    _, ledger, _ = road
    rules = Counter(r.match.rule for r in ledger.rewrites)
    assert rules["torch_sdpa"] == 2 and rules["merge_siblings"] == 4 and len(rules) > 6
    assert all(r.before and r.leaves() for r in ledger.rewrites)


def test_rewrites_of_all_passes_are_judged_identical_layers_once(
    road: tuple[Captured, Ledger, list[object]],
) -> None:
    """Merging and fusing too: rewrites of rewrites, whose inputs are the captured program's values."""
    _, ledger, inputs = road
    keys = {key_of(r) for r in ledger.rewrites}
    assert len(keys) < len(ledger.rewrites), "two layers"
    found = verify(ledger, inputs, Certificates())
    assert not found.failed and not found.left
    assert found.passed.keys() == keys and sum(found.passed.values()) == len(ledger.rewrites)
    every = verify(ledger, inputs, Certificates(), every=True)
    assert every.passed == found.passed


def test_values_are_those_of_the_program_and_let_go(road: tuple[Captured, Ledger, list[object]]) -> None:
    _, ledger, inputs = road
    wanted = [r.leaves() for r in ledger.rewrites]
    values = Values(ledger, inputs, wanted)
    most = 0
    for leaves in wanted:
        found = values.take(leaves)
        assert all(not isinstance(x, Tensor) or bool(x.isfinite().all()) for x in found)
        most = max(most, values.held)
    assert values.held == 0 < most and not values._known


def test_inputs_are_not_written() -> None:
    """A cache that the program writes: it is what it was after verification."""

    def model(x: Tensor, cache: Tensor) -> Tensor:
        cache.add_(x)
        return torch.nn.functional.silu(cache) * x

    ledger, x, cache = Ledger(), torch.randn(3, 5), torch.randn(3, 5)
    before = cache.clone()
    captured = capture(model, x, cache)
    context = dataclasses.replace(defaults.context(), ledger=ledger)
    Pipeline((Canonicalize(), Recognise())).run(captured, context)
    found = verify(ledger, captured.bind((x, cache), {}), Certificates(), Budget())
    assert found.passed and not found.failed and torch.equal(cache, before)
