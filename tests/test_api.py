"""enable, disable and optimize: what they reach, how they nest, and that they leave nothing behind."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.attention.flex_attention
from torch import nn

import graphopt
from graphopt import api, backend
from graphopt.errors import OptionError
from graphopt.options import Options
from tests.block import MERGED, Block, agree, block, counted, example
from tests.clean_start import forget


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code or prepared weights of other tests; no gradients."""
    forget()
    with torch.no_grad():
        yield
    while api._enabled:
        graphopt.disable()
    torch.compiler.reset()


def eager_compiled(model: nn.Module) -> nn.Module:
    """A model that a library compiled with a backend of its own."""
    return torch.compile(model, backend="eager")


def graphs(model: nn.Module, x: torch.Tensor) -> int:
    """How many graphs come to us at a call."""
    with counted() as counts:
        model(x)
    return counts["graphs"]


# ----------------------------------------------------------------------------------------- enable, disable


def test_enable_reaches_what_others_compile_until_disable() -> None:
    model, x = block(), example()
    ours = eager_compiled(model)
    assert graphs(ours, x) == 0
    graphopt.enable(strict=True)
    assert graphs(ours, x) == 1, "compiled before, and still sent to us"
    agree(ours(x), model(x))
    graphopt.disable()
    assert graphs(ours, x) == 0
    graphopt.disable()  # there is none: nothing happens
    assert graphs(eager_compiled(block(3)), x) == 0


def test_enable_is_a_context_manager_and_survives_an_exception() -> None:
    ours, x = eager_compiled(block()), example()
    with pytest.raises(ZeroDivisionError), graphopt.enable() as enabled:
        assert repr(enabled) == f"Enabled({Options()})"
        assert graphs(ours, x) == 1
        raise ZeroDivisionError
    torch.compiler.reset()
    assert graphs(ours, x) == 0 and not api._enabled


def test_enabling_nests_and_each_level_has_its_options() -> None:
    ours, x = eager_compiled(block()), example()

    def merges() -> int:
        with counted() as counts:
            ours(x)
            graphopt.refresh()
            ours(x)
        return counts["prepared"]

    with graphopt.enable():
        assert merges() >= MERGED
        with graphopt.enable(merge=False):
            assert merges() == 0
        assert merges() >= MERGED
    assert merges() == 0


def test_enabled_again_with_equal_options_nothing_recompiles() -> None:
    ours, x = eager_compiled(block()), example()
    found = []
    for options in ({}, {"merge": False}, {}, {"merge": False}, {"merge": True}):
        with graphopt.enable(**options):
            found.append(graphs(ours, x))
    assert found == [1, 1, 0, 0, 0]


def test_disable_inside_the_block_takes_back_that_one_only() -> None:
    ours, x = eager_compiled(block()), example()
    with graphopt.enable():
        with graphopt.enable(merge=False):
            graphopt.disable()
        assert len(api._enabled) == 1 and graphs(ours, x) == 1
    assert not api._enabled


def test_leaving_the_outer_block_takes_back_what_was_enabled_in_it() -> None:
    with graphopt.enable():
        graphopt.enable(merge=False)
    assert not api._enabled and graphs(eager_compiled(block()), example()) == 0


def test_a_wrong_option_changes_nothing() -> None:
    with pytest.raises(OptionError, match="did you mean 'strict'"):
        graphopt.enable(stric=True)
    assert not api._enabled and graphs(eager_compiled(block()), example()) == 0
    with graphopt.enable(merge=False):
        with pytest.raises(OptionError):
            graphopt.enable(merge="no")
        assert len(api._enabled) == 1


def test_what_was_forced_before_is_forced_again() -> None:
    ours, x = eager_compiled(block()), example()
    calls = []

    def mine(gm: torch.fx.GraphModule, examples: object) -> object:
        calls.append(gm)
        return gm.forward

    with torch.compiler.set_stance("default", force_backend=mine):
        with graphopt.enable():
            assert graphs(ours, x) == 1 and not calls
        ours(x)
    assert len(calls) == 1


def test_enable_reaches_other_threads() -> None:
    model, x = block(), example()
    results: list[torch.Tensor] = []

    def work() -> None:
        with torch.no_grad():
            results.append(eager_compiled(model)(x))

    with graphopt.enable(strict=True), counted() as counts:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    agree(results[0], model(x))
    assert counts["graphs"] == 1


