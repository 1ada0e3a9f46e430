"""Passes in a row, with contracts: what each needs and gives is checked before anything runs."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import fx

from graphopt import graph as g
from graphopt.capture import Captured
from graphopt.errors import PipelineError
from graphopt.kernel import Kernel
from graphopt.observe import Observer, PassEnded, PassStarted, emit
from graphopt.report import Report, ReportObserver
from graphopt.rule import Rule
from graphopt.translate import Translation
from graphopt.weights import WeightStore

EXACTNESS = ("bitwise", "reordered", "lossy")


@dataclass
class Context:
    """What passes may read besides the graph.

    Attributes:
        store: where prepared weights live; shared by all graphs of a model.
        target: "cpu", "cuda:90", …
        rules, kernels: the tables; `graphopt.defaults` fills them.
        observers: who listens.
        strict: raise instead of falling back.
        deny: ids of matches that must not be applied.
        fuel: how many rewrites may still be applied; None is no bound. Counts down (for bisection).
    """

    store: WeightStore = field(default_factory=WeightStore)
    target: str = "cpu"
    rules: tuple[Rule | Translation, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    observers: tuple[Observer, ...] = ()
    strict: bool = False
    deny: frozenset[str] = frozenset()
    fuel: int | None = None
    run: object = None  # set by a lowering: what executes the program instead of the graph module


class Pass(Protocol):
    """A frozen dataclass of plain options. `run` edits the graph module in place and returns nothing."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    provides: ClassVar[frozenset[str]]
    conflicts: ClassVar[frozenset[str]]
    exactness: ClassVar[str]

    def run(self, gm: fx.GraphModule, ctx: Context) -> None: ...


@dataclass(frozen=True)
class Pipeline:
    """Passes, in order.

    Raises:
        PipelineError: when made, if a pass's needs are not met by those before it, or two of them conflict.
    """

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        given: set[str] = set()
        for index, step in enumerate(self.passes):
            missing = step.requires - given
            if missing:
                raise PipelineError(
                    f"pass {index} ({step.name}) needs {', '.join(sorted(missing))}, which no earlier pass provides; "
                    f"the passes before it provide {', '.join(sorted(given)) or 'nothing'}"
                )
            clash = step.conflicts & given
            if clash:
                raise PipelineError(f"pass {index} ({step.name}) cannot run after a pass that provides {', '.join(sorted(clash))}")
            given |= step.provides

    @property
    def exactness(self) -> str:
        """The weakest of the passes' promises: bitwise, reordered or lossy."""
        return max((p.exactness for p in self.passes), key=EXACTNESS.index, default="bitwise")

    def require(self, exactness: str) -> None:
        """Refuse passes that promise less.

        Raises:
            PipelineError: naming the first pass that is less exact than asked for.
        """
        if exactness not in EXACTNESS:
            raise PipelineError(f"exactness {exactness!r} is not one of {', '.join(EXACTNESS)}")
        for step in self.passes:
            if EXACTNESS.index(step.exactness) > EXACTNESS.index(exactness):
                raise PipelineError(f"pass {step.name} is {step.exactness}, but the result has to be {exactness}; leave it out")

    def run(self, captured: Captured, ctx: Context | None = None) -> tuple[Captured, Report]:
        """Run all passes on a copy of the captured graph.

        Returns:
            the program with the new graph (called like the captured one), and the report.

        Raises:
            PipelineError: a pass broke the graph (named, with what fx found).
        """
        if ctx is None:
            from graphopt.defaults import context

            ctx = context()
        report = ReportObserver()
        observers = (*ctx.observers, report)
        inner = copy.copy(ctx)
        inner.observers = observers
        gm = fx.GraphModule(captured.gm, g.copy_graph(captured.gm.graph))
        gm.meta.update(captured.gm.meta)
        before = g.fingerprint(gm.graph)
        for index, step in enumerate(self.passes):
            emit(observers, PassStarted(step.name, index, gm))
            start = time.perf_counter()
            step.run(gm, inner)
            seconds = time.perf_counter() - start
            _check(gm, step)
            after = g.fingerprint(gm.graph)
            emit(observers, PassEnded(step.name, index, gm, after != before, seconds))
            before = after
        return captured.replace(gm, inner.run), report.report  # type: ignore[arg-type]  # run is callable or None


def _check(gm: fx.GraphModule, step: Pass) -> None:
    """Fail at the first wrong graph."""
    try:
        gm.graph.lint()
    except Exception as error:
        raise PipelineError(f"pass {step.name} left a broken graph: {error}") from error


def passes_named(passes: Sequence[Pass]) -> tuple[str, ...]:
    """The passes' names, in order."""
    return tuple(p.name for p in passes)
