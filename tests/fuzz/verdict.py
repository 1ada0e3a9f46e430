"""Whether a compiled program is the eager one: by the accuracy rule, before lowering nearly to the bit."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt import graph as g
from graphopt.accuracy import judge, raise_to_fp64
from graphopt.capture import capture
from graphopt.defaults import context, pipeline
from graphopt.observe import Event, PassStarted
from tests.tolerances import IN_FP64


@dataclass
class _Transformed:
    """Keeps the graph as it is before it is lowered: after it, weights are prepared, and some calls write."""

    gm: fx.GraphModule | None = None

    def on_event(self, event: Event) -> None:
        if isinstance(event, PassStarted) and event.name == "lower":
            self.gm = fx.GraphModule(event.gm, g.copy_graph(event.gm.graph))


class Wrong(AssertionError):
    """A compiled program gives something else than eager."""


def check(program: Callable[..., object], inputs: Sequence[Tensor], dtype: torch.dtype) -> Counter[str]:
    """Compile and compare; the report's counts of ops.

    Raises:
        Wrong: with the place and the numbers.
        Exception: whatever the compiler raises; it has to compile what eager runs.
    """
    with torch.no_grad():
        captured, seen = capture(program, *inputs), _Transformed()
        lowered, report = pipeline().run(captured, context(observers=(seen,)))
        assert seen.gm is not None, "nothing was lowered"
        values = captured.bind(tuple(copy.deepcopy(inputs)), {})
        exact = raise_to_fp64(captured.gm)(*values)
        ours = raise_to_fp64(seen.gm)(*values)
        for i, (want, have) in enumerate(zip(exact, ours, strict=True)):
            _same(f"recognised output {i}", want, have)
        eager = program(*copy.deepcopy(inputs))
        run = lowered(*copy.deepcopy(inputs))
    verdict = judge(captured.unflatten(exact), eager, run, dtype)
    if not verdict.ok:
        raise Wrong(f"lowered {verdict.reason}")
    return Counter(report.counts)


def _same(where: str, want: object, have: object) -> None:
    if not isinstance(want, Tensor) or not isinstance(have, Tensor):
        return
    if want.shape != have.shape:
        raise Wrong(f"{where}: shape {list(have.shape)}, not {list(want.shape)}")
    try:
        torch.testing.assert_close(have.double(), want.double(), equal_nan=True, **IN_FP64)
    except AssertionError as error:
        raise Wrong(f"{where}: {error}".splitlines()[0] + f" {_worst(want, have)}") from None


def _worst(want: Tensor, have: Tensor) -> str:
    return (
        f"largest difference {float((want.double() - have.double()).abs().nan_to_num(torch.inf).max()):.3g}"
    )