def test_what_we_cannot_do_goes_to_inductor_under_enable(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    inductor = backend.torch_private.inductor

    def watched(gm: torch.fx.GraphModule, examples: list[object]) -> object:
        taken.append(gm)
        return inductor(gm, examples)

    monkeypatch.setattr(backend.torch_private, "inductor", watched)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with graphopt.enable(), torch.enable_grad(), pytest.warns(UserWarning, match="torch.no_grad"):
        loss = eager_compiled(model)(x).sum()
        loss.backward()
    assert len(taken) == 1
    agree(model.weight.grad, x.sum(0).expand(2, 3))
    with pytest.warns(UserWarning, match="torch.no_grad"), torch.enable_grad():
        torch.compile(nn.Linear(3, 2), backend="graphopt")(x)
    assert len(taken) == 1, "asked for by name, the original runs"


def test_where_inductor_fails_too_the_original_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gm: torch.fx.GraphModule, examples: list[object]) -> object:
        for node in gm.graph.nodes:
            node.args = ()
        raise IndexError("no such dimension")

    monkeypatch.setattr(backend.torch_private, "inductor", broken)

    def unknown(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    x = example()
    eager = unknown(x)  # out here, as it compiles itself
    with graphopt.enable(), pytest.warns(UserWarning) as caught:
        assert torch.equal(torch.compile(unknown)(x), eager)
    messages = [m for w in caught if "original" in (m := str(w.message)) or "Inductor" in m]
    assert len(messages) == 2 and "'cond' is not supported" in messages[0]
    assert messages[1] == "Inductor fails too (IndexError: no such dimension): the program runs in eager"


def test_an_unknown_operator_is_right_under_enable() -> None:
    flex_attention = torch.nn.attention.flex_attention.flex_attention
    q = torch.randn(1, 2, 8, 16)
    eager = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    with graphopt.enable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree(torch.compile(flex_attention)(q, q, q), eager)
        agree(flex_attention(q, q, q), eager)  # compiles itself, which Inductor cannot


# ------------------------------------------------------------------------------------------------ optimize


def test_optimize_returns_the_same_object_with_its_interface() -> None:
    model, x = block(), example()
    eager = model(x)
    ours = graphopt.optimize(model, strict=True)
    assert ours is model and isinstance(ours, Block)
    with counted() as counts:
        agree(ours(x), eager)
        agree(ours(x), eager)
    assert counts == {"graphs": 1, "prepared": MERGED}


def test_a_wrong_option_leaves_the_model_alone() -> None:
    model = block()
    with pytest.raises(OptionError, match="no option 'quantise'"):
        graphopt.optimize(model, quantise="int8")
    assert model._compiled_call_impl is None


def test_an_optimized_model_saves_and_loads() -> None:
    model, other, x = block(1), block(2), example()
    eager = other(x)
    names = list(model.state_dict())
    ours = graphopt.optimize(model, strict=True)
    assert list(ours.state_dict()) == names, "no prefix, nothing added"
    ours(x)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    ours.load_state_dict(torch.load(file))
    agree(ours(x), eager)
    agree(copy.deepcopy(ours)(x), eager)
    whole = io.BytesIO()
    torch.save(ours, whole)
    whole.seek(0)
    agree(torch.load(whole, weights_only=False)(x), eager)


def test_optimize_twice_takes_the_last_options() -> None:
    model, x = graphopt.optimize(block()), example()
    model(x)
    graphopt.optimize(model, merge=False)
    with counted() as counts:
        model(x)
    assert counts == {"graphs": 1, "prepared": 0}


def test_optimize_says_that_gradients_are_in_the_way() -> None:
    model, x = graphopt.optimize(Block()), example().requires_grad_()
    assert not any(p.requires_grad for p in model.parameters())
    with torch.enable_grad(), pytest.warns(UserWarning, match="torch.no_grad") as caught:
        y = model(x)
        y.sum().backward()
    assert x.grad is not None and y.requires_grad
    assert len([w for w in caught if "graphopt" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not model(x).requires_grad, "under no_grad it is ours"
        with torch.enable_grad():
            assert not model(example()).requires_grad, "without parameters' gradients no_grad is not needed"
