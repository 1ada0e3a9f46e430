"""What is said of whole graphs: what is not judged and why, certificates, shapes, threads, the report."""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx

from graphopt import api, backend, live
from graphopt.accuracy import Verdict
from graphopt.capture import capture
from graphopt.certificates import Certificates
from graphopt.report import Report
from graphopt.verification import CERTIFIED, NOT_JUDGED, RIGHT, WRONG, Whole
from graphopt.verify import Budget
from graphopt.whole import bytes_needed
from tests.block import agree, block, example
from tests.planting import count_judged, found, plant, plants_a_pass, subtracts
from tests.threads import in_threads
from tests.verifying import ran

pytestmark = pytest.mark.usefixtures("emptied", "own_certificates")

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
