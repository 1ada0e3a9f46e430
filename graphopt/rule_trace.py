"""Trace both sides of a rule into Parts, and find what each literal of the trace is an expression of.

A side is traced on fake tensors at two (or three) assignments of sizes to dimension names, each twice a large
prime. A literal that is the same at both is a constant; one that differs is an expression of names that gives
both values: `head_dim // 2`, `heads * groups`. If there is none, the rule is an error. (Tracing with SymInts
says the same, and costs 100-1000 ms a rule in sympy instead of 10-60.)
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.errors import RuleError
from graphopt.rule import Canonicalise, Carried, Float, Int, Parameter, Part, Rule, Side, Symbolic, T, Text

LEAD = ("lead0", "lead1")  # what a leading `...` is in the trace
SIZES = (
    (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069),
    (2003, 2011, 2017, 2027, 2029, 2039, 2053, 2063, 2069, 2081, 2083, 2087),
)
SMALL = ((101, 103, 107, 109), (211, 223, 227, 229))  # Int parameters: smaller than any dimension they cut
# What a Float parameter's sample is multiplied with: unmistakable, and no two keep their ratio or product.
FACTORS = ((0.9990234573, 1.0031567891, 0.9957123457), (1.0009765432, 0.9961234567, 1.0123456789))


def trace_sides(
    rule: Rule,
    dtypes: Mapping[str, torch.dtype],
    absent: tuple[str, ...],
    canonicalise: Canonicalise,
) -> tuple[Side, Side]:
    """Both sides of a rule for one choice of dtypes and of absent optional parameters.

    Raises:
        RuleError: a side cannot be traced, computes different graphs at different sizes, or has a literal
            that is no expression of the rule's names.
    """
    broadcast = any(
        "|1" in word
        for s in rule.specs.values()
        if isinstance(s, T)
        for word in s.dims.split()
        if word[:3] != "..."
    )
    where = [(0, False), (1, False), *([(0, True)] if broadcast else [])]
    points = [Point.of(rule, index, ones) for index, ones in where]
    choice = tuple(dtypes.items())
    sides = []
    for function in (rule.pattern, rule.replacement):
        traced = [_trace(rule, function, index, ones, choice, absent, canonicalise) for index, ones in where]
        sides.append(_generalise(rule, traced, points))
    return sides[0], sides[1]


@functools.cache
def needed_targets(rule: Rule, canonicalise: Canonicalise) -> frozenset[object]:
    """The torch operators that a graph must have for the pattern to occur: by a trace in fp32 (no casts)."""
    dtypes = tuple((name, torch.float32) for name in rule.dtype_variables())
    side = _trace(rule, rule.pattern, 0, False, dtypes, rule.optional(), canonicalise)
    return frozenset(
        p.target
        for p in side.parts
        if not p.leaf and not g.is_ours(p.target) and p.target is not operator.getitem
    )


@dataclass(frozen=True)
class Point:
    """One assignment of numbers to a rule's names."""

    sizes: Mapping[str, int]  # dimensions and Int parameters
    floats: Mapping[str, float]

    @staticmethod
    def of(rule: Rule, index: int, ones: bool) -> Point:
        """The index-th assignment; with `ones`, each dimension that may be broadcast is 1."""
        sizes: dict[str, int] = {}
        small, large = iter(SMALL[index]), (2 * p for p in SIZES[index])  # even: heads are split in halves
        for name, spec in rule.specs.items():
            if isinstance(spec, Int):
                sizes[name] = 2 * next(small)
        for spec in rule.specs.values():
            if not isinstance(spec, T):
                continue
            for word in words(spec):
                for name in word.split("|")[0].split("*"):
                    if not name.isdigit() and name not in sizes:
                        sizes[name] = next(large)
                if "|1" in word:
                    sizes[word] = (
                        1 if ones else math.prod(_factor(f, sizes) for f in word.split("|")[0].split("*"))
                    )
        scalars = [(n, s.sample) for n, s in rule.specs.items() if isinstance(s, Float)]
        floats = {n: sample * factor for (n, sample), factor in zip(scalars, FACTORS[index], strict=False)}
        if len(floats) < len(scalars):
            raise RuleError(
                f"{rule.name} has {len(scalars)} Float parameters; at most {len(FACTORS[0])} are supported"
            )
        return Point(sizes, floats)

    def shape(self, spec: T) -> tuple[int, ...]:
        """A tensor parameter's sizes."""
        return tuple(
            self.sizes[w] if w in self.sizes else math.prod(_factor(f, self.sizes) for f in w.split("*"))
            for w in words(spec)
        )


def words(spec: T) -> list[str]:
    """A tensor parameter's dimensions, the leading `...` as two of them."""
    return [w for word in spec.dims.split() for w in (LEAD if word.startswith("...") else (word,))]


