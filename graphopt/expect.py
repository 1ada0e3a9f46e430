"""expect={"attention": 32}: how many operators have to be recognised in a graph, and what is short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType

from graphopt.errors import ExpectError
from graphopt.report import Report
from graphopt.rewrite import Refusal

# A word for several operators: which of them a model's norms become depends on what stands before them.
FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"norm": ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")}
)
SHOWN_MISSES = 5


def operators() -> tuple[str, ...]:
    """What may be expected: the names of the vocabulary, and of the families."""
    ops = import_module("graphopt.ops")  # by name, and only when asked: the core knows no operator
    return (*(op.__name__ for op in ops.OPS), *FAMILIES)


def check_expected(report: Report, expect: Sequence[tuple[str, int]]) -> None:
    """Raise where one graph's recognised operators (`report.counts`) are fewer than expected.

    It is asked of each graph by itself, so a graph break, after which each part has fewer, shows too.

    Raises:
        ExpectError: naming what is short, and what nearly matched with the reasons.
    """
    short = [(op, wanted) for op, wanted in expect if found_of(report, op) < wanted]
    if not short:
        return
    said = ", ".join(f"{op}: {found_of(report, op)} of {wanted}" for op, wanted in short)
    lines = [f"fewer operators were recognised than expected: {said}"]
    if report.fallback is not None:
        lines.append(f"the program is not optimised at all: {report.fallback}")
    if report.ends is not None:
        lines.append(f"the graph ends before the program does: {report.ends}")
    recognised = ", ".join(f"{op} {n}" for op, n in report.counts.items() if "." not in op)
    lines.append(f"recognised are: {recognised or 'none'}")
    names = [name for op, _ in short for name in FAMILIES.get(op, (op,))]
    lines += [f"near miss: {_said(miss)}" for miss in nearest(report, names)]
    lines.append("graphopt.explain(model, ...).explain(rule=..., module=...) says more; or expect fewer")
    raise ExpectError("\n  ".join(lines))


def found_of(report: Report, op: str) -> int:
    """How many of an operator, or of a family, were recognised."""
    return sum(report.counts.get(name, 0) for name in FAMILIES.get(op, (op,)))


def nearest(report: Report, ops: Sequence[str]) -> list[Refusal]:
    """The misses that came furthest, one a rule: first of rules that are called after what is short."""

    def distance(miss: Refusal) -> tuple[bool, bool, int]:
        return not any(op in miss.rule for op in ops), miss.rule in matched, -miss.depth

    matched = {match.rule for match in report.matches}
    return sorted(report.near_misses.values(), key=distance)[:SHOWN_MISSES]


def _said(miss: Refusal) -> str:
    place = miss.anchor_path or miss.module_path or miss.node
    source = miss.source.split(" ", 1)[0]
    return f"{miss.rule} at {place}{f' ({source})' if source else ''}: {miss.reason}"
