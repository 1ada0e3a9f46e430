"""Replay from CUDA graphs, with a stand-in for CUDA: what is kept, copied, looked up again, and given up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops, torch_private
from graphopt.lowering.fold import fold
from graphopt.lowering.replay import MOST, Replay, Values, replayable, roles
from graphopt.weights import WeightStore
from tests.graphs import Builder

aten = torch.ops.aten


class Recorded:
    """Behaves as a CUDA graph does: capturing changes nothing, replaying reads and writes fixed addresses."""

    def __init__(self, state: Sequence[torch.Tensor] = (), pause: float = 0.0) -> None:
        self.state = state  # what the program writes
        self.pause = pause  # seconds from a replay's launch to its work
        self.captures = 0
        self.replays = 0
        self.current: int | None = 0

    def stream(self) -> int | None:
        return self.current

    def capture(self, run: Callable[[], Values]) -> tuple[Callable[[], None], Values]:
        self.captures += 1
        before = [t.clone() for t in self.state]
        results = run()
        for tensor, value in zip(self.state, before, strict=True):
            tensor.copy_(value)

        def replay() -> None:
            self.replays += 1
            time.sleep(self.pause)
            with torch.inference_mode():  # CUDA knows no modes
                for result, new in zip(results, run(), strict=True):
                    if result is not new:
                        result.copy_(new)  # type: ignore[attr-defined]  # a tensor

        return replay, results


def program(store: WeightStore | None = None) -> fx.GraphModule:
    """x, cache -> (2 * linear(x, cat([w, w])), the cache after += 1, the cache itself)."""
    build = Builder()
    x, cache = build.input("x", 2, 3), build.input("cache", 4)
    w = build.weight("w", 5, 3)
    y = build.call(ops.linear.overload, x, build.call(aten.cat.default, [w, w], 0), None)
    advanced = build.call(aten.add_.Tensor, cache, 1)
    gm = build.done(build.call(aten.mul.Tensor, y, 2), advanced, cache)
    if store is not None:
        fold(gm, store)
    gm.recompile()
    return gm


def arguments(gm: fx.GraphModule, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [g.shape(n) for n in g.placeholders(gm.graph)]
    return [torch.randint(-4, 5, s, generator=generator).float() for s in shapes]  # sums are exact


def test_roles_are_read_off_the_graph() -> None:
    found = roles(program().graph)
    assert (found.kept, found.copied, found.returned) == ((1, 2), (0,), (None, None, 1))


def test_a_replayed_program_gives_what_the_plain_one_does() -> None:
    gm = program(WeightStore())
    x, cache, w = arguments(gm)
    ours, theirs = cache.clone(), cache.clone()
    graphs = Recorded([ours])
    replay = Replay(gm, roles(gm.graph), graphs)
    for step in range(5):
        given = x + step
        found = replay(given, ours, w)
        expected = gm(given, theirs, w)
        for one, other in zip(found, expected, strict=True):  # type: ignore[call-overload]  # a tuple
            assert torch.equal(one, other)
        assert found[2] is ours and torch.equal(ours, cache + step + 1)  # type: ignore[index]
    assert (graphs.captures, graphs.replays) == (1, 4), "plain, then captured, then replayed"


def test_a_result_is_not_overwritten_by_the_next_call() -> None:
    gm = program(WeightStore())
    x, cache, w = arguments(gm)
    replay = Replay(gm, roles(gm.graph), Recorded([cache]))
    results = [replay(x * step, cache, w)[0] for step in range(4)]  # type: ignore[index]  # a tuple
    kept = [r.clone() for r in results]
    replay(x * 9, cache, w)
    assert all(torch.equal(a, b) for a, b in zip(results, kept, strict=True))


def test_a_result_in_the_callers_memory_stays_there() -> None:
    gm = program(WeightStore())
    x, cache, w = arguments(gm)
    replay = Replay(gm, roles(gm.graph), Recorded([cache]))
    for _ in range(3):
        found = replay(x, cache, w)
    assert found[1].data_ptr() == cache.data_ptr()  # type: ignore[index]  # as an eager `cache.add_(1)` has it


def test_changed_weights_are_prepared_and_captured_anew() -> None:
    gm = program(WeightStore())
    x, cache, w = arguments(gm)
    graphs = Recorded([cache])
    replay = Replay(gm, roles(gm.graph), graphs)
    for _ in range(3):
        replay(x, cache, w)
    w.mul_(3)
    for _ in range(3):
        found = replay(x, cache, w)
        assert torch.allclose(found[0], 2 * x @ torch.cat((w, w)).T)  # type: ignore[index]  # a tuple
    assert graphs.captures == 2


def test_other_caches_have_graphs_of_their_own_up_to_a_bound() -> None:
    gm = program(WeightStore())
    x, cache, w = arguments(gm)
    caches = [cache.clone() for _ in range(MOST + 1)]
    graphs = Recorded(caches)
    replay = Replay(gm, roles(gm.graph), graphs)
    for turn in range(3):
        for one in caches[:2]:
            replay(x, one, w)
            assert torch.equal(one, cache + turn + 1)
    assert graphs.captures == 2
    for turn in range(3):
        for one in caches[2:]:
            replay(x, one, w)
            assert torch.equal(one, cache + turn + 1)
    assert len(replay._seen) == MOST


def test_a_failed_capture_warns_once_and_runs_plainly() -> None:
    class Broken(Recorded):
        def capture(self, run: Callable[[], Values]) -> tuple[Callable[[], None], Values]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    gm = program(WeightStore())
    x, cache, w = arguments(gm)
    before = cache.clone()
    replay = Replay(gm, roles(gm.graph), Broken())
    replay(x, cache, w)
    with pytest.warns(UserWarning, match="no CUDA graph could be captured .RuntimeError: operation not perm"):
        replay(x, cache, w)
    replay(x, cache, w)
    assert torch.equal(cache, before + 3) and replay.failed is not None


def doubled(*shape: int) -> Replay:
    """x -> (2 * x, x), replayed."""
    build = Builder()
    x = build.input("x", *shape)
    gm = build.done(build.call(aten.mul.Tensor, x, 2), x)
    return Replay(gm, roles(gm.graph), Recorded())


@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (1, 1)], ids=str)
def test_an_expanded_input_is_copied_once(shape: tuple[int, int]) -> None:
    replay = doubled(4, 3)
    for step in range(4):
        given = torch.randn(shape).add(step).expand(4, 3)
        two, same = replay(given)  # type: ignore[misc]  # a tuple
        assert torch.equal(two, 2 * given) and same is given
    assert replay.failed is None and replay.graphs.replays == 3  # type: ignore[attr-defined]  # a Recorded


def test_the_first_run_is_on_buffers_as_those_that_are_captured() -> None:
    """Kernels are compiled for the alignment of what they read, and a capture must compile nothing."""
    seen: list[int] = []
    replay = doubled(4)
    run = replay.run
    replay.run = lambda x: seen.append(x.data_ptr() % 16) or run(x)  # type: ignore[func-returns-value]  # a list's
    for _ in range(2):
        given = torch.arange(5.0)[1:]
        assert given.data_ptr() % 16 == 4
        two, same = replay(given)  # type: ignore[misc]  # a tuple
        assert torch.equal(two, 2 * given) and same is given
    assert set(seen) == {0}


def test_threads_do_not_overwrite_each_others_inputs() -> None:
    replay = doubled(4)
    replay.graphs.pause = 0.002  # type: ignore[attr-defined]  # a Recorded
    inputs = [torch.full((4,), float(i)) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(replay, inputs * 4))
    for given, (two, _) in zip(inputs * 4, found, strict=True):  # type: ignore[misc]  # tuples
        assert torch.equal(two, 2 * given)


def test_each_stream_has_a_graph_of_its_own_and_none_is_made_inside_another() -> None:
    replay = doubled(4)
    graphs, x = replay.graphs, torch.ones(4)
    assert isinstance(graphs, Recorded)
    for stream in (0, 1):
        graphs.current = stream
        for _ in range(3):
            replay(x)
    assert (graphs.captures, graphs.replays) == (2, 4)
    graphs.current = None
    two, same = replay(x)  # type: ignore[misc]  # a tuple
    assert torch.equal(two, 2 * x) and same is x and graphs.replays == 4


def test_buffers_made_under_inference_mode_serve_outside_of_it() -> None:
    replay, x = doubled(4), torch.ones(4)
    with torch.inference_mode():
        for _ in range(2):
            replay(x)
    with torch.no_grad():
        two, _ = replay(3 * x)  # type: ignore[misc]  # a tuple
    assert torch.equal(two, 6 * x)


def test_what_cannot_be_replayed_says_why() -> None:
    assert replayable(program().graph) == "input x is on the CPU"
    build = Builder()
    x = build.input("x", 2, 3)
    gm = build.done(build.call(aten.rand_like.default, x))
    x.meta["val"] = torch.empty(2, 3, device="meta")
    assert replayable(gm.graph) == "rand_like_default is random"


def test_devices_decide_what_is_replayed() -> None:
    gm = program(WeightStore())
    x, cache, w = g.placeholders(gm.graph)
    with torch_private.new_fake_mode():
        for node in (x, cache):
            g.set_val(node, torch.empty(g.shape(node), device="cuda:0"))
        assert replayable(gm.graph) is None, "a weight on the CPU that is only prepared"
        with gm.graph.inserting_before(g.output_node(gm.graph)):
            gm.graph.call_function(aten.mul.Tensor, (x, w))
        assert replayable(gm.graph) == "weight w is on the CPU"
        g.set_val(w, torch.empty(g.shape(w), device="cuda:1"))
    assert replayable(gm.graph) == "inputs are on cuda:0 and cuda:1"
