"""Judge rewrites by running them: each as old and as new subgraph, on what the program really computes.

    before(x, w)   ==   after(x, w)        by the accuracy rule, the oracle being `before` in fp64

Equal rewrites (identical layers) are judged once, by the first of them that the memory budget admits.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import flops, torch_private
from graphopt import graph as g
from graphopt.accuracy import Verdict, judge, raise_to_fp64
from graphopt.certificates import Certificates, key_of, shape_of
from graphopt.ledger import Call, Ledger, Rewrite
from graphopt.values import Values, copied
from graphopt.verification import NotVerified, TakenBack

WIDE = 8  # bytes of an fp64 number
FREE = g.SIZE_OPS | {operator.getitem}  # plain functions that write nothing
LOWEST_FIRST = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Budget:
    """What verification may cost: seconds for one call of a program; bytes held at any time."""

    seconds: float = 60.0
    bytes: int = 2 << 30


@dataclass
class Outcome:
    """What one round of judging found."""

    passed: dict[str, int]  # key -> how many matches it stands for
    certified: dict[str, int]
    failed: dict[str, TakenBack]
    left: dict[str, NotVerified]
    made_up: set[int]  # places of inputs


def verify(
    ledger: Ledger,
    inputs: Sequence[object],
    certificates: Certificates,
    budget: Budget = Budget(),
    *,
    every: bool = False,
) -> Outcome:
    """Judge the rewrites of one compilation on the program's inputs; nothing is written to them.

    Args:
        inputs: values in placeholder order, weights included.
        every: judge each match, not only one of those alike, and trust no certificate.
    """
    until = time.perf_counter() + budget.seconds
    found = Outcome({}, {}, {}, {}, set())
    groups: dict[str, list[Rewrite]] = {}
    for rewrite in ledger.rewrites:
        groups.setdefault(key_of(rewrite), []).append(rewrite)
    for key, group in groups.items():
        if not every and certificates.get(key) is not None:
            found.certified[key] = len(group)
    open_groups = [(key, group) for key, group in groups.items() if key not in found.certified]
    if every:
        jobs = [(key, rewrite) for key, group in open_groups for rewrite in group]
    else:
        jobs = [(key, _first_that_fits(group, budget)) for key, group in open_groups]
    place = {node: i for i, node in enumerate(ledger.calls)}
    values = Values(ledger, inputs, ())
    jobs.sort(key=lambda job: max((place.get(values.captured(n), -1) for n in job[1].leaves()), default=-1))
    values = Values(ledger, inputs, [rewrite.leaves() for _, rewrite in jobs])
    with torch.no_grad(), torch.random.fork_rng(devices=devices_of(inputs)):
        for key, rewrite in jobs:
            if key in found.failed:
                continue
            keep = None if every else certificates
            verdict = _judge(rewrite, values, budget, until)
            _note(key, rewrite, groups[key], verdict, found)
            if isinstance(verdict, Verdict) and not verdict.ok:
                certificates.revoke(key)
            elif isinstance(verdict, Verdict) and keep is not None and not values.made_up:
                about = {"rule": rewrite.match.rule, "shape": shape_of(rewrite)}
                keep.keep(key, {**about, **certificate(verdict)})
    found.made_up = set(values.made_up)
    return found


def _first_that_fits(group: Sequence[Rewrite], budget: Budget) -> Rewrite:
    """Which of rewrites alike is judged: the first that the budget admits; if none does, the first."""
    return next((rewrite for rewrite in group if needed(rewrite) <= budget.bytes), group[0])


def _judge(rewrite: Rewrite, values: Values, budget: Budget, until: float) -> Verdict | str:
    """The accuracy rule on one rewrite, or why it cannot be asked."""
    bytes_needed = needed(rewrite) + values.held
    if time.perf_counter() > until:
        return f"the time budget of {budget.seconds:g} s is used up"
    if bytes_needed > budget.bytes:
        return f"it takes {mib(bytes_needed)} MiB, the memory budget is {mib(budget.bytes)} MiB"
    leaves, state = rewrite.leaves(), []
    if any(g.is_mutable(call.target) for call in rewrite.before):
        state = [leaf for leaf in leaves if g.is_tensor(leaf)]  # what is written is a result, too
    old = Subgraph(rewrite.before, [*(pair[0] for pair in rewrite.outputs), *state], leaves)
    new = Subgraph(rewrite.after, [*(pair[1] for pair in rewrite.outputs), *state], leaves)
    try:
        given = values.take(leaves)
        oracle, eager = old.in_fp64(given), old(given)
    except Exception as error:  # not the rewrite's fault
        return f"what it replaced cannot be run apart: {said(error)}"
    try:
        return judge(oracle, eager, new(given), dtype_of(rewrite))
    except Exception as error:
        return Verdict(False, math.inf, 0.0, 0.0, reason=f"it fails: {said(error)}")


def _note(
    key: str, rewrite: Rewrite, group: Sequence[Rewrite], verdict: Verdict | str, found: Outcome
) -> None:
    """Write down what came out for one of a group; the worst of several counts."""
    about, ids = rewrite.match, tuple(r.match.id for r in group)
    if isinstance(verdict, str):
        found.passed.pop(key, None)
        found.left[key] = NotVerified(about.rule, about.module_path, ids, verdict)
    elif verdict.ok:
        if key not in found.left:
            found.passed[key] = len(group)
    else:
        found.passed.pop(key, None)
        found.left.pop(key, None)
        numbers = verdict.rmse_ours, verdict.rmse_eager, verdict.limit
        reason = verdict.reason or ""
        found.failed[key] = TakenBack(about.rule, about.module_path, about.source, ids, *numbers, reason)


def mib(size: int) -> str:
    """A number of bytes in MiB, without the unit."""
    return f"{size / 2**20:.3g}"


def certificate(verdict: Verdict) -> Mapping[str, object]:
    """What a certificate says of a verdict."""
    return {
        "error": verdict.rmse_ours,
        "expected": verdict.rmse_eager,
        "limit": verdict.limit,
        "torch": torch.__version__,
    }


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def devices_of(inputs: Sequence[object]) -> list[int]:
    """The GPUs whose random state is to be left as it is."""
    found = {x.device.index for x in inputs if isinstance(x, torch.Tensor) and x.device.type == "cuda"}
    return sorted(i for i in found if i is not None)


# ------------------------------------------------------------------------------------------------ subgraphs


@dataclass(frozen=True)
class Subgraph:
    """One side of a rewrite, called with the values of its leaves."""

    calls: tuple[Call, ...]
    outputs: list[fx.Node]
    leaves: list[fx.Node]

    def __call__(self, values: Sequence[object]) -> tuple[object, ...]:
        """Its outputs, and what it writes, as nested values. The given values stay as they are."""
        given = copied(list(values)) if self.writes else values
        env: dict[fx.Node, Any] = dict(zip(self.leaves, given, strict=True))
        for call in self.calls:
            args, kwargs = call.given(env.__getitem__)
            env[call.node] = call.target(*args, **kwargs)
        return tuple(env[n] for n in self.outputs)

    @property
    def writes(self) -> bool:
        """Whether it may write to what it is given: an operator says so; of a kernel it is not known."""
        return any(
            g.is_mutable(call.target) or not (call.target in FREE or g.schema_arguments(call.target))
            for call in self.calls
        )

    def in_fp64(self, values: Sequence[object]) -> object:
        """The same with every float raised; see `raise_to_fp64`."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for i, leaf in enumerate(self.leaves):
            env[leaf] = graph.placeholder(f"x{i}")
            g.set_val(env[leaf], g.val(leaf))
        for call in self.calls:
            args, kwargs = call.given(env.__getitem__)
            env[call.node] = graph.call_function(call.target, args, kwargs)
            g.set_val(env[call.node], g.val(call.node))
        graph.output(tuple(env[n] for n in self.outputs))
        return raise_to_fp64(torch_private.lazy_module(torch.nn.Module(), graph))(*values)


def needed(rewrite: Rewrite) -> int:
    """The bytes that judging takes at most: leaves and the old side in fp64, both sides as they are."""
    nodes = {*rewrite.leaves(), *(call.node for call in (*rewrite.before, *rewrite.after))}
    old = {*rewrite.leaves(), *(call.node for call in rewrite.before)}
    return sum(_bytes(n) for n in nodes) + sum(WIDE * flops.elements(g.val(n)) for n in old)


def _bytes(node: fx.Node) -> int:
    value = g.tensor(node)
    return 0 if value is None else flops.elements(value) * value.element_size()


def dtype_of(rewrite: Rewrite) -> torch.dtype:
    """The dtype that decides how exact a rewrite can be: the lowest that either side computes in."""
    nodes = [*rewrite.leaves(), *(call.node for call in (*rewrite.before, *rewrite.after))]
    found = {v.dtype for n in nodes if (v := g.tensor(n)) is not None and v.dtype in LOWEST_FIRST}
    return next((dtype for dtype in LOWEST_FIRST if dtype in found), torch.float32)
