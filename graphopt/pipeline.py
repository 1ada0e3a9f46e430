"""Passes in a row, with contracts: what each needs and gives is checked before anything runs."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import ClassVar, Protocol

import torch
from torch import fx

from graphopt import aliasing, flops, torch_private
from graphopt import graph as g
from graphopt.capture import Captured
from graphopt.errors import GraphoptError, PipelineError, StrictError
from graphopt.kernel import Kernel
from graphopt.ledger import Ledger
from graphopt.observe import Event, Matched, Observer, PassEnded, PassStarted, Warned, emit
from graphopt.patience import Overtime, ended_after
from graphopt.question import Question
from graphopt.report import Report, ReportObserver
from graphopt.rule import Rule
from graphopt.runtime.ranks import Mesh
from graphopt.translate import Translation
from graphopt.weights import WeightStore

EXACTNESS = ("bitwise", "reordered", "lossy")
EXPECTS_MATCHES = "recognised"  # a pass that provides it is there to find something
PATIENCE = 900.0  # seconds for one pass; a model of 1000 layers takes some seconds
MISSED = 0.5  # of the FLOPs: above it, a recognition without a single match has failed


@dataclass
class Context:
    """What passes may read besides the graph.

    Attributes:
        store: where prepared weights live; shared by all graphs of a model.
        target: "cpu", "cuda:90", …
        rules, kernels: the tables; `graphopt.defaults` fills them.
        observers: who listens.
        strict: raise instead of falling back.
        replay: run GPU programs from a CUDA graph where that is safe.
        mesh: the processes that collectives are bound to; without one they stay symbolic.
        deny: ids of matches that must not be applied.
        fuel: how many rewrites may still be applied; None is no bound. Counts down (for bisection).
        question: whose answer observers are told in full, with misses that are cut otherwise.
        ids, named: how often each id was given in this run, and to which denied matches.
        ledger: told what each rewrite took away and made, for verification; None costs nothing.
    """

    store: WeightStore = field(default_factory=WeightStore)
    target: str = "cpu"
    rules: tuple[Rule | Translation, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    observers: tuple[Observer, ...] = ()
    strict: bool = False
    replay: bool = True
    mesh: Mesh | None = None
    deny: frozenset[str] = frozenset()
    fuel: int | None = None
    question: Question | None = None
    ledger: Ledger | None = None
    ids: dict[str, int] = field(default_factory=dict)
    named: dict[tuple[str, fx.Node], str] = field(default_factory=dict)
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
                    f"pass {index} ({step.name}) needs {', '.join(sorted(missing))}, which no earlier pass "
                    f"provides; the passes before it provide {', '.join(sorted(given)) or 'nothing'}"
                )
            clash = step.conflicts & given
            if clash:
                raise PipelineError(
                    f"pass {index} ({step.name}) cannot run after a pass that provides "
                    f"{', '.join(sorted(clash))}; put it before"
                )
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
                raise PipelineError(
                    f"pass {step.name} is {step.exactness}, but the result has to be {exactness}; "
                    "leave it out"
                )

    def run(self, captured: Captured, ctx: Context | None = None) -> tuple[Captured, Report]:
        """Run all passes on a copy of the captured graph.

        Where more than half of the graph's FLOPs are matrix products, convolutions or attention in ATen's
        words and the recognising pass matched nothing at all, the report has a warning; not if some matches
        are denied.

        Returns:
            the program with the new graph (called like the captured one), and the report.

        Raises:
            PipelineError: a pass failed or broke the graph (named, with what was found).
            StrictError: under `ctx.strict`, instead of that warning.
        """
        if ctx is None:
            # By name: only a run without a context asks for the tables, and the core knows none of them.
            ctx = import_module("graphopt.defaults").context()
            assert isinstance(ctx, Context)
        listener, tally = ReportObserver(), _Tally()
        inner = copy.copy(ctx)
        inner.observers = (*ctx.observers, listener, tally)
        inner.ids, inner.named = {}, {}
        gm = torch_private.lazy_module(captured.gm, g.copy_graph(captured.gm.graph))
        gm.meta.update(captured.gm.meta)
        before = g.fingerprint(gm.graph)
        for index, step in enumerate(self.passes):
            tally.matched = 0
            emit(inner.observers, PassStarted(step.name, index, gm))
            if inner.ledger:
                inner.ledger.see(gm)
            start = time.perf_counter()
            _run(step, gm, inner)
            seconds = time.perf_counter() - start
            _check(gm, captured.gm, step)
            after = g.fingerprint(gm.graph)
            emit(inner.observers, PassEnded(step.name, index, gm, after != before, seconds))
            before = after
            if EXPECTS_MATCHES in step.provides and not tally.matched and not ctx.deny:
                _missed(gm, step, inner)
        report = listener.report
        report.weights_prepared, report.weights_prepared_bytes = _prepared(gm)
        return captured.replace(gm, inner.run), report  # type: ignore[arg-type]  # run is callable or None


@dataclass
class _Tally:
    """Counts the matches of one pass."""

    matched: int = 0

    def on_event(self, event: Event) -> None:
        self.matched += isinstance(event, Matched)


def _run(step: Pass, gm: fx.GraphModule, ctx: Context) -> None:
    """Run one pass; what it did not raise on purpose gets its name."""
    try:
        ended_after(PATIENCE, lambda: step.run(gm, ctx))
    except GraphoptError:
        raise
    except Overtime as error:
        raise PipelineError(f"pass {step.name} did not end in {PATIENCE:g} s and was ended") from error
    except Exception as error:
        raise PipelineError(f"pass {step.name} failed: {type(error).__name__}: {error}") from error


def _check(gm: fx.GraphModule, captured: fx.GraphModule, step: Pass) -> None:
    """Fail at the first wrong graph: not well formed, or not called like the captured one."""
    try:
        gm.graph.lint()
    except Exception as error:
        raise PipelineError(f"pass {step.name} left a broken graph: {error}") from error
    for what, now, was in zip(("inputs", "outputs"), _arity(gm), _arity(captured), strict=True):
        if now != was:
            raise PipelineError(f"pass {step.name} left a broken graph: {now} {what} instead of {was}")


def _arity(gm: fx.GraphModule) -> tuple[int, int]:
    """How many inputs and outputs a graph has."""
    return len(g.placeholders(gm.graph)), len(list(g.flat_arguments(g.output_node(gm.graph))))


def _prepared(gm: fx.GraphModule) -> tuple[int, int]:
    """How many weights a lowered graph has prepared, and their bytes; a view of a weight takes none."""
    plans = [(plan, g.val(node)) for node in gm.graph.nodes if (plan := node.meta.get("prepared"))]
    new = [v for plan, v in plans if not _is_view(plan.gm) and isinstance(v, torch.Tensor)]
    return len(plans), sum(flops.elements(v) * v.element_size() for v in new)


def _is_view(prepare: fx.GraphModule) -> bool:
    """Whether a prepare graph gives its source's own memory."""
    (result,) = g.output_node(prepare.graph).all_input_nodes
    return aliasing.root(result).op == "placeholder"


def _missed(gm: fx.GraphModule, step: Pass, ctx: Context) -> None:
    """Warn, or raise, if there was something to match. Small fragments have nothing, and that is right."""
    shares = flops.unmatched(gm.graph)
    if sum(shares.values()) <= MISSED:
        return
    work = ", ".join(f"{share:.0%} in {name}" for name, share in shares.items())
    message = (
        f"pass {step.name} matched nothing, though of the graph's FLOPs {work}; "
        "graphopt.explain shows near misses"
    )
    if ctx.strict:
        raise StrictError(message)
    emit(ctx.observers, Warned(message))


def passes_named(passes: Sequence[Pass]) -> tuple[str, ...]:
    """The passes' names, in order."""
    return tuple(p.name for p in passes)
