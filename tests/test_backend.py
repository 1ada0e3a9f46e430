"""The backend: how libraries call it, that nothing goes wrong silently, and what Dynamo hands it."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
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
from graphopt.report import Report
from graphopt.rule import T, rule
from graphopt.tools.zoo.census import expected_counts, recognised_counts
from tests.block import MERGED, Block, agree, block, counted, example
from tests.models import zoo
from tests.tolerances import AUTOCAST, close

pytestmark = pytest.mark.usefixtures("fresh")


def compiled(
    model: Callable[..., object], strict: bool = True, **settings: object
) -> Callable[..., torch.Tensor]:
    return torch.compile(model, backend="graphopt", options={"strict": strict}, **settings)


def ours_among(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "torch/jit" not in w.filename and w.category is UserWarning]


@dataclass
class Outcome:
    """What a call gave, the warnings of ours during it, and the reports."""

    value: torch.Tensor
    warnings: list[str]
    reports: tuple[Report, ...]


def called(function: Callable[..., torch.Tensor], *args: object) -> Outcome:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = function(*args)
    return Outcome(value, ours_among(caught), backend.reports())


# ---------------------------------------------------------------------------------------------- the signature


def test_the_signature_is_what_libraries_call() -> None:
    parameters = inspect.signature(backend.graphopt).parameters
    assert list(parameters) == ["gm", "example_inputs", "mode", "options", "kwargs"]
    assert parameters["mode"].kind is parameters["options"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["mode"].default is parameters["options"].default is None


def test_no_import_is_needed() -> None:
    code = (
        "import sys, torch; assert 'graphopt' not in sys.modules\n"
        "f = torch.compile(torch.nn.Linear(3, 2), backend='graphopt')\n"
        "with torch.no_grad(): f(torch.ones(1, 3))\n"
        "import graphopt.backend; assert len(graphopt.backend.reports()) == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune"])
def test_every_mode_is_accepted(mode: str | None) -> None:
    model, x = block(), example()
    agree(torch.compile(model, backend="graphopt", mode=mode)(x), model(x))
    assert [r.fallback for r in backend.reports()] == [None]


def test_equal_options_never_recompile() -> None:
    model, x = block(), example()
    with counted() as counts:
        for _ in range(3):  # a library may wrap a model anew at each call
            torch.compile(model, backend="graphopt", options={"strict": True, "merge": True})(x)
    assert counts == {"graphs": 1, "prepared": MERGED}
    with counted() as counts:
        torch.compile(model, backend="graphopt", options={"strict": True, "merge": False})(x)
    assert counts == {"graphs": 1, "prepared": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strikt": True}, "OptionError: graphopt has no option 'strikt'; did you mean 'strict'?"),
        ({"target": "cuda:90"}, "OptionError: option target is 'cuda:90', but the inputs are on cpu"),
    ],
)
def test_a_wrong_option_names_the_right_one(options: dict[str, object], message: str) -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(block(), backend="graphopt", options=options)(example())
    assert message in str(caught.value)
    assert not backend.reports()


def test_an_unknown_argument_is_an_error() -> None:
    gm = fx.symbolic_trace(nn.ReLU())
    with pytest.raises(ValueError, match=r"no argument 'boxed'; pass options=\{"):
        backend.graphopt(gm, [], boxed=True)


def test_reports_are_kept_in_order_and_forgotten_on_request() -> None:
    ours = compiled(block())
    ours(example(5)), ours(example(8))
    assert len(backend.reports()) == 2 and all(r.counts["attention"] == 1 for r in backend.reports())
    backend.clear_reports()
    assert backend.reports() == ()


# ------------------------------------------------------------------------------------------ nothing is silent


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


# ------------------------------------------------------------------------------------------------- gradients


def test_gradients_flow_and_the_warning_names_the_cure() -> None:
    model, x = Block(), example()
    ours = compiled(model, strict=False)
    with torch.enable_grad():
        outcome = called(ours, x)
        outcome.value.sum().backward()
        gradient = model.k.weight.grad
        model.zero_grad()
        model(x).sum().backward()
    torch.testing.assert_close(gradient, model.k.weight.grad, rtol=0, atol=0)
    (warning,) = outcome.warnings
    assert "call the model under torch.no_grad()" in warning
    quiet = called(ours, x)
    assert not quiet.warnings and not quiet.value.requires_grad and quiet.reports[-1].fallback is None


def test_gradients_under_strict_raise() -> None:
    with torch.enable_grad(), pytest.raises(BackendCompilerFailed, match=r"StrictError: .*torch.no_grad\(\)"):
        compiled(Block())(example())


def test_gradients_of_an_input_alone_count() -> None:
    model, x = block(), example().requires_grad_()
    with torch.enable_grad():
        outcome = called(compiled(model, strict=False), x)
    assert outcome.value.requires_grad and "torch.no_grad" in outcome.warnings[0]


def test_gradients_that_nobody_needs_do_not_count() -> None:
    with torch.enable_grad():
        assert not called(compiled(block()), example()).warnings
        inside = Block()

        def closed(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return inside(x)

        agree(compiled(closed)(example()), closed(example()))
        detached = called(compiled(lambda x: inside(x).detach()), example())
    assert not detached.warnings and detached.reports[-1].fallback is None


def test_gradients_turned_on_inside_count() -> None:
    model = Block()

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return model(x).sum()

    outcome = called(compiled(step, strict=False), example())
    outcome.value.backward()
    assert model.k.weight.grad is not None and "torch.no_grad" in outcome.warnings[0]


def test_weights_that_need_gradients_later_get_them() -> None:
    model, x = block(), example()
    ours = compiled(model, strict=False)
    with torch.enable_grad():
        ours(x)
        model.requires_grad_(True)
        outcome = called(ours, x)
        outcome.value.sum().backward()
    assert model.k.weight.grad is not None and len(outcome.warnings) == 1


# ------------------------------------------------------------------------------------ out of scope, but right


def test_ambient_autocast_casts_as_eager() -> None:
    model, x = block(), example()
    with torch.autocast("cpu", torch.bfloat16):
        outcome = called(compiled(model), x)
        torch.testing.assert_close(outcome.value, model(x), **AUTOCAST)
    assert outcome.value.dtype == torch.float32 and not outcome.warnings
    agree(compiled(model)(x), model(x))


def test_data_dependent_control_flow_breaks_the_graph_and_is_right() -> None:
    model = block()

    def branch(x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        return y * 2 if y.sum() > 0 else y - 1

    ours = compiled(branch)
    for x in (example(), -example(), example(3)):
        agree(ours(x), branch(x))


def test_what_is_refused_runs_as_the_original_with_its_reason() -> None:
    def spectrum(x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(x).conj().abs()

    outcome = called(compiled(spectrum, strict=False), example())
    assert torch.equal(outcome.value, spectrum(example()))
    assert outcome.reports[0].fallback and "complex64" in outcome.reports[0].fallback
    assert outcome.warnings == [f"graphopt runs the original program: {outcome.reports[0].fallback}"]


def test_meta_inputs_run_as_the_original() -> None:
    model = block().to("meta")
    outcome = called(compiled(model, strict=False), example().to("meta"))
    assert outcome.value.is_meta and "meta device" in outcome.warnings[0]


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_an_empty_input_is_right(batch: int, length: int) -> None:
    model, x = block(), example()[:batch, :length]
    assert x.numel() == 0
    outcome = called(compiled(model, strict=False), x)
    assert torch.equal(outcome.value, model(x))


# --------------------------------------------------------------------------------------- the recompile limit


def test_the_last_compilation_that_torch_allows_warns() -> None:
    model = block()
    ours = compiled(model, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        assert not called(ours, example(3)).warnings
        second = called(ours, example(4))
        (warning,) = second.warnings
        assert "compilation 2 of 2" in warning and "dynamic=True" in warning
        assert second.reports[-1].warnings == (warning,) and not second.reports[0].warnings
        with counted() as counts:
            agree(ours(example(5)), model(example(5)))
        assert counts["graphs"] == 0, "torch ran it eagerly, as the warning says"


# --------------------------------------------------------------------------------------- what Dynamo hands us


def test_lengths_become_dynamic_by_themselves() -> None:
    model = zoo.model("llama")
    ours = compiled(model)
    lengths = (7, 9, 4, 12, 8)
    for length in lengths:
        given = zoo.inputs(model, zoo.Case(length=length))
        logits = ours(**given, use_cache=False).logits
        close(logits, model(**given).logits, torch.float32)
    assert len(backend.reports()) == 2, "fixed, then dynamic"
    expected = expected_counts(model, **zoo.inputs(model, zoo.Case()))
    assert [recognised_counts(r.counts) for r in backend.reports()] == [expected] * 2


@pytest.mark.parametrize("how", ["dynamic", "mark"])
def test_dynamic_shapes_are_one_graph(how: str) -> None:
    model = block()
    ours = compiled(model, dynamic=True if how == "dynamic" else None)
    for length in (5, 8, 3):
        x = example(length)
        if how == "mark":
            torch._dynamo.mark_dynamic(x, 1)
        agree(ours(x), model(example(length)))
    (report,) = backend.reports()
    assert report.counts["attention"] == 1 and report.counts["linear"] == 7
    assert report.unmatched_share == 0


def test_dynamic_batch_and_length_at_once() -> None:
    model = block()
    ours = compiled(model, dynamic=True)
    for length, batch in ((5, 2), (8, 3), (3, 7)):
        agree(ours(example(length, batch)), model(example(length, batch)))
    assert len(backend.reports()) == 1


def test_more_than_64_arguments() -> None:
    def total(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*(x + i for i, x in enumerate(xs)), sum(xs))

    xs = [torch.randn(3) for _ in range(100)]
    for ours, eager in zip(compiled(total)(*xs), total(*xs), strict=True):
        agree(ours, eager)
    assert len(backend.reports()) == 1


def test_a_model_with_more_than_64_weights() -> None:
    model = nn.Sequential(*(block(seed) for seed in range(10)))
    agree(compiled(model)(example()), model(example()))
    assert len(backend.STORE) == 10 * MERGED


def test_outputs_without_dimensions() -> None:
    model = block()
    ours = compiled(lambda x: (model(x).sum(), x.shape[1], (x > 0).all()))
    total, length, positive = ours(example())
    agree(total, model(example()).sum())
    assert total.shape == positive.shape == () and length == 5 and positive.dtype == torch.bool


def test_inputs_without_dimensions_and_without_tensors() -> None:
    def f(x: torch.Tensor, scale: torch.Tensor, n: int, shift: float, name: str, last: bool) -> torch.Tensor:
        y = x * scale + shift
        return (y**n)[..., -1] if last and name == "a" else y

    ours = compiled(f)
    for args in ((2, 0.5, "a", True), (3, 0.5, "a", True), (2, 1.5, "b", True), (2, 1.5, "a", False)):
        agree(ours(example(), torch.tensor(3.0), *args), f(example(), torch.tensor(3.0), *args))


def test_floats_and_ints_under_dynamic_shapes() -> None:
    def f(x: torch.Tensor, n: int, factor: float) -> torch.Tensor:
        return x[:, :n] * factor + n

    ours = compiled(f, dynamic=True)
    for n, factor in ((3, 0.5), (2, 1.5), (4, 2.5)):
        agree(ours(example(), n, factor), f(example(), n, factor))


def test_a_module_without_parameters() -> None:
    ours = compiled(nn.Sequential(nn.SiLU(), nn.Softmax(-1)))
    with counted() as counts:
        agree(ours(example()), torch.softmax(nn.functional.silu(example()), -1))
    assert counts == {"graphs": 1, "prepared": 0}


def test_outputs_that_are_inputs_weights_or_views_of_them() -> None:
    model = Block()

    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x, model.q.weight, model.q.weight.t(), x[0], x.transpose(0, 1), x + 1

    x = example()
    for ours, eager in zip(compiled(f)(x), f(x), strict=True):
        assert torch.equal(ours, eager) and ours.stride() == eager.stride()
        if eager.untyped_storage().data_ptr() in (x.data_ptr(), model.q.weight.data_ptr()):
            assert ours.data_ptr() == eager.data_ptr()


def test_nested_inputs_and_outputs() -> None:
    model = block()

    def f(inputs: dict[str, list[torch.Tensor]]) -> dict[str, object]:
        a, b = inputs["xs"]
        return {"y": (model(a), [model(b)]), "none": None}

    ours, eager = compiled(f)({"xs": [example(), example()]}), f({"xs": [example(), example()]})
    agree(ours["y"][0], eager["y"][0])
    agree(ours["y"][1][0], eager["y"][1][0])
    assert ours["none"] is None


def test_inputs_that_are_written() -> None:
    model = block()

    def step(x: torch.Tensor, cache: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, position, model(x))
        position.add_(x.shape[1])
        return cache.sum(1)

    ours = compiled(step)
    state = [(torch.zeros(2, 9, 20), torch.arange(3)) for _ in range(2)]
    for _ in range(3):
        agree(ours(example(3), *state[0]), step(example(3), *state[1]))
        agree(state[0][0], state[1][0])
        assert torch.equal(state[0][1], state[1][1])
    assert len(backend.reports()) == 1


def test_under_inference_mode() -> None:
    model, x = block(), example()
    ours = compiled(model)
    with torch.inference_mode():
        result = ours(x)
    agree(result, model(x))
    agree(ours(x), model(x))
