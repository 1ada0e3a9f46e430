"""Optimized models own their weights: originals become views of what was prepared, or stand-ins."""

from __future__ import annotations

import copy
import gc
import io
import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import graphopt
from graphopt import backend, torch_private
from graphopt import graph as g
from graphopt.errors import ReleasedError, WeightError
from graphopt.options import Options
from graphopt.ownership import Marked, Owned, Owners, follow, is_stand_in, keeps_layout, stand_in, ways
from graphopt.passes.quantize import Quantize
from graphopt.torch_private import new_fake_mode
from graphopt.weights import Prepared, PreparePlan, WeightStore
from tests.block import MERGED, Block, agree, block, counted, example

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("emptied")


OPTIONS: dict[str, object] = {"quantize": "int8", "quantize_exclude": ("head",)}


class Packed(nn.Module):
    """x [batch, 64] -> 64 features; with OPTIONS, `weight` is packed and `head` is read as it is."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.weight = nn.Parameter(torch.randn(64, 64) / 5)
            self.gain = nn.Parameter(torch.randn(64))
            self.head = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + nn.functional.linear(x, self.weight, self.gain * 2))


def rows(count: int = 3) -> torch.Tensor:
    """x [count, 64]."""
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(count))


def packed(seed: int = 0) -> Packed:
    return Packed(seed).eval().requires_grad_(False)


def owned(seed: int = 0, **options: object) -> Packed:
    """An optimized one."""
    return graphopt.optimize(packed(seed), **{"strict": True, **OPTIONS, **options})


def released(seed: int = 0, **options: object) -> tuple[Packed, torch.Tensor]:
    """An optimized one that has run, and what it gave for `rows()`."""
    model = owned(seed, **options)
    return model, model(rows())


def compiled(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same program on weights that are not owned."""
    return torch.compile(model, backend="graphopt", options=dict(OPTIONS))


def stand_ins(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if is_stand_in(p)}


def memory(model: nn.Module) -> int:
    """The bytes of all storages that parameters and their prepared forms lie in, each counted once."""
    return graphopt.weight_bytes(model) - sum(b.nbytes for b in model.buffers())


# ------------------------------------------------------------------------------------------------- aliases


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


