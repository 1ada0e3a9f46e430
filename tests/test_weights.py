"""The WeightStore: prepared once, again when changed, dropped when a source dies."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time

import pytest
import torch
from torch import fx

from graphopt.errors import WeightError
from graphopt.torch_private import new_fake_mode
from graphopt.weights import Prepared, PreparePlan, WeightStore, prepared_weights
from tests.listening import Listener
from tests.threads import in_threads

aten = torch.ops.aten


def plan(hash: str = "cat", target: object = aten.cat.default, count: int = 2) -> PreparePlan:
    """cat([w0, w1, ...]), or target(w0)."""
    graph = fx.Graph()
    weights = [graph.placeholder(f"w{i}") for i in range(count)]
    arguments = (weights, 0) if target is aten.cat.default else (weights[0],)
    graph.output(graph.call_function(target, arguments))  # type: ignore[arg-type]  # an operator
    names = tuple(f"layer.w{i}" for i in range(count))
    return PreparePlan(fx.GraphModule(torch.nn.Module(), graph), hash, tuple(range(count)), names)


CAT = plan()
TRANSPOSE = plan("t", aten.t.default, 1)


def weights(count: int = 2, size: int = 4) -> tuple[torch.nn.Parameter, ...]:
    return tuple(torch.nn.Parameter(torch.randn(size, 3), requires_grad=False) for _ in range(count))


def prepared_for(store: WeightStore, plans: tuple[PreparePlan, ...] = (CAT,)) -> Prepared:
    return Prepared(store, plans, tuple(p.sources for p in plans))


def check(prepared: Prepared, sources: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(
        prepared(*sources)[0], torch.cat([s.detach() for s in sources]), rtol=0, atol=0
    )


@pytest.fixture
def store() -> WeightStore:
    return WeightStore()


def test_weights_are_prepared_once(store: WeightStore) -> None:
    prepared, sources = prepared_for(store), weights()
    first = prepared(*sources)[0]
    check(prepared, sources)
    assert prepared(*sources)[0] is first and prepared_weights(prepared, *sources)[0] is first
    assert store.prepared == 1 and len(store) == 1 and store.bytes == 8 * 3 * 4


def test_a_change_in_place_shows_in_the_next_call(store: WeightStore) -> None:
    prepared, sources = prepared_for(store), weights()
    check(prepared, sources)
    sources[1].mul_(3)
    check(prepared, sources)
    check(prepared, sources)
    assert store.prepared == 2 and len(store) == 1


def test_a_change_under_inference_mode_shows(store: WeightStore) -> None:
    prepared, sources = prepared_for(store), weights()
    check(prepared, sources)
    with torch.inference_mode():
        sources[0].add_(1)
        check(prepared, sources)
    check(prepared, sources)
    assert store.prepared == 2 and not prepared(*sources)[0].is_inference()


def test_a_replaced_parameter_and_a_loaded_state_show(store: WeightStore) -> None:
    prepared = prepared_for(store)
    module = torch.nn.ParameterList(weights())
    check(prepared, tuple(module))
    module[0] = torch.nn.Parameter(torch.zeros(4, 3))
    gc.collect()
    check(prepared, tuple(module))
    assert len(store) == 1, "the replaced parameter is dead, and what was made of it"
    module.load_state_dict({"0": torch.ones(4, 3), "1": torch.ones(4, 3)})
    check(prepared, tuple(module))
    assert store.prepared == 3


def test_data_swapped_through_data_shows_by_its_pointer(store: WeightStore) -> None:
    prepared, sources = prepared_for(store), weights()
    check(prepared, sources)
    sources[0].data = torch.zeros(4, 3)
    check(prepared, sources)


def test_a_write_through_data_needs_refresh(store: WeightStore) -> None:
    prepared, sources = prepared_for(store), weights()
    before = prepared(*sources)[0].clone()
    sources[0].data.mul_(2)
    assert torch.equal(prepared(*sources)[0], before), "it leaves no trace; if it does now, drop refresh"
    store.refresh()
    assert len(store) == 0 and store.bytes == 0
    check(prepared, sources)


def test_refresh_of_some_weights_leaves_the_others(store: WeightStore) -> None:
    prepared, mine, others = prepared_for(store), weights(), weights()
    prepared(*mine)
    kept = prepared(*others)[0]
    mine[0].data.mul_(2)
    store.refresh(mine)
    check(prepared, mine)
    assert prepared(*others)[0] is kept and store.prepared == 3


def test_two_weight_sets_alternate_and_each_is_prepared_once(store: WeightStore) -> None:
    prepared, sets = prepared_for(store), [weights() for _ in range(3)]
    for sources in sets * 4:
        check(prepared, sources)
    assert store.prepared == 3 and len(store) == 3


def test_two_graphs_share_what_is_equal(store: WeightStore) -> None:
    prefill, decode, sources = prepared_for(store), prepared_for(store, (plan(),)), weights()
    assert prefill(*sources)[0] is decode(*sources)[0]
    other = prepared_for(store, (plan("another"),))
    assert other(*sources)[0] is not decode(*sources)[0]
    assert store.prepared == 2


def test_what_was_made_of_an_older_state_is_dropped(store: WeightStore) -> None:
    """After `model.to(dtype)` other plans prepare the same tensors: the old results go."""
    (w,) = weights(1)
    first, second = (
        prepared_for(store, (TRANSPOSE,)),
        prepared_for(store, (plan("exp", aten.exp.default, 1),)),
    )
    first(w)
    second(w)
    assert len(store) == 2
    w.data = w.data.double()
    assert second(w)[0].dtype == torch.float64
    assert len(store) == 1 and torch.equal(first(w)[0], w.t()) and len(store) == 2


def test_a_dead_source_takes_its_entries_along(store: WeightStore) -> None:
    prepared, kept, (first, second) = prepared_for(store), weights(), weights()
    check(prepared, kept)
    check(prepared, (first, second))
    assert len(store) == 2
    del first
    gc.collect()
    assert len(store) == 1
    check(prepared, kept)
    assert store.prepared == 2, "the others are still there"


def test_a_view_does_not_keep_its_source_alive(store: WeightStore) -> None:
    prepared, (source,) = prepared_for(store, (TRANSPOSE,)), weights(1)
    view = prepared(source)[0]
    assert view.data_ptr() == source.data_ptr() and store.bytes == 0
    source.mul_(2)  # seen through the memory, and made again by its version
    assert torch.equal(prepared(source)[0], source.T)
    del source, view
    gc.collect()
    assert len(store) == 0


def test_a_dead_graph_leaves_no_fast_path(store: WeightStore) -> None:
    prepared = prepared_for(store)
    check(prepared, weights())
    del prepared
    gc.collect()
    assert not store._bound


def test_a_new_tensor_at_a_dead_ones_address_is_prepared_anew(store: WeightStore) -> None:
    prepared = prepared_for(store)
    for _ in range(20):  # Python reuses the ids at once
        check(prepared, weights())
    assert store.prepared == 20


def test_inference_tensors_are_prepared_at_each_call_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    listener = Listener()
    store = WeightStore(observers=(listener,))
    prepared = prepared_for(store)
    with torch.inference_mode():
        sources = (torch.randn(4, 3), torch.randn(4, 3))
        check(prepared, sources)
        sources[0].mul_(2)
        check(prepared, sources)
    check(prepared, sources)
    assert store.prepared == 3 and len(store) == 0
    assert len(listener.events) == len(listener.warnings) == len(caplog.messages) == 1
    assert "layer.w0 was made under torch.inference_mode" in listener.warnings[0]


def test_fake_and_meta_weights_work(store: WeightStore) -> None:
    prepared, mode = prepared_for(store), new_fake_mode()
    fakes = tuple(mode.from_tensor(w) for w in weights())
    with mode:
        assert prepared(*fakes)[0].shape == (8, 3)
    assert len(store) == 0
    meta = tuple(torch.nn.Parameter(torch.empty(4, 3, device="meta")) for _ in range(2))
    assert prepared(*meta)[0].is_meta


def test_preparing_ignores_autocast_and_gradients(store: WeightStore) -> None:
    graph = fx.Graph()
    w = graph.placeholder("w")
    graph.output(graph.call_function(aten.mm.default, (w, w)))
    product = PreparePlan(fx.GraphModule(torch.nn.Module(), graph), "mm", (0,), ("w",))
    source = torch.nn.Parameter(torch.randn(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        value = prepared_for(store, (product,))(source)[0]
    assert value.dtype == torch.float32 and not value.requires_grad


def test_what_cannot_be_prepared_says_so(store: WeightStore) -> None:
    with pytest.raises(
        WeightError, match=r"cannot prepare a weight from layer.w0 \(4, 3\), layer.w1 \(4, 2\)"
    ):
        prepared_for(store)(torch.randn(4, 3), torch.randn(4, 2))


def test_threads_prepare_once() -> None:
    store, sources = WeightStore(), weights()
    graph = fx.Graph()
    w = graph.placeholder("w")
    graph.output(graph.call_function(slow_copy, (w,)))
    prepared = prepared_for(
        store, (PreparePlan(fx.GraphModule(torch.nn.Module(), graph), "slow", (0,), ("w",)),)
    )
    found: list[torch.Tensor] = []
    in_threads(*[lambda: found.append(prepared(sources[0])[0])] * 6)
    assert store.prepared == 1 and len({id(t) for t in found}) == 1


def slow_copy(x: torch.Tensor) -> torch.Tensor:
    copied = x.clone()
    time.sleep(0.05)
    return copied


def test_a_refresh_during_a_call_is_not_lost(store: WeightStore) -> None:
    (source,) = weights(1)
    graph = fx.Graph()
    w = graph.placeholder("w")
    graph.output(graph.call_function(slow_copy, (w,)))
    prepared = prepared_for(
        store, (PreparePlan(fx.GraphModule(torch.nn.Module(), graph), "slow", (0,), ("w",)),)
    )
    thread = threading.Thread(target=lambda: prepared(source))
    thread.start()
    time.sleep(0.02)
    source.data.zero_()
    store.refresh()
    thread.join()
    assert torch.equal(prepared(source)[0], source) and not source.any()


def test_copies_share_the_store_and_pickles_start_anew(store: WeightStore) -> None:
    prepared, sources = prepared_for(store), weights()
    check(prepared, sources)
    twin = copy.deepcopy(prepared)
    assert twin.store is store and twin(*sources)[0] is prepared(*sources)[0]
    stored = pickle.loads(pickle.dumps(prepared))
    check(stored, sources)
    assert stored.store is not store and store.prepared == 1


def test_unchanged_weights_are_not_looked_up_again(
    store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 weights cost a few comparisons a call (36 us measured on an idle machine), no look-up each."""
    plans = tuple(PreparePlan(CAT.gm, f"cat{i}", (2 * i, 2 * i + 1), ("a", "b")) for i in range(150))
    prepared, sources = prepared_for(store, plans), weights(300)
    first = prepared(*sources)
    monkeypatch.setattr(store, "get", lambda *_: pytest.fail("an unchanged weight was looked up"))
    assert prepared_weights(prepared, *sources) is first
    assert store.prepared == 150
