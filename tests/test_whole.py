"""The whole graph beside the original: what is wrong end to end only is caught, and the result is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from graphopt import backend, defaults
from graphopt import graph as g
from graphopt.accuracy import Verdict
from graphopt.capture import capture
from graphopt.errors import StrictError
from graphopt.lowering import direct
from graphopt.lowering.module import Lower
from graphopt.passes import spellings
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.merge import Merge
from graphopt.passes.recognise import Recognise
from graphopt.passes.speller import Speller
from graphopt.pipeline import Context
from graphopt.report import Report
from graphopt.verification import RIGHT, WRONG
from graphopt.verify import Budget
from graphopt.whole import Beside, judge_whole
from tests.block import Block, agree, block, example
from tests.planting import (
    calls,
    close,
    count_judged,
    found,
    other_activation,
    plant,
    plants_a_pass,
    subtracts,
)
from tests.verifying import ran, wrong_rule

aten = torch.ops.aten
FOREVER = float("inf")

pytestmark = pytest.mark.usefixtures("emptied", "own_certificates")


def plants_a_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    """+x becomes -x; no rule's pattern has it, so that none is made wrong, too."""
    assert aten.positive.default in spellings.SPELLINGS

    def wrong(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> fx.Node:
        return s.emit(aten.neg.default, args, {}, g.val(node), node)

    monkeypatch.setitem(spellings.SPELLINGS, aten.positive.default, wrong)


def plants_a_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(direct.SAME, aten.add.Tensor, torch.sub)


def spoils(step: type) -> Callable[[pytest.MonkeyPatch], None]:
    """A pass that does its work, and leaves a graph that is well formed and gives other numbers."""

    def plant_in(monkeypatch: pytest.MonkeyPatch) -> None:
        own = step.run  # type: ignore[attr-defined]  # a pass

        def run(self: object, gm: fx.GraphModule, ctx: Context) -> None:
            if step is Lower:  # behind it, calls have lowered names
                subtracts(gm.graph)
            own(self, gm, ctx)
            if step is not Lower:
                subtracts(gm.graph)
                gm.recompile()

        monkeypatch.setattr(step, "run", run)

    plant_in.__name__ = f"spoils_{step.__name__}"
    return plant_in


class Positive(Block):
    """A block, and an operator whose spelling can be spoilt."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.positive(super().forward(x))


def positive() -> Positive:
    return Positive().eval().requires_grad_(False)


FAULTS = (
    *(spoils(step) for step in (Canonicalize, Recognise, Merge, Lower)),
    *(plants_a_pass, plants_a_spelling, plants_a_lowering),
)
by_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)


# ------------------------------------------------------------------------------------------- what is caught


@by_fault
def test_what_no_rewrite_did_is_caught(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    model, x, y = positive(), example(), example() + 1
    fault(monkeypatch)
    off = ran(model, lambda c: c(x), verify="off")
    assert not close(off.results[0], model(x)), "a fault that shows"
    torch.compiler.reset()
    outcome = ran(model, lambda c: c(x), lambda c: c(y))
    for given, result in zip((x, y), outcome.results, strict=True):
        agree(result, model(given))  # type: ignore[arg-type]  # a tensor
    assert not outcome.found.taken_back and outcome.found.judged > 5, "each rewrite is right by itself"
    whole_graph = found(outcome)
    assert whole_graph.state == WRONG and whole_graph.where == "outputs[0]"
    assert whole_graph.error > whole_graph.limit > whole_graph.expected
    (warning,) = outcome.warnings
    assert warning.startswith("graphopt runs the original program: the graph as a whole gives other numbers")
    for part in (
        "rmse",
        "`graphopt bisect`",
        f"error {whole_graph.error:.3g}, expected {whole_graph.expected:.3g}",
    ):
        assert part in warning
    assert outcome.report.fallback is not None and outcome.report.fallback in warning


class Chunks(torch.nn.Module):
    """Siblings that are merged; the result of one is read by its memory, where lies another's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = torch.nn.Linear(20, 12), torch.nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        return q.as_strided((3, 4, 12), (24, 12, 1)).sum(1) + k[:3]


def test_a_merge_that_moves_what_is_read_by_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear's result became a slice of the merged one's: right, until its strides were not asked for."""

    def as_it_is(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> fx.Node:
        return s.emit(aten.as_strided.default, args, kwargs, g.val(node), node)

    model, x = Chunks().eval().requires_grad_(False), torch.randn(8, 20)
    agree(ran(model, lambda c: c(x), strict=True).results[0], model(x))  # type: ignore[arg-type]  # a tensor
    monkeypatch.setitem(spellings.SPELLINGS, aten.as_strided.default, as_it_is)
    torch.compiler.reset()
    outcome = ran(model, lambda c: c(x))
    agree(outcome.results[0], model(x))  # type: ignore[arg-type]  # a tensor
    assert found(outcome).state == WRONG and not outcome.found.taken_back
    assert any(m.rule == "merge_siblings" for m in outcome.report.matches)


@by_fault
def test_strict_raises_at_every_call(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fault(monkeypatch)
    options = {"verify": "first", "strict": True}
    compiled = torch.compile(positive(), backend="graphopt", options=options)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(StrictError, match="the graph as a whole gives other numbers"):
            compiled(example())


def test_what_is_right_is_said_to_be() -> None:
    outcome = ran(block(), lambda c: c(example()), strict=True)
    whole_graph = found(outcome)
    assert whole_graph.state == RIGHT and whole_graph.error <= whole_graph.limit and not outcome.warnings
    assert outcome.report.fallback is None
    assert "whole graph   right: outputs[0] has rmse" in str(outcome.report)


def test_a_rewrite_that_is_taken_back_leaves_a_right_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = wrong_rule("torch_silu", arguments=lambda node: {"x": node.args[0], "kind": "relu"})
    monkeypatch.setattr(defaults, "RULES", wrong)
    outcome = ran(block(), lambda c: c(example()))
    assert outcome.culprits == {"torch_silu"} and found(outcome).state == RIGHT and len(outcome.warnings) == 1


def test_always_judges_the_whole_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a later call shows; from then on the original runs, and nothing is judged any more."""

    def clamps(graph: fx.Graph) -> None:
        (value,) = g.output_node(graph).all_input_nodes
        with graph.inserting_after(value):
            new = graph.call_function(aten.clamp_max.default, (value, 100.0))
        new.meta = dict(value.meta)
        g.output_node(graph).replace_input_with(value, new)

    plant(monkeypatch, clamps)
    model, x = block(), example()
    torch.compiler.reset()
    verdicts = count_judged(monkeypatch)
    factors = (1.0, 2.0, 1e4, 1.0, 1e5)
    outcome = ran(model, *(lambda c, f=f: c(x * f) for f in factors), verify="always")
    for factor, result in zip(factors, outcome.results, strict=True):
        agree(result, model(x * factor))  # type: ignore[arg-type]  # a tensor
    assert [v.ok for v in verdicts] == [True, True, False] and len(outcome.warnings) == 1  # type: ignore[attr-defined]  # known to be there
    assert found(outcome).state == WRONG


def test_taking_back_what_a_fault_needs_lets_ours_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, other_activation)
    model, x = block(), example()
    kept: list[Report] = []

    def again(c: Callable[..., object]) -> object:
        (report,) = backend.reports()
        assert report.fallback is not None
        report.revert(next(m for m in report.matches if m.rule == "torch_silu"))
        kept.append(report)
        return c(x)

    backend.clear_reports()
    outcome = ran(model, lambda c: c(x), again)
    for result in outcome.results:
        agree(result, model(x))  # type: ignore[arg-type]  # a tensor
    assert kept[0].fallback is None and found(outcome).state == RIGHT and len(outcome.warnings) == 1


