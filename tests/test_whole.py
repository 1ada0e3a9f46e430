"""The whole graph beside the original: what is wrong end to end only is caught, and the result is right."""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx

from graphopt import api, backend, defaults, live, whole
from graphopt import graph as g
from graphopt.accuracy import Verdict
from graphopt.capture import capture
from graphopt.certificates import Certificates
from graphopt.errors import StrictError
from graphopt.lowering import direct
from graphopt.passes import spellings
from graphopt.passes.speller import Speller
from graphopt.pipeline import Context
from graphopt.report import Report
from graphopt.verification import CERTIFIED, NOT_JUDGED, RIGHT, WRONG, Whole
from graphopt.verify import Budget
from graphopt.whole import Beside, bytes_needed, judge_whole
from tests.block import Block, agree, block, example
from tests.threads import in_threads
from tests.verifying import Ran, ran, wrong_rule

aten = torch.ops.aten
FOREVER = float("inf")

pytestmark = pytest.mark.usefixtures("emptied", "own_certificates")


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


def plants_a_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    """+x becomes -x; no rule's pattern has it, so that none is made wrong, too."""
    assert aten.positive.default in spellings.SPELLINGS

    def wrong(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> fx.Node:
        return s.emit(aten.neg.default, args, {}, g.val(node), node)

    monkeypatch.setitem(spellings.SPELLINGS, aten.positive.default, wrong)


def plants_a_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(direct.SAME, aten.add.Tensor, torch.sub)


class Positive(Block):
    """A block, and an operator whose spelling can be spoilt."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.positive(super().forward(x))


def positive() -> Positive:
    return Positive().eval().requires_grad_(False)


FAULTS = (plants_a_pass, plants_a_spelling, plants_a_lowering)


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


# ------------------------------------------------------------------------------------------- what is caught


@pytest.mark.parametrize("fault", FAULTS)
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


@pytest.mark.parametrize("fault", FAULTS)
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
    assert [v.ok for v in verdicts] == [True, True, False] and len(outcome.warnings) == 1  # type: ignore[attr-defined]
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


# --------------------------------------------------------------------------------------- what is not judged


def test_memory_that_does_not_suffice_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, subtracts)
    wide = torch.nn.Sequential(torch.nn.Linear(2048, 1024), block()).eval()
    wide[1].forward = lambda y: y + 1  # type: ignore[method-assign]  # a sum after a weight of 16 MiB in fp64
    outcome = ran(wide, lambda c: c(torch.ones(1, 2048)), verify_mebibytes=1)
    whole_graph = found(outcome)
    assert whole_graph.state == NOT_JUDGED and "the memory budget is 1 MiB" in whole_graph.reason
    assert f"whole graph   not judged: {whole_graph.reason}" in str(outcome.report) and not outcome.warnings


def test_time_that_is_used_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "Budget", lambda seconds, size: Budget(0.0, size))
    whole_graph = found(ran(block(), lambda c: c(example())))
    assert whole_graph == Whole(NOT_JUDGED, reason="the time budget of 0 s is used up")


def test_weights_are_held_in_fp64_one_at_a_time() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(8)))
    captured = capture(model, torch.randn(1, 256))
    one = 256 * 256 * 8
    assert one < bytes_needed(captured.gm.graph, ()) < 2 * one


def test_random_numbers_are_told_and_left_alone() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x + torch.randn_like(x))

    torch.manual_seed(0)
    outcome = ran(model, lambda c: c(torch.ones(2, 3)))
    torch.manual_seed(0)
    agree(outcome.results[0], model(torch.ones(2, 3)))  # type: ignore[arg-type]  # a tensor
    assert found(outcome) == Whole(NOT_JUDGED, reason="it draws random numbers, which are others in fp64")


def test_a_call_that_fails_in_eager_too_is_not_the_one_that_counts() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(7, 20), block()).eval()
    good, bad = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 99]])

    def fails(c: Callable[..., object]) -> object:
        with pytest.raises(IndexError):
            c(bad)
        state = backend.reports()[-1].verification
        assert state is not None and state.whole is not None
        return state.whole

    outcome = ran(model, fails, lambda c: c(good))
    first = outcome.results[0]
    assert isinstance(first, Whole) and first.state == NOT_JUDGED and "the original fails: " in first.reason
    agree(outcome.results[1], model(good))  # type: ignore[arg-type]  # a tensor
    assert found(outcome).state == RIGHT and not outcome.warnings


# -------------------------------------------------------------------------------------- certificates, shapes


def test_a_second_start_does_not_judge_again(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = count_judged(monkeypatch)
    states = []
    for _ in range(2):
        torch.compiler.reset()
        states.append(found(ran(block(), lambda c: c(example()))))
        monkeypatch.setattr(backend, "CERTIFICATES", Certificates(backend.CERTIFICATES.folder))
    assert [s.state for s in states] == [RIGHT, CERTIFIED] and len(verdicts) == 1
    plant(monkeypatch, subtracts)  # another graph comes out: the certificate is not its
    torch.compiler.reset()
    assert found(ran(block(), lambda c: c(example()))).state == WRONG
    torch.compiler.reset()
    assert found(ran(block(), lambda c: c(example()))).state == WRONG, "what is wrong gets none"


def test_a_certificate_covers_its_shape_class_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = count_judged(monkeypatch)
    model = torch.nn.SiLU()
    shapes = ((3, 5), (3, 7), (1, 7), (1, 5), (0, 7))
    judged = []
    for shape in shapes:
        torch.compiler.reset()
        ran(model, lambda c, shape=shape: c(torch.randn(shape)))
        judged.append(len(verdicts))
    assert judged == [1, 1, 2, 2, 3]
    torch.compiler.reset()
    ran(model, lambda c: c(torch.randn(3, 5, dtype=torch.bfloat16)))
    assert len(verdicts) == 4


def test_a_damaged_certificate_is_judged_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    ran(torch.nn.SiLU(), lambda c: c(torch.ones(3, 5)))
    folder = backend.CERTIFICATES.folder
    assert folder is not None
    (path,) = (p for p in folder.glob("*.json") if "graph" in json.loads(p.read_text())["fields"])
    path.write_text("{")
    monkeypatch.setattr(backend, "CERTIFICATES", Certificates(folder))
    torch.compiler.reset()
    outcome = ran(torch.nn.SiLU(), lambda c: c(torch.ones(3, 5)))
    (warning,) = outcome.warnings
    assert "is damaged; its graph is verified again" in warning and found(outcome).state == RIGHT


def test_dynamic_shapes_are_judged_once_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = count_judged(monkeypatch)
    model = block()
    backend.clear_reports()
    compiled = torch.compile(
        model, backend="graphopt", dynamic=True, options={"verify": "first", "strict": True}
    )
    with torch.no_grad():
        for x in (example(5), example(9), example(12, 3), example(7, 1), example(3, 1)):
            agree(compiled(x), model(x))
    graphs = len(backend.reports())
    assert len(verdicts) == graphs == 2, "batches of one are a class of their own"
    assert all(isinstance(v, Verdict) and v.ok for v in verdicts)


# ------------------------------------------------------------------------------------------ models, threads


@pytest.mark.parametrize("wrong", [False, True])
def test_threads_that_call_one_graph_at_once(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    """The first call of each waits for the one verdict: right numbers for all, one warning."""
    if wrong:
        plant(monkeypatch, subtracts)
    verdicts = count_judged(monkeypatch)
    graphs: list[Callable[..., object]] = []
    given: list[tuple[object, ...]] = []

    def keeps(gm: fx.GraphModule, examples: Sequence[object]) -> Callable[..., object]:
        graphs.append(backend.graphopt(gm, examples, options={"verify": "first"}))

        def call(*args: object) -> object:
            given.append(args)
            return gm.forward(*args)

        return call

    model = block()
    with torch.no_grad():
        torch.compile(model, backend=keeps)(example())
    assert not verdicts, "nothing of ours has run"

    def work(i: int) -> Callable[[], None]:
        x = example() + i

        def task() -> None:
            args = [x if isinstance(a, Tensor) and a.shape == x.shape else a for a in given[0]]
            for _ in range(5):
                (result,) = graphs[0](*args)  # type: ignore[misc]  # flat outputs
                agree(result, model(x))

        return task

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        in_threads(*map(work, range(8)))
    assert len([w for w in caught if "the graph as a whole gives other numbers" in str(w.message)]) == wrong
    assert len(verdicts) == 1


@pytest.mark.parametrize("wrong", [False, True])
def test_an_optimized_model_can_still_run_its_original(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    """Nothing is released before the verdict; what is right is released then."""
    if wrong:
        plant(monkeypatch, subtracts)
    eager, x = block(), example()
    model = api.optimize(block(), verify="first")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            agree(model(x), eager(x))
    state = backend.reports()[-1].verification
    assert state is not None and state.whole is not None and state.whole.state == (WRONG if wrong else RIGHT)
    assert len([w for w in caught if "as a whole" in str(w.message)]) == wrong
    q, k = model.q.weight, model.k.weight
    shared = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert shared != wrong, "Q and K are parts of one prepared weight"


def test_lossy_weights_are_not_judged_as_a_whole() -> None:
    feed = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.SiLU(), torch.nn.Linear(128, 64)).eval()
    outcome = ran(feed.requires_grad_(False), lambda c: c(torch.randn(3, 64)), quantize="int8", strict=True)
    assert found(outcome) == Whole(NOT_JUDGED, reason="it is lossy, as asked for")


# ------------------------------------------------------------------------------------------------ the report


@pytest.mark.parametrize("fault", [None, plants_a_pass])
def test_the_report_keeps_it(monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None] | None) -> None:
    if fault is not None:
        fault(monkeypatch)
    report = ran(block(), lambda c: c(example())).report
    for copy in (Report.from_json(report.to_json()), pickle.loads(pickle.dumps(report))):
        assert copy.verification == report.verification and copy == report
    state = dataclasses.asdict(report)["verification"]["whole"]["state"]
    assert state == (RIGHT if fault is None else WRONG)
    assert f"whole graph {state}: outputs[0]" in " ".join(str(report).split())
