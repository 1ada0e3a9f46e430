"""Weights that change after compile: merged Q, K, V show it in the next call; each set is prepared once."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphopt
from graphopt import backend
from graphopt.accuracy import judge
from tests.block import MERGED, Block, agree, block, counted, example
from tests.tolerances import close

pytestmark = pytest.mark.usefixtures("fresh")


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="graphopt", options={"strict": True})


def test_weights_are_prepared_at_the_first_call_and_not_again() -> None:
    model, x = block(), example()
    with counted() as counts:
        ours = compiled(model)
        for _ in range(3):
            agree(ours(x), model(x))
    assert counts == {"graphs": 1, "prepared": MERGED}


def _in_place(model: Block) -> None:
    model.k.weight.mul_(3)


def _replaced(model: Block) -> None:
    model.k.weight = nn.Parameter(torch.randn(20, 20), requires_grad=False)


def _loaded(model: Block) -> None:
    model.load_state_dict(block(7).state_dict())


def _assigned(model: Block) -> None:
    model.load_state_dict(block(7).state_dict(), assign=True)


def _copied(model: Block) -> None:
    model.up.weight.copy_(model.gate.weight)


def _swapped_module(model: Block) -> None:
    model.v = block(7).v


def _data_assigned(model: Block) -> None:
    model.q.weight.data = torch.randn(20, 20)


@pytest.mark.parametrize(
    "change", [_in_place, _replaced, _loaded, _assigned, _copied, _swapped_module, _data_assigned]
)
def test_a_change_shows_in_the_next_call_without_a_compile(change: Callable[[Block], None]) -> None:
    model, x = block(), example()
    ours = compiled(model)
    before = ours(x)
    with counted() as counts:
        change(model)
        after = ours(x)
        ours(x)
    agree(after, model(x))
    assert (after - before).abs().max() > 1e-2, "the change cannot be seen"
    assert counts["graphs"] == 0 and 1 <= counts["prepared"] <= MERGED


def test_a_change_under_inference_mode_shows() -> None:
    model, x = block(), example()
    ours = compiled(model)
    ours(x)
    with torch.inference_mode():
        model.k.weight.mul_(3)
        agree(ours(x), model(x))
    agree(ours(x), model(x))


def test_a_write_through_data_shows_after_refresh() -> None:
    model, x = block(), example()
    ours = compiled(model)
    before = ours(x)
    model.k.weight.data.mul_(3)
    assert torch.equal(ours(x), before), "it shows without refresh now: say so in the documentation"
    with counted() as counts:
        graphopt.refresh(model)
        agree(ours(x), model(x))
    assert counts == {"graphs": 0, "prepared": MERGED}


def test_another_dtype_compiles_anew_and_is_right() -> None:
    model, x = block(), example()
    ours = compiled(model)
    ours(x)
    model.to(torch.float64)
    exact = model(x.double())
    close(ours(x.double()), exact, torch.float64)
    model.to(torch.bfloat16)
    verdict = judge({"x": exact}, {"x": model(x.bfloat16())}, {"x": ours(x.bfloat16())}, torch.bfloat16)
    assert verdict.ok, verdict.reason


def test_two_instances_share_one_graph_and_alternate() -> None:
    one, two, x = block(1), block(2), example()
    ours = compiled(one), compiled(two)
    with counted() as counts:
        for _ in range(3):
            agree(ours[0](x), one(x))
            agree(ours[1](x), two(x))
    assert counts == {"graphs": 1, "prepared": 2 * MERGED}


@pytest.mark.parametrize(("breaks", "graphs"), [(False, 1), (True, 2)])
def test_layers_compiled_one_by_one_share_their_graphs(breaks: bool, graphs: int) -> None:
    layers = nn.Sequential(*(block(seed, breaks) for seed in range(3)))
    x = example()
    eager = copy.deepcopy(layers)(x)
    for layer in layers:
        layer.compile(backend="graphopt", options={"strict": True})
    with counted() as counts:
        for _ in range(3):
            agree(layers(x), eager)
    assert counts == {"graphs": graphs, "prepared": 3 * MERGED}
    with counted() as counts:
        layers[1].q.weight.mul_(3)
        changed = layers(x)
    for layer in layers:
        layer._compiled_call_impl = None
    agree(changed, layers(x))
    assert counts == {"graphs": 0, "prepared": 1}, "the other layers' are kept"


def test_one_model_with_breaks_keeps_its_fragments_sets_apart() -> None:
    layers = nn.Sequential(*(block(seed, breaks=True) for seed in range(3)))
    x, ours = example(), compiled(layers)
    with counted() as counts:
        for _ in range(2):
            agree(ours(x), layers(x))
    assert counts["prepared"] == 3 * MERGED


def test_two_models_interleaved_with_changes() -> None:
    one, two, x = block(1), nn.Sequential(block(2), block(3)), example()
    ours, theirs = compiled(one), compiled(two)
    for factor in (1.0, 0.5, 2.0):
        one.k.weight.mul_(factor)
        two[1].v.weight.mul_(factor)
        agree(theirs(x), two(x))
        agree(ours(x), one(x))


def test_lengths_share_prepared_weights() -> None:
    model = block()
    ours = compiled(model)
    with counted() as counts:
        for length in (5, 9, 1, 3):
            agree(ours(example(length)), model(example(length)))
    assert counts["graphs"] > 1 and counts["prepared"] == MERGED


def test_a_deleted_model_takes_its_prepared_weights_along() -> None:
    one, two, x = block(1), block(2), example()
    before = len(backend.STORE)  # a refresh leaves the weights of other tests' models that were released
    ours, theirs = compiled(one), compiled(two)
    ours(x), theirs(x)
    assert len(backend.STORE) == before + 2 * MERGED
    del one, ours
    gc.collect()
    assert len(backend.STORE) == before + MERGED
    agree(theirs(x), two(x))


def _by_backend(model: nn.Module) -> object:
    return compiled(model)


def _in_place_compiled(model: nn.Module) -> object:
    return graphopt.optimize(model)


@pytest.mark.parametrize("compile_it", [_by_backend, _in_place_compiled])
def test_nothing_of_ours_keeps_weights_alive(compile_it: Callable[[nn.Module], object]) -> None:
    model = block()
    before = len(backend.STORE)
    compile_it(model)(example())
    assert len(backend.STORE) > before
    weight = weakref.ref(model.q.weight)
    del model
    gc.collect()
    assert weight() is None and len(backend.STORE) == before


def test_an_optimizers_step_shows() -> None:
    model, x = Block().eval(), example()
    ours = compiled(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(2):
        before = ours(x)
        with torch.enable_grad():
            model(x).sum().backward()
        optimizer.step()
        agree(ours(x), model(x))
        assert (ours(x) - before).abs().max() > 1e-2


def test_weights_given_from_outside() -> None:
    model, x = block(), example()

    def call(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (x,))

    ours = torch.compile(call, backend="graphopt", options={"strict": True})
    for seed in (1, 2, 1):
        weights = dict(block(seed).named_parameters())
        agree(ours(x, weights), call(x, weights))


class Adapted(nn.Module):
    """x @ (w + scale * a @ b).T: a weight computed from weights and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = (nn.Parameter(torch.randn(s)) for s in ((20, 20), (20, 2), (2, 20)))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.w + self.scale * (self.a @ self.b))