class Transposed(nn.Module):
    """Q, K, V with weights [in, out]: merged, they stand in what is prepared as columns."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(64, n) / 5) for n in (64, 12, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.addmm(x.new_zeros(w.shape[1]), x, w) for w in (self.q, self.k, self.v)], -1)


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


# ----------------------------------------------------------------------------------------------- stand-ins


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


# --------------------------------------------------------------------------------- weights with other readers


class Tied(nn.Module):
    """An embedding whose table is the head's weight too; a graph break makes two programs of it."""

    def __init__(self, breaks: bool = False, late: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.breaks, self.late = breaks, late

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(tokens, 64).float() if self.late else self.embed(tokens)
        if self.breaks:
            torch._dynamo.graph_break()
        x = nn.functional.linear(x, self.embed.weight)
        if self.late:
            torch._dynamo.graph_break()
            x = x + self.embed(tokens).sum()
        return x


@pytest.mark.parametrize("breaks", [False, True])
def test_a_weight_that_is_read_as_it_is_too_stays(breaks: bool) -> None:
    model, tokens = Tied(breaks).requires_grad_(False), torch.tensor([[1, 5, 2]])
    expected = compiled(copy.deepcopy(model))(tokens)
    graphopt.optimize(model, strict=True, **OPTIONS)
    for _ in range(2):
        agree(model(tokens), expected)
    assert not stand_ins(model)


def test_a_later_program_that_reads_it_as_it_is_says_so() -> None:
    model = graphopt.optimize(Tied(late=True), strict=True, **OPTIONS)
    with pytest.raises(ReleasedError, match=r"weight embed\.weight was released"):
        model(torch.tensor([[1, 5, 2]]))
    other = graphopt.optimize(Tied(late=True), release=False, strict=True, **OPTIONS)
    assert not other(torch.tensor([[1, 5, 2]])).isnan().any()


def test_a_parameter_of_two_optimized_models_stays() -> None:
    one, two = packed(1), packed(2)
    two.weight = one.weight
    for model in (one, two):
        graphopt.optimize(model, strict=True, **OPTIONS)
    found = [model(rows()) for model in (one, two)]
    assert not stand_ins(one) and not stand_ins(two)
    one.weight.mul_(3)
    assert all(not torch.equal(m(rows()), y) for m, y in zip((one, two), found, strict=True))


def test_a_part_of_an_optimized_model_is_no_second_model() -> None:
    inner = packed()
    outer = nn.Sequential(inner)
    expected = compiled(packed())(rows())
    graphopt.optimize(inner, strict=True, **OPTIONS)
    graphopt.optimize(outer, strict=True, **OPTIONS)
    agree(outer(rows()), expected)
    agree(outer(rows()), expected)
    assert stand_ins(outer) == {"0.weight"}


def test_another_model_that_shares_a_parameter_hears_of_its_release() -> None:
    other = packed(2)
    model = owned(1)
    other.weight = model.weight
    theirs = compiled(other)
    before = theirs(rows())
    model(rows())
    assert not before.isnan().any() and stand_ins(other) == {"weight"}
    agree(theirs(rows()), before)  # of the same prepared form
    other.weight = nn.Parameter(stand_in((64, 64), torch.float32, torch.device("cpu")), requires_grad=False)
    with pytest.raises(ReleasedError, match="is not held"):
        theirs(rows())


def test_buffers_are_not_owned() -> None:
    class Buffered(Packed):
        def __init__(self) -> None:
            super().__init__()
            weight = self.weight.detach()
            del self.weight
            self.register_buffer("weight", weight)

    model = graphopt.optimize(Buffered().requires_grad_(False), strict=True, **OPTIONS)
    model(rows())
    assert not model.weight.isnan().any()


def test_what_the_model_itself_computes_of_a_weight_does_not_release_it() -> None:
    """A table of positions is read as far as the input is long: another length needs more of it."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 64)
            self.weight = nn.Parameter(torch.randn(64, 64))
            self.register_buffer("numbers", torch.arange(9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.table(self.numbers[: x.shape[0]])
            return x + nn.functional.linear(x, self.weight * 0.5)

    model = Positions().requires_grad_(False)
    expected = {count: model(rows(count)) for count in (3, 5, 9)}
    graphopt.optimize(model, strict=True)
    for count in (3, 5, 9, 3):
        agree(model(rows(count)), expected[count])
    assert not stand_ins(model) and backend.STORE.prepared


@pytest.mark.parametrize("ours", [True, False])
def test_a_part_of_a_weight_does_not_keep_all_of_it(ours: bool) -> None:
    """A rank's rows are copied, and the weight goes; a slice that the model takes is a view."""
    origin = g.Origin("shard", "shard@-#0", ())
    gm = prepare_graph(lambda call, w: call(aten.slice.Tensor, w, 0, 16, 32), (64, 64))
    for node in gm.graph.nodes:
        if node.op == "call_function" and ours:
            node.meta["origin"] = origin
    plan = PreparePlan(gm, "part", (0,), ("weight",))
    store, model = WeightStore(), packed()
    store.owners.add(model, Owned(Options(), release=True))
    rows_of_it = model.weight[16:32].clone()
    prepared = Prepared(store, (plan,), ((0,),))
    for _ in range(2):
        (found,) = prepared(model.weight)
        assert torch.equal(found, rows_of_it)
    assert found.untyped_storage().nbytes() == (1 if ours else 4) * 16 * 64 * 4
    assert is_stand_in(model.weight) == ours and store.prepared == 1


def test_threads_share_one_release() -> None:
    model, expected = owned(), compiled(packed())(rows())
    model(rows())
    model.load_state_dict(packed().state_dict())
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                for count in (3, 3, 3):
                    agree(model(rows(count)), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert stand_ins(model) == {"weight"}


# --------------------------------------------------------------------------------------------------- pieces


def prepare_graph(build: Callable[..., fx.Node], *shapes: tuple[int, ...]) -> fx.GraphModule:
    """A prepare graph with abstract values, from `build(graph, *weights)`."""
    mode, graph = new_fake_mode(), fx.Graph()
    weights = []
    for i, shape in enumerate(shapes):
        weights.append(graph.placeholder(f"w{i}"))
        with mode:
            g.set_val(weights[-1], torch.empty(shape))

    def call(target: Callable[..., object], *args: object) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]  # nodes
        with mode:
            g.set_val(node, target(*fx.node.map_arg(args, g.val)))
        return node

    graph.output(build(call, *weights))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("build", "found", "rows_only"),
    [
        (lambda call, a, b: call(aten.cat.default, [a, b], 0), {0, 1}, True),
        (lambda call, a, b: call(aten.cat.default, [a, b], -2), {0, 1}, True),
        (
            lambda call, a, b: call(aten.cat.default, [call(aten.t.default, x) for x in (a, b)], 1),
            {0, 1},
            False,
        ),
        (
            lambda call, a, b: call(aten.permute.default, call(aten.cat.default, [a, b], 0), [1, 0]),
            {0, 1},
            False,
        ),
        (
            lambda call, a, b: call(aten.transpose.int, call(aten.cat.default, [b, a], 0), 0, -1),
            {0, 1},
            False,
        ),
        (lambda call, a, b: call(aten.cat.default, [a, call(aten.mul.Tensor, b, 2)], 0), {0}, True),
        (lambda call, a, b: call(aten.cat.default, [a, a, b], 0), {1}, True),
        (lambda call, a, b: call(aten.cat.default, [a, call(aten.clone.default, b)], 0), {0, 1}, True),
        (lambda call, a, b: call(aten.slice.Tensor, call(aten.cat.default, [a, b], 0), 0, 1, 9), set(), True),
        (lambda call, a, b: call(aten.to.dtype, a, torch.float64), set(), True),
        (lambda call, a, b: call(aten.sum.default, a), set(), True),
    ],
)
def test_ways_lead_to_what_was_put_in(
    build: Callable[..., fx.Node], found: set[int], rows_only: bool
) -> None:
    gm = prepare_graph(build, (7, 5), (4, 5))
    weights = [torch.randn(7, 5), torch.randn(4, 5)]
    result, ways_found = gm(*weights), ways(gm)
    assert set(ways_found) == found
    for i, way in ways_found.items():
        part = follow(way, result)
        assert torch.equal(part, weights[i]) and keeps_layout(way) == rows_only
        assert part.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()


