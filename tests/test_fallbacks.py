"""Nothing goes wrong silently: what fails gives way to the original with one warning, or raises."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from graphopt import backend, defaults
from graphopt.errors import StrictError
from graphopt.observe import Event, Warned
from graphopt.passes.merge import Merge
from graphopt.passes.recognise import Recognise
from graphopt.pipeline import Context
from graphopt.rule import T, rule
from tests.block import agree, block, example
from tests.calling import called, compiled

pytestmark = pytest.mark.usefixtures("fresh")


@dataclass(frozen=True)
class BadMerge(Merge):
    """In the place of the pass of that name; `how` names what it does instead."""

    how: str = "raise"

    def run(self, gm: fx.GraphModule, ctx: Context) -> None:
        calls = [n for n in gm.graph.nodes if n.op == "call_function"]
        if self.how == "raise":
            raise KeyError("w")
        if self.how == "broken":
            calls[0].args = (calls[-1], *calls[0].args[1:])
        if self.how == "no output":
            next(n for n in gm.graph.nodes if n.op == "output").args = ((),)
        if self.how == "recursion":
            self.run(gm, ctx)
        if self.how == "fails when run":
            with gm.graph.inserting_before(calls[0]):
                gm.graph.call_function(torch._assert, (False, "broken at run time"))
            gm.recompile()


BROKEN = {
    "raise": "internal failure: pass merge failed: KeyError: 'w'",
    "broken": "internal failure: pass merge left a broken graph: ",
    "no output": "internal failure: pass merge left a broken graph: 0 outputs instead of 1",
    "recursion": "internal failure: pass merge failed: RecursionError: ",
}


def with_merge(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    passes = tuple(BadMerge(how=how) if p.name == "merge" else p for p in defaults.PIPELINE)
    monkeypatch.setattr(defaults, "PIPELINE", passes)


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_pass_gives_the_original_and_one_warning(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    with_merge(monkeypatch, how)
    model, x = block(), example()
    ours = compiled(model, strict=False)
    outcome = called(ours, x)
    assert torch.equal(outcome.value, model(x))
    (report,), (warning,) = outcome.reports, outcome.warnings
    assert report.fallback and report.fallback.startswith(BROKEN[how])
    assert warning == f"graphopt runs the original program: {report.fallback}"
    assert not called(ours, x).warnings, "once, not at each call"


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_pass_raises_under_strict(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    with_merge(monkeypatch, how)
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(block())(example())
    assert f"StrictError: {BROKEN[how]}" in str(caught.value)
    assert len(backend.reports()) == 1 and backend.reports()[0].fallback


def test_rules_that_undo_each_other_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, y)

    def swapped(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.mul(y, x)

    loop = rule(product, swapped, x=T("... n"), y=T("... n"))
    monkeypatch.setattr(defaults, "RULES", (loop,))
    model, x = block(), example()
    outcome = called(compiled(model, strict=False), x)
    assert torch.equal(outcome.value, model(x)) and len(outcome.warnings) == 1
    fallback = outcome.reports[0].fallback
    assert fallback and "pass recognise failed: RuntimeError: the rules still change the graph" in fallback


def test_a_program_that_fails_when_run_gives_way_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    with_merge(monkeypatch, "fails when run")
    model, x = block(), example()
    ours = compiled(model, strict=False)
    outcome = called(ours, x)
    assert torch.equal(outcome.value, model(x))
    (report,), (warning,) = outcome.reports, outcome.warnings
    assert report.fallback == "internal failure: AssertionError: broken at run time"
    assert warning == f"graphopt runs the original program: {report.fallback}"
    again = called(ours, x)
    assert torch.equal(again.value, model(x)) and not again.warnings


def test_a_program_that_fails_when_run_raises_under_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    with_merge(monkeypatch, "fails when run")
    with pytest.raises(StrictError, match="broken at run time"):
        compiled(block())(example())


def test_a_program_that_writes_its_inputs_is_not_run_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with_merge(monkeypatch, "fails when run")

    def count(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        total.add_(1)
        return x + total

    total = torch.zeros(())
    with pytest.raises(AssertionError, match="broken at run time"):
        compiled(count, strict=False)(example(), total)
    assert total <= 1


def test_the_programs_own_error_stays_its_own() -> None:
    model = nn.Embedding(5, 3)
    ours = compiled(lambda i: model(i) * 2)
    ours(torch.tensor([1, 2]))
    with pytest.raises(IndexError, match="out of range"):
        ours(torch.tensor([1, 7]))
    assert not backend.reports()[0].fallback
    agree(ours(torch.tensor([4, 0])), model(torch.tensor([4, 0])) * 2)


def test_a_recogniser_that_matches_nothing_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recognise, "run", lambda self, gm, ctx: None)
    model, x = block(), example()
    outcome = called(compiled(model, strict=False), x)
    agree(outcome.value, model(x))
    (warning,) = outcome.warnings
    assert warning.startswith("pass recognise matched nothing, though of the graph's FLOPs ")
    assert outcome.reports[0].warnings == (warning,) and not outcome.reports[0].fallback
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match="StrictError: pass recognise matched nothing"):
        compiled(model)(x)


def test_a_fragment_with_nothing_to_recognise_is_quiet() -> None:
    outcome = called(compiled(lambda x: (x.sin() * 2 + 1, x.softmax(-1))[0]), example())
    assert not outcome.warnings and not outcome.reports[0].warnings


def test_observers_hear_of_a_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Event] = []
    listener = SimpleNamespace(on_event=heard.append)
    monkeypatch.setattr(backend, "from_environment", lambda: (listener,))
    with_merge(monkeypatch, "raise")
    outcome = called(compiled(block(), strict=False), example())
    assert [e.message for e in heard if isinstance(e, Warned)] == outcome.warnings