def _factor(word: str, sizes: Mapping[str, int]) -> int:
    return int(word) if word.isdigit() else sizes[word]


def dimension(word: str) -> object:
    """A dimension of a spec as what the matcher unifies: a number, a name, a product, each perhaps or 1."""
    base = word.removesuffix("|1")
    if base.isdigit():
        return int(base)
    if base != word:
        return (Symbolic(word, (word,)), 1)
    return Symbolic(word, tuple(sorted({f for f in word.split("*") if not f.isdigit()})))


# ------------------------------------------------------------------------------------------------ one trace


@functools.cache
def _trace(
    rule: Rule,
    function: Callable[..., object],
    index: int,
    ones: bool,
    choice: tuple[tuple[str, torch.dtype], ...],
    absent: tuple[str, ...],
    canonicalise: Canonicalise,
) -> Side:
    """Trace and canonicalise one side at one point, with plain literals."""
    point, dtypes = Point.of(rule, index, ones), dict(choice)
    mode = torch_private.new_fake_mode()
    tensors: dict[str, torch.Tensor] = {}
    fixed: dict[str, object] = {}
    for name, spec in rule.specs.items():
        if name in absent:
            fixed[name] = None
        elif isinstance(spec, T):
            dtype = dtypes.get(spec.dtype) or getattr(torch, spec.dtype)
            with mode:
                tensors[name] = torch.empty(point.shape(spec), dtype=dtype, device="cpu")
        elif isinstance(spec, Float):
            fixed[name] = point.floats[name]
        else:
            fixed[name] = point.sizes[name] if isinstance(spec, Int) else spec.sample
    names = list(tensors)
    try:
        gm = torch_private.trace(
            lambda *values: function(**dict(zip(names, values, strict=True)), **fixed),
            list(tensors.values()),
            mode,
        )
    except Exception as error:
        raise RuleError(f"{rule.name}: {function.__name__} cannot be traced: {error}") from error
    leaves = dict(zip([n.name for n in g.placeholders(gm.graph)], names, strict=True))
    gm.meta["output_strides"] = ()
    canonicalise(gm)
    return _read(rule, gm, leaves)


def _read(rule: Rule, gm: fx.GraphModule, leaves: Mapping[str, str]) -> Side:
    """A canonical graph as Parts."""
    parts: dict[fx.Node, Part] = {}
    texts = {s.sample: n for n, s in rule.specs.items() if isinstance(s, Text)}

    def argument(value: object) -> object:
        if isinstance(value, fx.Node):
            return parts[value]
        if isinstance(value, (list, tuple)):
            return tuple(argument(v) for v in value)
        return Parameter(texts[value]) if isinstance(value, str) and value in texts else value

    for node in gm.graph.nodes:
        if node.op == "output":
            out = node.args[0]
            outputs = out if isinstance(out, (list, tuple)) else (out,)
            return Side(tuple(argument(v) for v in outputs), tuple(parts.values()))
        if node.op == "placeholder":
            spec = rule.specs[leaves[node.name]]
            assert isinstance(spec, T)
            parts[node] = Part(
                None,
                leaf=leaves[node.name],
                shape=tuple(dimension(w) for w in words(spec)),
                dtype=g.dtype(node),
                ellipsis=spec.dims.startswith("..."),
                broadcast=spec.dims.startswith("...|1"),
                name=leaves[node.name],
            )
        elif node.op == "call_function":
            args = tuple(argument(a) for a in node.args)
            kwargs = {k: argument(v) for k, v in node.kwargs.items()}
            args, kwargs = _open(rule, node.target, args, kwargs)
            value = (
                None if g.is_ours(node.target) else g.tensor(node)
            )  # ours may carry what decides their dtype
            parts[node] = Part(
                node.target, args, kwargs, dtype=None if value is None else value.dtype, name=node.name
            )
        else:
            raise RuleError(
                f"{rule.name}: a pattern may not hold a constant tensor ({node.name}); make it a parameter"
            )
    raise RuleError(f"{rule.name}: the trace has no output")


def _open(
    rule: Rule, target: object, args: tuple, kwargs: dict[str, object]
) -> tuple[tuple, dict[str, object]]:
    """Mark the arguments of our ops that the rule carries over."""
    if not g.is_ours(target):
        return args, kwargs
    names = g.argument_names(target)
    opened = tuple(Carried(n) if n in rule.carry else a for n, a in zip(names, args, strict=False))
    return opened, {k: Carried(k) if k in rule.carry else v for k, v in kwargs.items()}


# ------------------------------------------------------------------------------- from points to expressions