def test_a_capture_of_another_program_is_caught() -> None:
    captured = capture(lambda x: torch.tanh(x), torch.randn(3, 5))
    run = captured.gm.forward
    beside = Beside(captured, lambda x: (torch.sin(x),), run)
    verdict = judge_whole(beside, [torch.randn(3, 5)], Budget(), FOREVER)
    assert isinstance(verdict, Verdict) and not verdict.ok
    assert (verdict.reason or "").startswith("what was captured is another program: outputs[0]: rmse")
    right = judge_whole(Beside(captured, run, run), [torch.randn(3, 5)], Budget(), FOREVER)
    assert isinstance(right, Verdict) and right.ok


# --------------------------------------------------------------------------------------------- written inputs


def counts_up(cache: Tensor, x: Tensor) -> Tensor:
    """A cache that is written in place; what is returned does not show it all."""
    cache.add_(x)
    return torch.nn.functional.silu(x) + cache[0]


def test_inputs_are_written_once() -> None:
    cache, x = torch.zeros(3, 5), torch.randn(3, 5)
    outcome = ran(counts_up, lambda c: c(cache, x), lambda c: c(cache, x), strict=True)
    agree(cache, 2 * x)
    assert found(outcome).state == RIGHT


def test_inputs_that_are_written_wrongly_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs are right, the cache is not: the original runs, and writes it once."""

    def writes_another(graph: fx.Graph) -> None:
        (copy,) = calls(graph, "aten.copy_")
        x = next(n for n in g.placeholders(graph) if n is not copy.args[0])
        copy.args = (copy.args[0], x)

    plant(monkeypatch, writes_another)
    x = torch.randn(3, 5)
    for options, right in (({"verify": "off"}, False), ({}, True)):
        torch.compiler.reset()
        cache, expected = torch.ones(3, 5), torch.ones(3, 5)
        outcome = ran(counts_up, lambda c, cache=cache: c(cache, x), **options)
        agree(outcome.results[0], counts_up(expected, x))  # type: ignore[arg-type]  # a tensor
        assert close(cache, expected) == right
    whole_graph = found(outcome)
    assert whole_graph.state == WRONG and whole_graph.where.startswith("written.")


def test_a_cache_keeps_its_layout() -> None:
    """A slice of a larger cache: the copy that is written has its strides, and no more is read than it."""
    large, x = torch.zeros(3, 9), torch.randn(3, 5)
    outcome = ran(counts_up, lambda c: c(large[:, 2:7], x), strict=True)
    agree(large[:, 2:7], x)
    assert not large[:, :2].any() and not large[:, 7:].any() and found(outcome).state == RIGHT


def test_inputs_that_share_memory_with_a_written_one_are_told() -> None:
    captured = capture(counts_up, torch.zeros(3, 5), torch.randn(3, 5))
    run, memory = captured.gm.forward, torch.zeros(4, 5)
    told = judge_whole(Beside(captured, run, run), [memory[1:], memory[:-1]], Budget(), FOREVER)
    assert isinstance(told, str) and told.endswith("which it writes, shares its memory with another input")
    assert not memory.any()
