"""Replay a lowered program from a CUDA graph: one launch from the host for all kernels of a step.

A CUDA graph reads and writes the addresses that it was captured with. Weights and whatever the program
writes (caches) are addresses of the caller's: part of the key. Other inputs are copied into buffers of the
graph's own, and results that lie in the graph's memory are copied out, because the next replay overwrites
them. Source: torch.cuda.CUDAGraph; `torch.cuda.make_graphed_callables`.
"""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import fx

from graphopt import graph as g
from graphopt.aliasing import written_inputs
from graphopt.weights import Prepared, prepared_weights

log = logging.getLogger(__name__)

Values: TypeAlias = "tuple[object, ...]"
Run: TypeAlias = "Callable[..., object]"
MOST = 8  # graphs kept of one program: a server may alternate between a few sets of caches


class Graphs(Protocol):
    """How a run is captured: by CUDA, or by what a test puts in its place."""

    def stream(self) -> int | None:
        """The stream that would replay now; None while it records: the run is to become a part of that."""
        ...

    def capture(self, run: Callable[[], Values]) -> tuple[Callable[[], None], Values]:
        """Record a run without doing it: what replays it, and where its results will lie."""
        ...


@dataclass(frozen=True)
class CudaGraphs:
    """CUDA's own, on one device. Graphs of one stream share a pool of memory, as they never run at once."""

    device: torch.device

    def stream(self) -> int | None:
        """As `Graphs.stream`."""
        if torch.cuda.is_current_stream_capturing():
            return None
        return torch.cuda.current_stream(self.device).cuda_stream

    def capture(self, run: Callable[[], Values]) -> tuple[Callable[[], None], Values]:
        """As `Graphs.capture`. The run must have been made once before: kernels are compiled and loaded."""
        with torch.cuda.device(self.device):  # whose stream records
            pool = _pool(self.device, torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                results = run()
        return functools.partial(_replay, graph, self.device), results


def _replay(graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
    with torch.cuda.device(device):  # on whose current stream it runs
        graph.replay()


_pool = functools.cache(lambda device, stream: torch.cuda.graph_pool_handle())

# From the copies in to the copies out: another thread's replay on this stream would overwrite both.
_one_at_a_time = threading.RLock()


@dataclass(frozen=True)
class Roles:
    """What becomes of each placeholder of a graph.

    Attributes:
        kept: its address is part of the graph's key: weights, and what the program writes.
        copied: copied into the graph's own buffer before each replay.
        returned: for each output, the placeholder that it is, or None.
    """

    kept: tuple[int, ...]
    copied: tuple[int, ...]
    returned: tuple[int | None, ...]


def replayable(graph: fx.Graph) -> str | None:
    """Why a program cannot be replayed; None where it can. Look before kernels are chosen: by schemas."""
    for node in graph.nodes:
        if node.op == "placeholder":
            value = g.val(node)
            if not isinstance(value, torch.Tensor):
                return f"input {node.name} is {type(value).__name__}, not a tensor"
            if value.device.type == "cpu" and not _only_prepared(node):
                return f"{'weight' if g.is_weight(node) else 'input'} {node.name} is on the CPU"
        if g.is_tensor(node) and not all(isinstance(size, int) for size in g.shape(node)):
            return f"{node.name} has the symbolic shape {tuple(g.shape(node))}"
        if node.op == "call_function" and g.is_random(node.target):
            return f"{node.name} is random"
    if len(devices := _devices(graph)) > 1:
        return f"inputs are on {' and '.join(map(str, devices))}"
    return None


def _only_prepared(node: fx.Node) -> bool:
    """Whether an input is a weight that is not read itself: a graph would keep a number read from the CPU."""
    return g.is_weight(node) and all(user.target is prepared_weights for user in node.users)


def _devices(graph: fx.Graph) -> list[torch.device]:
    """Where the inputs are, but for the CPU."""
    found = dict.fromkeys(g.device(n) for n in g.placeholders(graph) if g.is_tensor(n))
    return [device for device in found if device.type != "cpu"]


def roles(graph: fx.Graph) -> Roles:
    """Who keeps an address and who is copied. Look before kernels are chosen: by schemas."""
    inputs = g.placeholders(graph)
    written = written_inputs(graph)
    kept = {i for i, n in enumerate(inputs) if n in written or g.is_weight(n)}
    place = {n: i for i, n in enumerate(inputs)}
    returned = tuple(
        place.get(v) if isinstance(v, fx.Node) else None for v in g.flat_arguments(g.output_node(graph))
    )
    copied = tuple(i for i in range(len(inputs)) if i not in kept)
    return Roles(tuple(sorted(kept)), copied, returned)


@dataclass(frozen=True, eq=False)
class _Recording:
    """One captured graph."""

    replay: Callable[[], None]
    buffers: tuple[torch.Tensor, ...]  # of the copied inputs, in the order of `Roles.copied`
    results: Values
    lasting: tuple[bool, ...]  # whether a result lies in memory of the caller's: it needs no copy
    prepared: Values  # keeps the weights that the graph reads alive


class Replay:
    """Runs a program on flat values: plainly the first time, captured the second, replayed from then on.

    Each stream has graphs of its own. Where a capture fails, the program runs plainly from then on, with one
    warning.

    Args:
        gm: the lowered graph module; its first calls may be a `prepared_weights`, made at each call.
        roles: of its placeholders.
        graphs: what captures.
    """

    def __init__(self, gm: fx.GraphModule, roles: Roles, graphs: Graphs | None = None) -> None:
        self.run: Run = gm.forward
        self.roles = roles
        self.graphs = graphs or CudaGraphs(_devices(gm.graph)[0])
        self.failed: str | None = None
        self._prepared = _lookup(gm)
        self._seen: OrderedDict[tuple[int, ...], _Recording | None] = OrderedDict()

    def __call__(self, *args: object) -> object:
        """Run on values in placeholder order."""
        stream = self.graphs.stream() if self.failed is None else None
        if stream is None:
            return self.run(*args)
        prepared = self._prepared(args)
        key = (stream, *(args[i].data_ptr() for i in self.roles.kept), *map(id, prepared))  # type: ignore[attr-defined]
        if self._is_new(key):
            # Kernels are compiled, and what allocates once does: for buffers, whose alignment may be another.
            return self._own(self.run(*self._held(args)), args)
        with _one_at_a_time:
            recording = self._seen.get(key)
            if recording is None:
                try:
                    recording = self._seen[key] = self._record(args, prepared)
                except Exception as error:
                    return self._give_up(args, error)
            for buffer, i in zip(recording.buffers, self.roles.copied, strict=True):
                _copy(buffer, args[i])  # type: ignore[arg-type]  # a tensor, by `replayable`
            recording.replay()
            return self._results(recording, args)

    def _is_new(self, key: tuple[int, ...]) -> bool:
        """Whether these addresses were not seen before, or are forgotten; from now on they are the latest."""
        with _one_at_a_time:
            new = key not in self._seen
            self._seen.setdefault(key, None)
            self._seen.move_to_end(key)
            if len(self._seen) > MOST:
                self._seen.popitem(last=False)
        return new

    def _held(self, args: Values) -> list[object]:
        """The values with buffers in the place of what is copied."""
        held = list(args)
        with torch.inference_mode(False), torch.no_grad():  # the next call may be in another mode
            for i in self.roles.copied:
                held[i] = _buffer(args[i])  # type: ignore[arg-type]  # a tensor, by `replayable`
        return held

    def _record(self, args: Values, prepared: Values) -> _Recording:
        """Capture a run on these addresses."""
        held = self._held(args)
        replay, results = self.graphs.capture(lambda: tuple(self.run(*held)))  # type: ignore[arg-type]  # flat outputs
        theirs = {_storage(args[i]) for i in self.roles.kept} | {_storage(p) for p in prepared}
        lasting = tuple(not isinstance(r, torch.Tensor) or _storage(r) in theirs for r in results)
        buffers = tuple(held[i] for i in self.roles.copied)
        return _Recording(replay, buffers, results, lasting, prepared)  # type: ignore[arg-type]  # tensors

    def _own(self, results: object, args: Values) -> Values:
        """Results, with the caller's own tensors for the buffers that are returned."""
        found = zip(results, self.roles.returned, strict=True)  # type: ignore[call-overload]  # flat outputs
        return tuple(result if at is None else args[at] for result, at in found)

    def _results(self, recording: _Recording, args: Values) -> Values:
        found = zip(recording.results, recording.lasting, strict=True)
        return self._own([r if lasting else r.clone() for r, lasting in found], args)  # type: ignore[attr-defined]  # tensors

    def _give_up(self, args: Values, error: Exception) -> object:
        self.failed = f"{type(error).__name__}: {error}".splitlines()[0]
        log.debug("capture failed", exc_info=error)
        warnings.warn(
            f"graphopt launches kernels one by one: no CUDA graph could be captured ({self.failed})",
            stacklevel=3,
        )
        return self.run(*args)


def _buffer(x: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides: the layout that kernels were chosen for."""
    made = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
    _copy(made, x)
    return made


def _copy(buffer: torch.Tensor, x: torch.Tensor) -> None:
    """buffer = x; what an expanded tensor repeats is copied once, as torch writes to no memory twice."""
    if 0 in buffer.stride():
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in buffer.stride())
        buffer, x = buffer[once], x[once]
    buffer.copy_(x)


def _storage(value: object) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else None


def _lookup(gm: fx.GraphModule) -> Callable[[Values], Values]:
    """From a call's values to its prepared weights, which a replay must look up again: they may be new."""
    call = next((n for n in gm.graph.nodes if n.target is prepared_weights), None)
    if call is None:
        return lambda args: ()
    handle, *sources = call.args
    assert isinstance(handle, fx.Node)
    prepared = getattr(gm, str(handle.target))
    assert isinstance(prepared, Prepared)
    place = {n: i for i, n in enumerate(g.placeholders(gm.graph))}
    at: Sequence[int] = [place[s] for s in sources]
    return lambda args: prepared.forward(*(args[i] for i in at))  # type: ignore[arg-type]  # tensors