def _generalise(rule: Rule, traced: list[Side], points: list[Point]) -> Side:
    """The first trace, its literals replaced by expressions that also give what the other traces have."""
    first = copy.deepcopy(traced[0])  # traces are cached, and this one is edited
    traced = [first, *traced[1:]]
    if any([p.target for p in side.parts] != [p.target for p in first.parts] for side in traced[1:]):
        raise RuleError(f"{rule.name}: it is another graph at other sizes; split it into a rule for each")
    place = {part: i for i, part in enumerate(first.parts)}

    def literal(values: tuple[object, ...]) -> object:
        value = values[0]
        if isinstance(value, Part):
            return value
        if isinstance(value, tuple):
            return tuple(literal(v) for v in zip(*values, strict=True))
        if all(v == value and type(v) is type(value) for v in values) and not _may_be_name(value, points):
            return value
        found = _expression(values, points)
        if found is None:
            raise RuleError(
                f"{rule.name}: the literal {values[0]!r} is no expression of {', '.join(rule.specs)}"
            )
        return found

    for part in first.parts:
        twins = [side.parts[place[part]] for side in traced]
        part.args = literal(tuple(t.args for t in twins))  # type: ignore[assignment]  # a tuple stays one
        part.kwargs = {k: literal(tuple(t.kwargs[k] for t in twins)) for k in part.kwargs}
    return first


def _may_be_name(value: object, points: list[Point]) -> bool:
    """Whether a value that is equal at all points still is some name's value at the first one."""
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and value in points[0].sizes.values()
    )


def _expression(values: tuple[object, ...], points: list[Point]) -> Symbolic | None:
    """The simplest expression of names that has these values at these points."""
    if isinstance(values[0], float):
        candidates = _float_expressions([p.floats for p in points], [p.sizes for p in points])
    else:
        candidates = _size_expressions([p.sizes for p in points], values)
    return next((c for c, results in candidates if results == list(values)), None)


def _size_expressions(
    points: list[Mapping[str, int]], values: tuple[object, ...]
) -> Iterator[tuple[Symbolic, list[object]]]:
    """n, n // c, n - n // c, n + c, m * n, m + n, m - n and products of three; broadcast names last."""
    names = sorted(points[0], key=lambda n: "|" in n)

    def at(function: Callable[..., int], *used: str) -> list[object]:
        return [function(*(p[n] for n in used)) for p in points]

    for n in names:
        yield Symbolic(n, (n,)), at(lambda x: x, n)
    for n in names:
        for c in (2, 3, 4, 8):
            yield Symbolic(f"{n} // {c}", (n,)), at(lambda x, c=c: x // c, n)
            yield Symbolic(f"{n} - {n} // {c}", (n,)), at(lambda x, c=c: x - x // c, n)
            yield Symbolic(f"{n} * {c}", (n,)), at(lambda x, c=c: x * c, n)
        difference = values[0] - points[0][n]  # type: ignore[operator]  # ints
        if abs(difference) <= 8:
            sign = "+" if difference >= 0 else "-"
            yield Symbolic(f"{n} {sign} {abs(difference)}", (n,)), at(lambda x, d=difference: x + d, n)
    for m, n in itertools.combinations_with_replacement(names, 2):
        yield Symbolic(f"{m} * {n}", tuple(sorted({m, n}))), at(lambda x, y: x * y, m, n)
        yield Symbolic(f"{m} + {n}", tuple(sorted({m, n}))), at(lambda x, y: x + y, m, n)
    for m, n in itertools.permutations(names, 2):
        yield Symbolic(f"{m} - {n}", tuple(sorted((m, n)))), at(lambda x, y: x - y, m, n)
    for a, m, n in itertools.combinations(names, 3):
        yield Symbolic(f"{a} * {m} * {n}", (a, m, n)), at(lambda x, y, z: x * y * z, a, m, n)


def _float_expressions(
    points: list[Mapping[str, float]], sizes: list[Mapping[str, int]]
) -> Iterator[tuple[Symbolic, list[object]]]:
    """f, -f, 1 / f, f * g, f / g, and f / n of a size n."""

    def at(function: Callable[..., float], *used: str) -> list[object]:
        return [function(*(p[n] for n in used)) for p in points]

    for f in points[0]:
        yield Symbolic(f, (f,)), at(lambda x: x, f)
        yield Symbolic(f"-{f}", (f,)), at(lambda x: -x, f)
        yield Symbolic(f"1.0 / {f}", (f,)), at(lambda x: 1.0 / x, f)
    for f, h in itertools.permutations(points[0], 2):
        yield Symbolic(f"{f} * {h}", tuple(sorted((f, h)))), at(lambda x, y: x * y, f, h)
        yield Symbolic(f"{f} / {h}", tuple(sorted((f, h)))), at(lambda x, y: x / y, f, h)
    for f, n in itertools.product(points[0], (n for n in sizes[0] if n.isidentifier())):
        results: list[object] = [p[f] / s[n] for p, s in zip(points, sizes, strict=True)]
        yield Symbolic(f"{f} / {n}", tuple(sorted((f, n)))), results
