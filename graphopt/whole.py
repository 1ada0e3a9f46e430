"""Judge a whole program by running it beside the original: what its rewrites do together, and what none of
them did (canonicalisation, lowering, an edit without an id).

    original(*inputs) and what it writes   ==   ours(*inputs) and what it writes    by the accuracy rule
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx

from graphopt import aliasing, flops, torch_private
from graphopt import graph as g
from graphopt.accuracy import Verdict, judge, raise_to_fp64
from graphopt.autocast import within
from graphopt.capture import Captured
from graphopt.certificates import Certificates
from graphopt.ownership import is_stand_in
from graphopt.verification import CERTIFIED, NOT_JUDGED, RIGHT, WRONG, Whole
from graphopt.verify import LOWEST_FIRST, WIDE, Budget, certificate, devices_of, mib, said

Run: TypeAlias = Callable[..., object]
RESULTS = 5  # of fp64 size: the oracle's, and what comparing with it makes


class OriginalFails(Exception):
    """The original raises on these inputs, too: there is nothing to compare with."""


class _OutOfTime(Exception):
    """The time budget is used up."""


@dataclass(frozen=True)
class Beside:
    """Two programs that have to give the same.

    Attributes:
        captured: the program before any pass.
        original: what it was captured from.
        ours: what is judged.
        prepared: the bytes that `ours` makes of weights and would not hold beside them otherwise.
    """

    captured: Captured
    original: Run
    ours: Run
    prepared: int = 0


def verify_whole(
    programs: Beside,
    inputs: Sequence[object],
    certificates: Certificates,
    key: str,
    budget: Budget,
    until: float,
) -> Whole:
    """What a certificate says of the program, or else `judge_whole`; what is right gets a certificate."""
    if certificates.get(key, "graph") is not None:
        return Whole(CERTIFIED)
    verdict = judge_whole(programs, inputs, budget, until)
    if isinstance(verdict, str):
        return Whole(NOT_JUDGED, reason=verdict)
    numbers = verdict.where, verdict.rmse_ours, verdict.rmse_eager, verdict.limit
    if not verdict.ok:
        return Whole(WRONG, *numbers, verdict.reason or "")
    certificates.keep(key, {"graph": g.fingerprint(programs.captured.gm.graph), **certificate(verdict)})
    return Whole(RIGHT, *numbers)


def judge_whole(programs: Beside, inputs: Sequence[object], budget: Budget, until: float) -> Verdict | str:
    """The accuracy rule on a program's outputs and on the inputs that it writes, or why it cannot be asked.

    Nothing is written to the inputs, and the random state stays as it is. The captured graph is held against
    the original, too, from which it was made: a wrong capture has a wrong oracle.

    Args:
        inputs: values in placeholder order, weights included.
        until: when the time budget is used up, by `time.perf_counter`.

    Raises:
        OriginalFails: the captured program raises.
    """
    captured = programs.captured.gm
    written = _written(captured.graph)
    reason = _unfit(captured.graph, written, inputs, budget, programs.prepared)
    if reason is not None:
        return reason
    gm = _giving_what_it_writes(captured, written)
    names = [g.placeholders(gm.graph)[i].name for i in written]
    results = len(list(g.flat_arguments(g.output_node(captured.graph))))

    def apart(flat: tuple[object, ...]) -> dict[str, object]:
        """Outputs, and written inputs by name."""
        return {"outputs": flat[:results], "written": dict(zip(names, flat[results:], strict=True))}

    def run(program: Run) -> dict[str, object]:
        given = _copies(inputs, written)
        return apart((*_flat(program(*given)), *(given[i] for i in written)))

    devices = devices_of(inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        before = _random_state(devices)
        with within(None):
            try:
                eager = apart(_timed(gm, _copies(inputs, written), until))
            except _OutOfTime:
                return _out_of_time(budget)
            except Exception as error:
                raise OriginalFails(said(error)) from error
            if any(not torch.equal(x, y) for x, y in zip(before, _random_state(devices), strict=True)):
                return "it draws random numbers, which are others in fp64"
            try:
                late = [n for n in g.placeholders(gm.graph) if g.is_weight(n)]
                oracle = apart(_timed(raise_to_fp64(gm, late), inputs, until))
            except _OutOfTime:
                return _out_of_time(budget)
            except Exception as error:
                return f"the original has no form in fp64: {said(error)}"
        dtype = _lowest_dtype(gm.graph)
        try:
            mine, written_so = run(programs.ours), run(programs.original)
        except Exception as error:  # the run itself will say so
            return f"the program fails: {said(error)}"
        try:
            verdict, capture = judge(oracle, eager, mine, dtype), judge(oracle, eager, written_so, dtype)
        except (TypeError, ValueError) as error:
            return f"its results cannot be compared: {error}"
    if capture.ok:
        return verdict
    return dataclasses.replace(capture, reason=f"what was captured is another program: {capture.reason}")


# ------------------------------------------------------------------------------------------ what is judged


def _unfit(
    graph: fx.Graph, written: Sequence[int], inputs: Sequence[object], budget: Budget, prepared: int
) -> str | None:
    """Why a program cannot be run beside its original."""
    for node, value in zip(g.placeholders(graph), inputs, strict=True):
        if node.users and is_stand_in(value):
            name = ".".join(g.weight_names(node)[:1]) or node.name
            return f"weight {name} was released: the original cannot be run"
    tensors = {i: x.untyped_storage().data_ptr() for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)}
    memories = list(tensors.values())
    for i in written:
        if tensors[i] and memories.count(tensors[i]) > 1:
            name = g.placeholders(graph)[i].name
            return f"{name}, which it writes, shares its memory with another input"
    needed = bytes_needed(graph, written) + prepared
    if needed > budget.bytes:
        return f"it takes {mib(needed)} MiB, the memory budget is {mib(budget.bytes)} MiB"
    return None


def bytes_needed(graph: fx.Graph, written: Collection[int]) -> int:
    """The bytes that judging takes at most: the oracle's peak, copies of what is written, and results."""
    inputs = g.placeholders(graph)
    state = [inputs[i] for i in written]
    results = [n for n in g.flat_arguments(g.output_node(graph)) if isinstance(n, fx.Node)] + state
    return (
        _peak(graph)
        + 2 * sum(_wide(n) for n in state)
        + RESULTS * sum(WIDE * flops.elements(g.val(n)) for n in results)
    )


