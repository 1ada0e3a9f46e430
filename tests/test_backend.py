"""The backend: how libraries call it, and what of a call is not for it: gradients, autocast, refusals."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from graphopt import backend
from tests.block import MERGED, Block, agree, block, counted, example
from tests.calling import called, compiled
from tests.tolerances import AUTOCAST

pytestmark = pytest.mark.usefixtures("fresh")


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
