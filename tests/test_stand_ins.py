"""Optimized models: what nothing reads any more is released, and its stand-in says so to whoever asks."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphopt
from graphopt import backend, torch_private
from graphopt.errors import ReleasedError, WeightError
from graphopt.ownership import is_stand_in, stand_in
from graphopt.passes.quantize import Quantize
from graphopt.weights import PreparePlan, WeightStore
from tests.block import agree, block, counted, example
from tests.owned import (
    OPTIONS,
    Packed,
    Transposed,
    compiled,
    memory,
    owned,
    packed,
    prepare_graph,
    released,
    rows,
    stand_ins,
)

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("emptied")


def test_a_released_weight_keeps_what_can_be_known_of_it() -> None:
    model, twin = released()[0], packed()
    assert stand_ins(model) == {"weight"}, "one-dimensional weights stay"
    weight = model.weight
    assert (weight.shape, weight.dtype, weight.device) == (
        twin.weight.shape,
        torch.float32,
        torch.device("cpu"),
    )
    assert weight.isnan().all() and isinstance(weight, nn.Parameter) and not weight.requires_grad
    assert memory(model) <= sum(p.nbytes for p in model.parameters()) - 0.7 * weight.nbytes


def test_new_lengths_compile_from_stand_ins() -> None:
    twin = compiled(packed())
    expected = {count: twin(rows(count)) for count in (1, 3, 5, 7)}
    model = owned()
    with counted() as counts:
        for count in (3, 5, 3, 1, 5, 7):
            agree(model(rows(count)), expected[count])
    assert counts["prepared"] == 3, "the weight's pack and scales, the bias"
    assert counts["graphs"] <= 3, "the release is no reason to compile again"


def test_modes_of_the_first_call_do_not_matter() -> None:
    model, twin = owned(), compiled(packed())
    with torch.inference_mode():
        model(rows())
    agree(model(rows()), twin(rows()))
    assert not model.weight.is_inference()


def test_what_would_read_a_stand_in_says_so() -> None:
    model, y = released()
    asked = rows().requires_grad_()
    attempts: dict[str, Callable[[], object]] = {
        "read as a state dict": model.state_dict,
        "copied": lambda: copy.deepcopy(model),
        "pickled": lambda: torch.save(model, io.BytesIO()),
        "run without being compiled": lambda: model._call_impl(rows()),
    }
    for what, attempt in attempts.items():
        with pytest.raises(
            ReleasedError, match=f"weight weight was released .* cannot be {what}; graphopt.save"
        ):
            attempt()
    with pytest.raises(RuntimeError, match="more than one element"):
        model.weight.mul_(2)
    graphopt.optimize(model, **OPTIONS)  # without strict
    as_it_was = pytest.raises(
        ReleasedError, match=r"weight weight was released .* as it was; reload the model"
    )
    with torch.enable_grad(), pytest.warns(UserWarning, match="no_grad"), as_it_was:
        model(asked)
    assert torch.equal(model(rows()), y), "nothing of that has changed anything"


def test_a_program_that_fails_does_not_fall_back_on_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    model = owned(strict=False)
    model(rows())
    original = backend.Guarded._recover
    failed = RuntimeError("broken kernel")

    def fail(self: backend.Guarded, args: tuple[object, ...], error: Exception) -> object:
        return original(self, args, failed)

    monkeypatch.setattr(backend.Guarded, "_recover", fail)
    monkeypatch.setattr(
        backend.Guarded, "run", property(lambda self: _broken, lambda self, run: None), raising=False
    )
    with pytest.raises(ReleasedError, match="weight weight was released"):
        model(rows())


def _broken(*args: object) -> object:
    raise RuntimeError("broken kernel")


def test_a_form_that_is_not_held_is_an_error_with_a_way_out() -> None:
    model, _ = released()
    backend.STORE._entries.clear()
    backend.STORE._forget_sets()
    with pytest.raises(
        ReleasedError,
        match=r"weight weight \[64, 64\] was released, and the form \w{16} .* nothing\); reload",
    ):
        model(rows())


def test_another_road_to_a_released_weight_is_an_error() -> None:
    passes = (graphopt.Canonicalize(), graphopt.Recognise(), Quantize(exclude=("head",)), graphopt.Lower())
    model = owned()
    captured = graphopt.capture(model, rows())
    program, _ = graphopt.Pipeline(passes).run(captured)
    model(rows())
    for other in (program, captured):
        with pytest.raises(ReleasedError, match=r"weight weight \[64, 64\] was released"):
            other(rows())


def test_refresh_keeps_the_only_form_of_a_weight() -> None:
    model, y = released()
    graphopt.refresh(model)
    graphopt.refresh()
    with counted() as counts:
        assert torch.equal(model(rows()), y)
    assert counts == {"graphs": 0, "prepared": 1}, "the bias has its original"


@pytest.mark.parametrize("replace", ["parameter", "data", "state", "assigned", "zero"])
def test_new_values_are_prepared_and_released(replace: str) -> None:
    model, twin = released()[0], packed()
    later = replace in ("parameter", "assigned")
    new = torch.randn(64, 64)
    if replace == "parameter":
        model.weight = nn.Parameter(new.clone())
    elif replace == "data":
        model.weight.data = new.clone()
    elif replace == "zero":  # a fill is possible on one element
        model.weight.zero_()
        new = torch.zeros(64, 64)
    else:
        twin = packed(5)
        model.load_state_dict(twin.state_dict(), assign=replace == "assigned")
        new = twin.weight
    with torch.no_grad():
        twin.weight.copy_(new)
    model.requires_grad_(False)
    expected = compiled(twin)(rows())
    for _ in range(2):
        agree(model(rows()), expected)
    if later:
        assert not stand_ins(model), "somebody may hold it"
        agree(graphopt.optimize(model, strict=True, **OPTIONS)(rows()), expected)
    gc.collect()
    assert stand_ins(model) == {"weight"}


def test_parameters_of_others_stay() -> None:
    model, y = released()
    other = packed(1)
    state = dict(packed(2).named_parameters())
    with torch.no_grad():
        torch.func.functional_call(model, dict(other.named_parameters()), (rows(),))
    assert not stand_ins(other) and torch.equal(model(rows()), y)
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
    model(rows())
    model(rows(5))
    assert not any(is_stand_in(p) for p in state.values())


def _shared(model: nn.Module) -> None:
    base = torch.randn(100, 64)
    model.a, model.b = nn.Parameter(base[:64]), nn.Parameter(base[36:])


def _twice(model: nn.Module) -> None:
    model.a, model.b = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 64))
    model.b.data = model.a.data


def _buffer(model: nn.Module) -> None:
    _twice(model)
    model.register_buffer("seen", model.b.detach())


def _part(model: nn.Module) -> None:
    model.a, model.b = (nn.Parameter(torch.randn(100, 64)[:64]) for _ in range(2))


@pytest.mark.parametrize("build", [_shared, _twice, _buffer, _part])
@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}], ids=["merged", "packed"])
def test_weights_in_shared_memory_stay(
    build: Callable[[nn.Module], None], options: dict[str, object]
) -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.a) * nn.functional.linear(x, self.b)

    model = Both()
    build(model)
    before = [p.data_ptr() for p in model.requires_grad_(False).parameters()]
    graphopt.optimize(model, strict=True, **options)
    for _ in range(2):
        model(rows())
    assert [p.data_ptr() for p in model.parameters()] == before and not stand_ins(model)


def test_a_tied_weight_that_is_merged_twice_stays_readable() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + torch.relu(self.b(x)) * self.c(x)

    model = Twice().requires_grad_(False)
    twin = copy.deepcopy(model)
    graphopt.optimize(model, strict=True)
    for _ in range(2):
        agree(model(rows()), twin(rows()))
        for changed in (model, twin):
            changed.a.weight.mul_(2)
    assert not stand_ins(model) and torch.equal(model.state_dict()["a.weight"], twin.a.weight)


def test_other_compilers_never_read_a_stand_in() -> None:
    model, y = released()
    for outer in (nn.Sequential(model), lambda x: model(x)):
        assert torch.equal(torch.compile(outer, backend="eager")(rows()), y)
    outer = nn.Sequential(nn.Identity(), model.requires_grad_(False))
    assert torch.equal(torch.compile(outer, backend="graphopt", options=dict(OPTIONS))(rows()), y)
    for strict in (False, True):
        with pytest.raises(Exception, match="cannot be exported"):
            torch.export.export(model, (rows(),), strict=strict)
    with pytest.raises(ReleasedError, match=r"weight weight \[64, 64\] was released .* captured"):
        graphopt.capture(model, rows())


def test_more_programs_than_torch_compiles_by_default() -> None:
    if not torch_private.more_compilations(1):
        pytest.skip("torch.compile has no recompile_limit before torch 2.13")

    class Scaled(Packed):
        def forward(self, x: torch.Tensor, by: str = "") -> torch.Tensor:
            return super().forward(x) + len(by)

    model = graphopt.optimize(Scaled().requires_grad_(False), strict=True, **OPTIONS)
    y = model(rows())
    for count in range(12):
        agree(model(rows(), "x" * count), y + count)


def test_the_recompile_limit_is_named_where_the_program_runs_eagerly() -> None:
    with pytest.raises(ReleasedError, match=r"reload the model.*recompile_limit"):
        released()[0]._call_impl(rows())


def test_siblings_of_a_merged_weight_are_named() -> None:
    model = graphopt.optimize(Transposed().requires_grad_(False), strict=True)
    for p in model.parameters():
        assert p in backend.STORE.owners.mine
    store = WeightStore()
    gm = prepare_graph(lambda call, a, b: call(aten.cat.default, [a, b], 0), (7, 5), (4, 5))
    plan = PreparePlan(gm, "cat", (0, 1), ("q", "k"))
    gone = stand_in((7, 5), torch.float32, torch.device("cpu"))
    with pytest.raises(ReleasedError, match=r"weight q .* made of k too: load them together"):
        store.get((gone, torch.ones(4, 5)), plan)


def test_without_release_every_guard_is_kept() -> None:
    model = owned(release=False)
    model(rows())
    model.weight = nn.Parameter(torch.randn(64, 64).t(), requires_grad=False)
    with counted() as counts:
        model(rows())
    assert counts["graphs"] == 1


def test_a_state_that_does_not_fit_leaves_the_stand_in() -> None:
    model, y = released()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**packed().state_dict(), "weight": torch.zeros(3, 3)})
    assert stand_ins(model) == {"weight"} and torch.equal(model(rows()), y)


def test_a_cast_of_a_stand_in_is_an_error() -> None:
    model, _ = released()
    model.double()
    with pytest.raises(ReleasedError, match=r"weight weight \[64, 64\] was released"):
        model(rows().double())


def test_other_options_are_refused_where_weights_are_gone() -> None:
    model, y = released()
    with pytest.raises(WeightError, match=r"weight weight was released under other options .*; reload"):
        graphopt.optimize(model, merge=False)
    assert torch.equal(graphopt.optimize(model, **OPTIONS)(rows()), y), "strict changes no weight"
    aliased, x = graphopt.optimize(block()), example()
    before = aliased(x)
    agree(graphopt.optimize(aliased, merge=False)(x), before)


def test_again_with_the_same_options_is_nothing() -> None:
    model, x = graphopt.optimize(block(), strict=True), example()
    model(x)
    compiled = model._compiled_call_impl
    with counted() as counts:
        assert graphopt.optimize(model, strict=True) is model
        model(x)
    assert model._compiled_call_impl is compiled and counts == {"graphs": 0, "prepared": 0}
    assert len(model.q._forward_pre_hooks) == len(model.q._state_dict_pre_hooks) == 1
