"""Optimized models: originals become views of what was prepared, which is held once."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphopt
from graphopt import backend
from tests.block import MERGED, Block, agree, block, counted, example
from tests.owned import Transposed, memory, released, rows, stand_ins

pytestmark = pytest.mark.usefixtures("emptied")


def test_a_merged_weight_is_held_once_and_reads_as_ever() -> None:
    model, x = block(), example()
    state, eager = copy.deepcopy(model.state_dict()), model(x)
    graphopt.optimize(model, strict=True)
    agree(model(x), eager)
    assert memory(model) == sum(p.nbytes for p in model.parameters()), "one layout a weight"
    assert model.q.weight.untyped_storage().data_ptr() == model.v.weight.untyped_storage().data_ptr()
    assert not stand_ins(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]) and value.stride() == state[name].stride()


def test_without_release_the_originals_stay() -> None:
    model, x = block(), example()
    before = [p.data_ptr() for p in model.parameters()]
    graphopt.optimize(model, release=False, strict=True)(x)
    assert [p.data_ptr() for p in model.parameters()] == before
    assert memory(model) > sum(p.nbytes for p in model.parameters())
    other, y = released()
    assert stand_ins(other) == {"weight"}
    other, z = released(release=False)
    assert not stand_ins(other) and torch.equal(y, z)


def test_without_optimize_nothing_is_released() -> None:
    mine, yours, x = block(1), block(2), example()
    before = [p.data_ptr() for p in yours.parameters()]
    graphopt.optimize(mine, strict=True)(x)
    torch.compile(yours, backend="graphopt", options={"strict": True})(x)
    assert [p.data_ptr() for p in yours.parameters()] == before


def _in_place(model: Block) -> None:
    model.k.weight.mul_(3)


def _loaded(model: Block) -> None:
    model.load_state_dict(block(7).state_dict())


def _through_data(model: Block) -> None:
    model.k.weight.data.mul_(3)


@pytest.mark.parametrize("change", [_in_place, _loaded, _through_data])
def test_a_write_to_an_alias_is_a_write_to_what_was_prepared(change: Callable[[Block], None]) -> None:
    model, x = graphopt.optimize(block(), strict=True), example()
    before = model(x)
    twin = block()
    for changed in (model, twin):
        change(changed)
    with counted() as counts:
        after = model(x)
    agree(after, twin(x))
    assert (after - before).abs().max() > 1e-2, "the change cannot be seen"
    assert counts == {"graphs": 0, "prepared": 0}


def test_refresh_prepares_aliases_anew() -> None:
    model, x = graphopt.optimize(block(), strict=True), example()
    before = model(x)
    graphopt.refresh(model)
    with counted() as counts:
        assert torch.equal(model(x), before)
    assert counts == {"graphs": 0, "prepared": MERGED}
    assert memory(model) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("replace", ["parameter", "data", "dtype"])
def test_what_replaces_an_alias_is_prepared_and_released(replace: str) -> None:
    model, twin, x = graphopt.optimize(block(), strict=True), block(), example()
    model(x)
    new = torch.randn(20, 20)
    for changed in (model, twin):
        if replace == "parameter":
            changed.k.weight = nn.Parameter(new.clone(), requires_grad=False)
        elif replace == "data":
            changed.k.weight.data = new.clone()
        else:
            changed.double()
    x = x.double() if replace == "dtype" else x
    agree(model(x), twin(x))
    if replace == "parameter":
        assert model.k.weight.untyped_storage().nbytes() == model.k.weight.nbytes, "somebody may hold it"
        graphopt.optimize(model, strict=True)
    agree(model(x), twin(x))
    gc.collect()
    assert memory(model) == sum(p.nbytes for p in model.parameters())


def test_a_new_length_finds_what_was_prepared() -> None:
    model, twin = graphopt.optimize(block(), strict=True), block()
    with counted() as counts:
        for length in (5, 9, 5, 3, 9):
            agree(model(example(length)), twin(example(length)))
    assert counts["prepared"] == MERGED and counts["graphs"] <= 3


def test_a_transposed_weight_is_an_alias_with_other_strides() -> None:
    model = Transposed().requires_grad_(False)
    twin = copy.deepcopy(model)
    graphopt.optimize(model, strict=True)
    with counted() as counts:
        for count in (3, 3, 5, 3, 5):
            agree(model(rows(count)), twin(rows(count)))
    assert counts["graphs"] <= 2 and not stand_ins(model)
    assert memory(model) == sum(p.nbytes for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_copy_of_a_model_with_aliases_is_nobodys() -> None:
    model, x = graphopt.optimize(block(), strict=True), example()
    y = model(x)
    twin = copy.deepcopy(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (twin, torch.load(stored, weights_only=False)):
        assert backend.STORE.owners.of(other) is None
        agree(other(x), y)
        other.k.weight.zero_()
        assert torch.equal(model(x), y)
        graphopt.optimize(other, strict=True)
        agree(other(x), other._call_impl(x))