def test_what_is_a_stand_in() -> None:
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = stand_in((3, 1, 4), dtype, cpu)
        assert (
            is_stand_in(x) and x.shape == (3, 1, 4) and x.dtype == dtype and x.untyped_storage().nbytes() < 16
        )
    for other in (
        torch.full((3, 4), math.nan),
        torch.full((1,), math.nan).expand(4),
        torch.zeros(1, 1).expand(3, 4),
        torch.zeros(1, 1, dtype=torch.int8).expand(3, 4),
        torch.empty(1, 1, device="meta").expand(3, 4),
        torch.empty(0, 3),
        None,
        3,
    ):
        assert not is_stand_in(other)
    assert not is_stand_in(stand_in((3, 4), torch.float32, cpu).zero_())


def test_marks_die_with_their_tensors() -> None:
    marked = Marked()
    kept = [torch.zeros(1) for _ in range(3)]
    for x in (*kept, torch.zeros(1)):
        marked.add(x)
    del x
    gc.collect()
    assert len(marked._tensors) == 3 and all(x in marked for x in kept) and torch.zeros(1) not in marked


def test_a_dead_model_is_owned_no_more() -> None:
    owners = backend.STORE.owners
    assert isinstance(owners, Owners)
    model = graphopt.optimize(block())
    weight = model.q.weight
    assert id(weight) in owners.releasable()
    del model
    gc.collect()
    assert id(weight) not in owners.releasable()


# --------------------------------------------------------------------------------------------------- NaN


class Chain(nn.Module):
    """Two packed weights, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = (nn.Parameter(torch.randn(64, 64) / 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.first), self.last)


class TiedAfter(Chain):
    """The last weight is a table, too: it stays."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.last[0])


@pytest.mark.parametrize("kind", [Chain, TiedAfter])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_cannot_be_packed_is_found_before_any_is_released(
    value: float, kind: type[Chain]
) -> None:
    model = kind().eval()
    with torch.no_grad():
        model.last[3, 5] = value
    before = copy.deepcopy(dict(model.named_parameters()))
    graphopt.optimize(model, quantize="int8", strict=True)
    with pytest.raises(WeightError, match=r"weight last \(64, 64\): it has values that are not finite"):
        model(rows())
    assert stand_ins(model) == set()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) or name == "last"
    with torch.no_grad():
        model.last[3, 5] = 0.5
    found = model(rows())
    assert stand_ins(model) == ({"first", "last"} if kind is Chain else {"first"})
    assert bool(found.isfinite().all())
