"""The pipeline: contracts checked before anything runs, every step runnable, a broken pass named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx

import graphopt
from graphopt import Canonicalize, Lower, Merge, Pipeline, Recognise, defaults
from graphopt.errors import CaptureRefused, PipelineError, StrictError
from graphopt.observe import Matched, PassEnded, PassStarted, Warned
from graphopt.pipeline import Context, passes_named
from tests.block import MERGED, agree, block, example
from tests.listening import Listener
from tests.models import zoo
from tests.tolerances import close

NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Step:
    """A pass that does what a test says."""

    edit: Callable[[fx.GraphModule], object] = lambda gm: None
    name: str = "step"
    requires: frozenset[str] = NONE
    provides: frozenset[str] = NONE
    conflicts: frozenset[str] = NONE
    exactness: str = "bitwise"

    def run(self, gm: fx.GraphModule, ctx: Context) -> None:
        self.edit(gm)


# ---------------------------------------------------------------------------------------------- contracts


def test_a_need_that_no_earlier_pass_meets_is_refused_when_made() -> None:
    with pytest.raises(PipelineError, match=r"pass 1 \(merge\) needs recognised, .* provide canonical"):
        Pipeline((Canonicalize(), Merge()))
    with pytest.raises(PipelineError, match=r"pass 0 \(recognise\) needs canonical, .* provide nothing"):
        Pipeline((Recognise(), Canonicalize()))


def test_a_conflict_is_refused_when_made() -> None:
    passes = (Canonicalize(), Recognise(), Lower(), Merge())
    with pytest.raises(
        PipelineError, match=r"pass 3 \(merge\) cannot run after a pass that provides lowered"
    ):
        Pipeline(passes)


def test_exactness_is_the_weakest_promise_and_refused_by_name() -> None:
    rounding = Step(name="round_weights", exactness="lossy")
    assert Pipeline(()).exactness == "bitwise"
    assert Pipeline((Canonicalize(), Recognise(), Merge())).exactness == "reordered"
    assert Pipeline((Canonicalize(), rounding)).exactness == "lossy"
    Pipeline((Canonicalize(), Recognise(), Merge())).require("reordered")
    with pytest.raises(PipelineError, match="pass round_weights is lossy, but the result has to be reord"):
        Pipeline((Canonicalize(), rounding)).require("reordered")
    with pytest.raises(PipelineError, match="exactness 'exact' is not one of bitwise, reordered, lossy"):
        Pipeline(()).require("exact")


def test_passes_are_frozen_values_that_print() -> None:
    for step in defaults.PIPELINE:
        assert dataclasses.is_dataclass(step) and type(step)() == step and hash(step) == hash(type(step)())
        assert repr(step).startswith(f"{type(step).__name__}(")
        for field in dataclasses.fields(step):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(step, field.name, None)
        for kept in ("requires", "provides", "conflicts"):
            assert isinstance(getattr(step, kept), frozenset)
    assert Merge(max_rows=9) != Merge() and repr(Merge(max_rows=9)) == "Merge(max_rows=9)"
    assert hash(Pipeline(defaults.PIPELINE)) == hash(defaults.pipeline())
    assert passes_named(defaults.PIPELINE) == ("canonicalize", "recognise", "merge", "lower")


# ------------------------------------------------------------------------------------------------ running


def test_the_documented_call_gives_a_program_and_a_report() -> None:
    model, x = block(), example()
    captured = graphopt.capture(model, x)
    before = str(captured.gm.graph)
    program, report = Pipeline((Canonicalize(), Recognise(), Merge(), Lower())).run(captured)
    agree(program(x), model(x))
    assert str(captured.gm.graph) == before, "the captured program was edited"
    agree(captured(x), model(x))
    assert report.counts["attention"] == 1 and report.counts["linear"] == 7
    assert [p.name for p in report.passes] == ["canonicalize", "recognise", "merge", "lower"]
    assert all(p.changed and p.seconds > 0 for p in report.passes) and not report.warnings
    model.k.weight.mul_(2)
    agree(program(x), model(x))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_every_step_is_a_runnable_program(name: str) -> None:
    model, case = zoo.model(name), zoo.Case(padding="left")
    given = {**zoo.inputs(model, case), **({} if name == "bert" else {"use_cache": False})}
    with torch.no_grad():
        captured = graphopt.capture(model, **given)
        eager = model(**given).logits[given["attention_mask"].bool()]
        for upto in range(len(defaults.PIPELINE) + 1):
            program, _ = Pipeline(defaults.PIPELINE[:upto]).run(captured)
            logits = program(**given).logits[given["attention_mask"].bool()]
            close(logits, eager, torch.float32)


def test_the_same_captured_program_may_be_run_again() -> None:
    model, x = block(), example()
    captured = graphopt.capture(model, x)
    first, _ = defaults.pipeline().run(captured)
    second, _ = defaults.pipeline().run(captured)
    assert str(first.gm.graph) == str(second.gm.graph)
    agree(second(x), first(x))


def test_the_context_is_the_default_one_unless_given() -> None:
    captured = graphopt.capture(block(), example())
    _, report = Pipeline((Canonicalize(), Recognise())).run(captured)
    assert report.matches
    _, report = Pipeline((Canonicalize(), Recognise())).run(captured, Context())
    assert not report.matches, "an empty context has no rules"


def test_fuel_and_deny_limit_what_is_rewritten_and_leave_the_context_alone() -> None:
    captured, x = graphopt.capture(model := block(), example()), example()
    ctx = dataclasses.replace(defaults.context(), fuel=2)
    program, report = defaults.pipeline().run(captured, ctx)
    assert len(report.matches) == 2 and ctx.fuel == 2 and ctx.observers == ()
    agree(program(x), model(x))
    _, whole = defaults.pipeline().run(captured)
    denied = whole.matches[0].id
    _, report = defaults.pipeline().run(
        captured, dataclasses.replace(defaults.context(), deny=frozenset({denied}))
    )
    assert denied not in {m.id for m in report.matches}


def test_the_store_of_the_context_holds_what_is_prepared() -> None:
    model, x = block(), example()
    ctx = defaults.context()
    program, report = defaults.pipeline().run(graphopt.capture(model, x), ctx)
    program(x), program(x)
    assert ctx.store.prepared == len(ctx.store) == MERGED == report.weights_prepared
    assert ctx.store.bytes == report.weights_prepared_bytes == 4 * 20 * (3 * 20 + 2 * 33)


def test_observers_see_each_pass_with_its_graph() -> None:
    listener = Listener()
    ctx = defaults.context(observers=(listener,))
    defaults.pipeline().run(graphopt.capture(block(), example()), ctx)
    names = [e.name for e in listener.events if isinstance(e, PassStarted)]
    ended = [e.name for e in listener.events if isinstance(e, PassEnded)]
    assert names == ended == ["canonicalize", "recognise", "merge", "lower"]
    assert any(isinstance(e, Matched) for e in listener.events)


def test_a_pass_that_changes_nothing_is_reported_so() -> None:
    _, report = Pipeline((Canonicalize(), Step())).run(graphopt.capture(block(), example()))
    assert [p.changed for p in report.passes] == [True, False]


# ------------------------------------------------------------------------------------------ broken passes


def _first_call(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.op == "call_function")


def _raise(gm: fx.GraphModule) -> None:
    raise KeyError("w")


def _use_before_definition(gm: fx.GraphModule) -> None:
    first = _first_call(gm)
    last = next(n for n in reversed(gm.graph.nodes) if n.op == "call_function")
    first.args = (last, *first.args[1:])


def _drop_an_input(gm: fx.GraphModule) -> None:
    x = next(n for n in gm.graph.nodes if n.op == "placeholder")
    x.replace_all_uses_with(_first_call(gm), propagate_meta=False)
    gm.graph.erase_node(x)


def _drop_an_output(gm: fx.GraphModule) -> None:
    next(n for n in gm.graph.nodes if n.op == "output").args = ((),)


def _missing_constant(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_before(_first_call(gm)):
        gm.graph.get_attr("nowhere")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_raise, "pass bad failed: KeyError: 'w'"),
        (_use_before_definition, "pass bad left a broken graph: .* before it has been defined"),
        (_drop_an_output, "pass bad left a broken graph: 0 outputs instead of 1"),
        (_missing_constant, "pass bad left a broken graph: .*nowhere"),
    ],
)
def test_a_broken_pass_is_named(edit: Callable[[fx.GraphModule], None], message: str) -> None:
    captured = graphopt.capture(block(), example())
    with pytest.raises(PipelineError, match=message):
        Pipeline((Canonicalize(), Step(edit, "bad"))).run(captured)
    defaults.pipeline().run(captured)  # the captured program is as it was


def test_a_pass_that_drops_an_input_is_named() -> None:
    captured = graphopt.capture(lambda x, y: torch.relu(y), example(), example())
    with pytest.raises(PipelineError, match="pass bad left a broken graph: 1 inputs instead of 2"):
        Pipeline((Canonicalize(), Step(_drop_an_input, "bad"))).run(captured)


def test_a_refusal_on_the_road_stays_a_refusal() -> None:
    def refuse(gm: fx.GraphModule) -> None:
        raise CaptureRefused("it is too strange")

    with pytest.raises(CaptureRefused, match="too strange"):
        Pipeline((Step(refuse),)).run(graphopt.capture(block(), example()))


# ---------------------------------------------------------------------------------------- nothing matched


def products(x: torch.Tensor) -> torch.Tensor:
    """Heavy work that is no op of the vocabulary."""
    return torch.einsum("abc,acd->abd", x, x.mT)


def pointwise(x: torch.Tensor) -> torch.Tensor:
    """A fragment as graph breaks leave them: nothing to recognise."""
    return torch.softmax(x, -1).sin() * 2 + x.cos() * x.exp() - x.tanh()


def test_heavy_work_without_a_match_warns_and_raises_under_strict() -> None:
    listener = Listener()
    captured = graphopt.capture(products, example())
    program, report = defaults.pipeline().run(captured, defaults.context(observers=(listener,)))
    (warning,) = report.warnings
    assert "recognise matched nothing, though of the graph's FLOPs 100% in aten.matmul" in warning
    assert [e.message for e in listener.events if isinstance(e, Warned)] == [warning]
    agree(program(example()), products(example()))
    with pytest.raises(StrictError, match="recognise matched nothing"):
        defaults.pipeline().run(captured, dataclasses.replace(defaults.context(), strict=True))


def test_a_small_fragment_does_not_warn() -> None:
    strict = dataclasses.replace(defaults.context(), strict=True)
    _, report = defaults.pipeline().run(graphopt.capture(pointwise, example()), strict)
    assert not report.matches and not report.warnings


def test_a_pass_of_ones_own_fits_in() -> None:
    @dataclass(frozen=True)
    class Negate:
        """y -> -(-y) at the output."""

        name: ClassVar[str] = "negate"
        requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
        provides: ClassVar[frozenset[str]] = NONE
        conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})
        exactness: ClassVar[str] = "bitwise"

        def run(self, gm: fx.GraphModule, ctx: Context) -> None:
            output = next(n for n in gm.graph.nodes if n.op == "output")
            (y,) = output.all_input_nodes
            with gm.graph.inserting_before(output):
                once = gm.graph.call_function(torch.ops.aten.neg.default, (y,))
                twice = gm.graph.call_function(torch.ops.aten.neg.default, (once,))
                once.meta, twice.meta = dict(y.meta), dict(y.meta)
            output.replace_input_with(y, twice)
            gm.recompile()

    model, x = block(), example()
    program, report = Pipeline((Canonicalize(), Negate(), Recognise(), Merge(), Lower())).run(
        graphopt.capture(model, x)
    )
    agree(program(x), model(x))
    assert report.counts["aten.neg"] == 2
