"""Each pass in turn raises, leaves a wrong graph, never ends: the user gets eager's result, one warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed

from graphopt import backend, defaults, pipeline
from graphopt import graph as g
from graphopt.lowering.module import Lower
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.merge import Merge
from graphopt.passes.quantize import Quantize
from graphopt.passes.recognise import Recognise
from graphopt.pipeline import Context
from graphopt.rule import T, rule
from tests.block import block, example

PASSES = (Canonicalize, Recognise, Merge, Quantize, Lower)
Edit = Callable[[fx.Graph], None]


pytestmark = pytest.mark.usefixtures("fresh")


def fails(graph: fx.Graph) -> None:
    raise KeyError("w")


def fails_an_assertion(graph: fx.Graph) -> None:
    raise AssertionError


def recurses(graph: fx.Graph) -> None:
    recurses(graph)


def reads_what_comes_later(graph: fx.Graph) -> None:
    calls = [n for n in graph.nodes if n.op == "call_function"]
    calls[0].args = (calls[-1], *calls[0].args[1:])


def reads_another_graph(graph: fx.Graph) -> None:
    g.output_node(graph).args = ((fx.Graph().placeholder("x"),),)


def drops_an_input(graph: fx.Graph) -> None:
    unread = graph.placeholder("unread")
    assert not unread.users


def drops_the_outputs(graph: fx.Graph) -> None:
    g.output_node(graph).args = ((),)


def gives_twice(graph: fx.Graph) -> None:
    out = g.output_node(graph)
    out.args = ((*out.args[0], *out.args[0]),)  # type: ignore[misc]  # a graph returns a tuple


EDITS: dict[Edit, str] = {
    fails: "failed: KeyError: 'w'",
    fails_an_assertion: "failed: AssertionError: ",
    recurses: "failed: RecursionError: ",
    reads_what_comes_later: "left a broken graph: ",
    reads_another_graph: "left a broken graph: ",
    drops_an_input: "left a broken graph: ",
    drops_the_outputs: "left a broken graph: 0 outputs instead of 1",
    gives_twice: "left a broken graph: 2 outputs instead of 1",
}


def called(strict: bool) -> tuple[Tensor, list[str]]:
    """The block in int8, so that every pass runs: its result, and what was warned about."""
    options = {"strict": strict, "quantize": "int8", "quantize_group": 4}
    ours = torch.compile(block(), backend="graphopt", options=options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = [ours(example()) for _ in range(2)]
    assert torch.equal(*values)
    return values[0], [str(w.message) for w in caught if str(w.message).startswith("graphopt")]


def assert_original_runs(reason: str) -> None:
    """Eager's result, one warning, and the reason in the report."""
    value, said = called(strict=False)
    assert torch.equal(value, block()(example()))
    (report,) = backend.reports()
    assert report.fallback and report.fallback.startswith(reason)
    assert said == [f"graphopt runs the original program: {report.fallback}"]


def test_nothing_is_wrong_with_the_passes_themselves() -> None:
    _, said = called(strict=True)
    assert not said and not backend.reports()[0].fallback


# In the place of each pass, and after it has done its work.
CASES = [
    pytest.param(step, edit, after, id=f"{step.name} {edit.__name__}{' after its work' if after else ''}")
    for step in PASSES
    for edit, after in (*((edit, False) for edit in EDITS), (fails, True), (gives_twice, True))
]


@pytest.mark.parametrize(("step", "edit", "half_way"), CASES)
def test_a_bad_pass(monkeypatch: pytest.MonkeyPatch, step: type, edit: Edit, half_way: bool) -> None:
    own = step.run

    def run(self: object, gm: fx.GraphModule, ctx: Context) -> None:
        if half_way:
            own(self, gm, ctx)
        edit(gm.graph)

    monkeypatch.setattr(step, "run", run)
    reason = f"internal failure: pass {step.name} {EDITS[edit]}"
    assert_original_runs(reason)
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed) as caught:
        called(strict=True)
    assert f"StrictError: {reason}" in str(caught.value)


def test_a_bad_pass_that_writes_into_what_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes have a copy: what runs in their place is the program that Dynamo recorded."""

    def run(self: object, gm: fx.GraphModule, ctx: Context) -> None:
        for node in list(gm.graph.nodes):
            if node.op == "call_function":
                node.target = torch.ops.aten.neg.default
        raise RuntimeError("half-way")

    monkeypatch.setattr(Recognise, "run", run)
    assert torch.equal(called(strict=False)[0], block()(example()))


def spins(self: object, gm: fx.GraphModule, ctx: Context) -> None:
    """Never ends, and swallows what is raised in it."""
    while True:
        try:
            list(gm.graph.nodes)
        except Exception:
            continue


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
def test_a_pass_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch, step: type) -> None:
    called(strict=False)  # the rules are traced at their first use: the passes take milliseconds from now on
    torch.compiler.reset()
    backend.clear_reports()
    monkeypatch.setattr(step, "run", spins)
    monkeypatch.setattr(pipeline, "PATIENCE", 5.0)
    assert_original_runs(f"internal failure: pass {step.name} did not end in 5 s and was ended")


def _swapped(x: Tensor, y: Tensor) -> Tensor:
    return torch.mul(x, y)


def _longer(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


LOOPS = {
    "swaps for ever": rule(_swapped, lambda x, y: torch.mul(y, x), x=T("... n"), y=T("... n")),
    "grows for ever": rule(_longer, lambda x: torch.sigmoid(torch.sigmoid(torch.sigmoid(x))), x=T("... n")),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_rules_that_never_end_are_ended(monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    monkeypatch.setattr(defaults, "RULES", (LOOPS[loop],))
    program = lambda x: torch.sigmoid(x) * (x + 1)
    ours = torch.compile(program, backend="graphopt")
    with pytest.warns(UserWarning, match="the rules still change the graph") as caught:
        assert torch.equal(ours(example()), program(example()))
    assert len([w for w in caught if str(w.message).startswith("graphopt")]) == 1
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match=r"StrictError: .*the rules still change the graph"):
        torch.compile(program, backend="graphopt", options={"strict": True})(example())
