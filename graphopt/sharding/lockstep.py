"""Run the graphs of several ranks in one process, in step: at each collective they meet and exchange.

The proof that a sharded graph is right needs no second process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import fx

from graphopt import ops
from graphopt.errors import ShardError

Meeting: TypeAlias = "tuple[str, tuple[Any, ...]]"  # a collective's name, and what a rank brings
Run: TypeAlias = "Generator[Meeting, object, object]"


def lockstep(graphs: Sequence[fx.GraphModule], args: Sequence[Sequence[object]]) -> list[object]:
    """The outputs of all ranks' graphs, rank after rank.

    Args:
        graphs: one a rank, in order; before or after lowering (without a mesh).
        args: the values of each rank's placeholders. A tensor that a graph writes must be the rank's own.

    Raises:
        ShardError: ranks that meet at different collectives, or of which one is done while another waits.
    """
    runs = [_run(gm, values) for gm, values in zip(graphs, args, strict=True)]
    outputs: list[object] = [None] * len(runs)
    answers: list[object] = [None] * len(runs)
    while True:
        calls: list[Meeting | None] = []
        for rank, run in enumerate(runs):
            try:
                calls.append(run.send(answers[rank]))
            except StopIteration as done:
                outputs[rank] = done.value
                calls.append(None)
        if not any(calls):
            return outputs
        answers = list(_exchanged(calls))


def _run(gm: fx.GraphModule, args: Sequence[object]) -> Run:
    """A graph, node by node; at a collective it hands out what it brings, and is sent what it gets."""
    values: dict[fx.Node, Any] = {}
    given = iter(args)
    last = {n: user for user in gm.graph.nodes for n in user.all_input_nodes}
    interpreter = fx.Interpreter(gm)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
            continue
        if node.op == "output":
            return fx.node.map_arg(node.args[0], values.__getitem__)
        call_args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        name = COLLECTIVES.get(node.target)
        if name is not None:
            values[node] = yield name, _bound(node, call_args, kwargs)
        else:
            values[node] = getattr(interpreter, node.op)(node.target, call_args, kwargs)
        for read in node.all_input_nodes:
            if last[read] is node and read.op != "placeholder":
                del values[read]
    return None


def _bound(node: fx.Node, args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[object, ...]:
    """A collective's arguments in order, defaults included."""
    schema = OVERLOADS[COLLECTIVES[node.target]]._schema.arguments
    return tuple(
        args[i] if i < len(args) else kwargs.get(a.name, a.default_value) for i, a in enumerate(schema)
    )


def _exchanged(calls: Sequence[Meeting | None]) -> Sequence[object]:
    """What each rank gets for what all have brought."""
    met = {None if call is None else (call[0], call[1][1:]) for call in calls}
    if len(met) != 1:
        shown = ", ".join(f"rank {r}: {'done' if c is None else c[0]}" for r, c in enumerate(calls))
        raise ShardError(f"the ranks do not meet at one collective ({shown}); their graphs differ")
    ((name, rest),) = (m for m in met if m is not None)
    tensors = [call[1][0] for call in calls if call is not None]
    return EXCHANGES[name](tensors, *rest)


def _all_reduce(xs: Sequence[torch.Tensor], axis: str, reduction: str) -> Sequence[torch.Tensor]:
    whole = _reduced(xs, reduction)
    return [whole.clone() for _ in xs]


def _all_gather(xs: Sequence[torch.Tensor], axis: str, dim: int) -> Sequence[torch.Tensor]:
    return [torch.cat(list(xs), dim) for _ in xs]


def _reduce_scatter(
    xs: Sequence[torch.Tensor], axis: str, dim: int, reduction: str
) -> Sequence[torch.Tensor]:
    return [part.clone() for part in _reduced(xs, reduction).chunk(len(xs), dim)]


def _reduced(xs: Sequence[torch.Tensor], reduction: str) -> torch.Tensor:
    """All ranks' values in one, in the order of ranks."""
    if reduction == "avg":
        return reduce(REDUCTIONS["sum"], xs) / len(xs)
    return reduce(REDUCTIONS[reduction], xs)


REDUCTIONS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}
EXCHANGES: Mapping[str, Callable[..., Sequence[torch.Tensor]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
}
OVERLOADS = {op.__name__: op.overload for op in (ops.all_reduce, ops.all_gather, ops.reduce_scatter)}
COLLECTIVES: Mapping[object, str] = {
    **{op.overload: op.__name__ for op in (ops.all_reduce, ops.all_gather, ops.reduce_scatter)},
    **{op.reference: op.__name__ for op in (ops.all_reduce, ops.all_gather, ops.reduce_scatter)},  # lowered
}
