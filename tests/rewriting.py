"""Run rules on a program's canonical graph, hear what they tell, and compare numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from graphopt import graph as g
from graphopt.accuracy import HALF, judge
from graphopt.capture import capture
from graphopt.observe import Event, Matched, Refused
from graphopt.passes.canonicalize import canonicalize
from graphopt.rewrite import Match, Refusal, Rewriter
from graphopt.rule import Rule
from graphopt.translate import Translation
from tests.tolerances import close


def outputs(result: object) -> tuple[Tensor, ...]:
    """A function's result as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[arg-type]  # a sequence


class Watch:
    """Keeps what a rewriter tells."""

    def __init__(self) -> None:
        self.matches: list[Match] = []
        self.refusals: list[Refusal] = []

    def on_event(self, event: Event) -> None:
        """Keep matches and refusals."""
        if isinstance(event, Matched):
            self.matches.append(event.match)
        if isinstance(event, Refused):
            self.refusals.append(event.refusal)


def canonical(function: Callable[..., object], *inputs: object) -> fx.GraphModule:
    """A plain function's canonical graph."""
    gm = capture(function, *inputs).gm
    canonicalize(gm)
    return gm


def rewritten(
    gm: fx.GraphModule,
    rules: Sequence[Rule | Translation],
    *,
    deny: frozenset[str] = frozenset(),
    fuel: int | None = None,
) -> tuple[fx.GraphModule, Watch]:
    """A copy of a graph after the rules, and what they told."""
    copy, watch = fx.GraphModule(gm, g.copy_graph(gm.graph)), Watch()
    copy.meta.update(gm.meta)
    Rewriter(copy, tuple(rules), canonicalize, (watch,), deny, fuel).run()
    copy.recompile()
    return copy, watch


def vocabulary(gm: fx.GraphModule) -> list[str]:
    """The names of the ops of ours that a graph calls, in order."""
    return [g.op_name(n) for n in gm.graph.nodes if g.is_call(n) and g.is_ours(n.target)]


def agree(exact: Tensor, eager: Tensor, ours: Tensor, dtype: torch.dtype, where: str) -> None:
    """Element by element in full precision; in half, ours may be as far from fp64 as eager is."""
    exact, eager, ours = (
        x.masked_fill(x == torch.finfo(x.dtype).min, -torch.inf) for x in (exact, eager, ours)
    )
    if dtype in HALF:
        verdict = judge(exact.double(), eager, ours, dtype)
        assert verdict.ok, f"{where}: {verdict}"
        return
    try:
        close(ours, exact, dtype)
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from error