@pytest.mark.parametrize("name", ["w", "a", "b", "scale"])
def test_each_part_of_a_computed_weight_shows(name: str) -> None:
    model, x = Adapted(), example()
    ours = compiled(model)
    with counted() as counts:
        before = ours(x)
        model.get_buffer(name).mul_(3) if name == "scale" else model.get_parameter(name).mul_(3)
        agree(ours(x), model(x))
        ours(x)
    assert (ours(x) - before).abs().max() > 1e-2
    assert counts == {"graphs": 1, "prepared": 2}


class Learning(nn.Module):
    """Two projections of one input; each call changes a weight of one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q, self.k = nn.Linear(20, 4), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.q.weight.mul_(1.5)
        return self.q(x) + 2 * self.k(x)


def test_a_graph_that_writes_its_own_weight() -> None:
    model, eager, x = Learning(), Learning(), example()
    ours = compiled(model)
    for _ in range(3):
        agree(ours(x), eager(x))
    agree(model.q.weight, eager.q.weight)


def test_a_graph_that_writes_anothers_weight() -> None:
    model, x = block(), example()
    ours = compiled(model)
    ours(x)

    def scale(model: Block) -> torch.Tensor:
        return model.q.weight.mul_(2).sum()

    torch.compile(scale, backend="graphopt", options={"strict": True})(model)
    agree(ours(x), model(x))


def test_tied_projections_are_right() -> None:
    model, x = block(), example()
    model.k.weight = model.q.weight
    ours = compiled(model)
    agree(ours(x), model(x))
    model.k.weight.mul_(2)
    agree(ours(x), model(x))
    model.k.weight = nn.Parameter(torch.randn(20, 20), requires_grad=False)  # no longer tied
    agree(ours(x), model(x))


def test_weights_made_under_inference_mode_are_right() -> None:
    with torch.inference_mode():
        model = block()
        x = example()
        ours = compiled(model)
        agree(ours(x), model(x))
        model.k.weight.mul_(3)
        agree(ours(x), model(x))


def test_a_copy_of_a_compiled_model_has_its_own_weights() -> None:
    model, x = graphopt.optimize(block(), strict=True), example()
    model(x)
    twin = copy.deepcopy(model)
    twin.k.weight.mul_(3)
    agree(twin(x), Block.forward(twin, x))
    agree(model(x), Block.forward(model, x))


def test_no_warning_on_the_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, x = block(), example()
        ours = compiled(model)
        agree(ours(x), model(x))