def _peak(graph: fx.Graph) -> int:
    """The most bytes that the graph holds at a time in fp64, each weight only while it is read."""
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    last: dict[fx.Node, int] = {}  # when a value, or a view of it, is read for the last time
    for node in reversed(nodes):
        last[node] = max((_read(node, user, order, last) for user in node.users), default=order[node])
    change = [0] * (len(nodes) + 1)
    for start, end, size in _lives(graph, order, last):
        change[start] += size
        change[end + 1] -= size
    held = most = 0
    for step in change:
        held += step
        most = max(most, held)
    return most


def _read(node: fx.Node, user: fx.Node, order: dict[fx.Node, int], last: dict[fx.Node, int]) -> int:
    """When a user of a value is done with it: a view when it is read for the last time itself."""
    return max(order[user], last[user]) if aliasing.viewed(user) is node else order[user]


def _lives(
    graph: fx.Graph, order: dict[fx.Node, int], last: dict[fx.Node, int]
) -> Iterator[tuple[int, int, int]]:
    """(from, to, bytes) of each value that is held."""
    for node in graph.nodes:
        size = _wide(node)
        if g.is_weight(node):  # raised anew for each user
            yield from ((order[user], _read(node, user, order, last), size) for user in node.users)
        elif node.op == "placeholder":
            yield 0, len(order) - 1, size
        elif node.op == "call_function" and aliasing.viewed(node) is None:
            yield order[node], last[node], size


def _wide(node: fx.Node) -> int:
    """The bytes of a value in fp64; of one that has no floats, as it is."""
    value = g.val(node)
    if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
        return flops.elements(value) * value.element_size()
    return WIDE * flops.elements(value)


def _lowest_dtype(graph: fx.Graph) -> torch.dtype:
    """The dtype that decides how exact a program can be: the lowest that it computes in."""
    found = {v.dtype for n in graph.nodes if (v := g.tensor(n)) is not None and v.dtype in LOWEST_FIRST}
    return next((dtype for dtype in LOWEST_FIRST if dtype in found), torch.float32)


def _out_of_time(budget: Budget) -> str:
    return f"the time budget of {budget.seconds:g} s is used up"


# ------------------------------------------------------------------------------------------------- running


def _written(graph: fx.Graph) -> list[int]:
    """The places of the inputs that a graph writes."""
    written = aliasing.written_inputs(graph)
    return [i for i, node in enumerate(g.placeholders(graph)) if node in written]


def _giving_what_it_writes(gm: fx.GraphModule, written: Sequence[int]) -> fx.GraphModule:
    """return a, b  ->  return a, b, cache: inputs that are written are results, too."""
    graph = g.copy_graph(gm.graph)
    inputs, output = g.placeholders(graph), g.output_node(graph)
    results: list[g.Argument] = [*g.flat_arguments(output), *(inputs[i] for i in written)]  # type: ignore[list-item]  # an output's
    output.args = (tuple(results),)
    return torch_private.lazy_module(gm, graph)


def _copies(inputs: Sequence[object], written: Sequence[int]) -> list[object]:
    """The inputs; what is written is a copy in its layout. Weights are themselves: forms are kept of them."""
    given = list(inputs)
    for i in written:
        x = given[i]
        assert isinstance(x, torch.Tensor)
        given[i] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    return given


def _timed(gm: fx.GraphModule, inputs: Sequence[object], until: float) -> tuple[object, ...]:
    return _flat(_Timed(gm, until).run(*inputs))


def _flat(outputs: object) -> tuple[object, ...]:
    assert isinstance(outputs, (tuple, list)), "a graph behind the door gives its outputs in one"
    return tuple(outputs)


class _Timed(fx.Interpreter):
    """Runs a graph call by call, as long as there is time; a value goes after its last use."""

    def __init__(self, gm: fx.GraphModule, until: float) -> None:
        super().__init__(gm)
        self.until = until
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> object:
        """As `fx.Interpreter`."""
        if time.perf_counter() > self.until:
            raise _OutOfTime
        return super().run_node(n)


def _random_state(devices: Sequence[int]) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
