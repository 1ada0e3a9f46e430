"""Inputs for any rule, made from its specs: sizes, dtypes, leading dimensions, carried arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from graphopt import graph as g
from graphopt.binding import evaluate
from graphopt.defaults import RULES
from graphopt.patterns.fused import FUSIONS
from graphopt.rule import Carried, Float, Parameter, Part, Rule, Side, Symbolic, T, Text
from graphopt.translate import Translation

TABLES = (RULES, *FUSIONS)  # what runs together
EQUATIONS = tuple(r for r in RULES if isinstance(r, Rule))
FUSED_EQUATIONS = tuple(r for table in FUSIONS for r in table if isinstance(r, Rule) and r not in EQUATIONS)
NAMED = {r.name: r for r in EQUATIONS}
by_rule = pytest.mark.parametrize("rule", (*EQUATIONS, *FUSED_EQUATIONS), ids=lambda r: r.name)
TRANSLATIONS = tuple(r for r in RULES if isinstance(r, Translation))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Sizes by name. Heads are even where a rope halves them; a cache is longer than what is written to it.
TIDY = {"b": 2, "h": 4, "hk": 2, "g": 3, "s": 4, "t": 6, "l": 8, "d": 8, "e": 10, "n": 16, "k": 12}
TIDY |= {"rotary": 4, "batch": 2, "length": 4, "i": 5, "r": 3, "j": 3}  # j groups of k
UGLY = {"b": 3, "h": 5, "hk": 3, "g": 2, "s": 3, "t": 7, "l": 9, "d": 6, "e": 11, "n": 13, "k": 5}
UGLY |= {"rotary": 2, "batch": 3, "length": 7, "i": 7, "r": 2, "j": 1}
# All alike: the only sizes at which a wrong axis or permutation gives a graph that runs.
SQUARE = dict.fromkeys(TIDY, 4) | {"hk": 2, "g": 2, "rotary": 2, "batch": 2, "length": 2, "r": 1}
LOWEST = frozenset(torch.finfo(d).min for d in DTYPES)  # what a hidden score is filled with
# Rules with a constant that is rounded to fewer digits than fp64 has; their guard refuses fp64.
ROUNDED = frozenset({"bloom_gelu"})
# Matrices that rows pass one after the other: results stay near 1, so that rounding shows at its true size.
SCALES = {"up": 0.25, "gate_up": 0.25, "down": 0.25}
# What a pattern needs around it before its guard lets it fire.
AROUND: Mapping[str, Callable[[Tensor], Tensor]] = dict.fromkeys(
    (
        *("product_scores", "shared_key_scores", "flat_scores", "flat_product_scores"),
        *("bloom_scores", "empty_sum_scores"),
    ),
    lambda scores: torch.softmax(scores, -1),
)


@dataclass(frozen=True)
class Point:
    """One choice of everything that a rule's tensors leave open."""

    sizes: Mapping[str, int]
    lead: tuple[int, ...] = (2, 3)  # what a leading `...` is
    ones: bool = False  # whether dimensions that may be broadcast are 1
    dtypes: Mapping[str, torch.dtype] = field(
        default_factory=dict
    )  # of dtype variables; fp32 where not given

    def shape(self, spec: T) -> tuple[int, ...]:
        """A tensor parameter's sizes."""
        found: list[int] = []
        for word in spec.dims.split():
            if word.startswith("..."):
                found += self.lead[1:] if word.endswith("|1") and self.ones else self.lead
            elif word.endswith("|1") and self.ones:
                found.append(1)
            else:
                found.append(self.size(word))
        return tuple(found)

    def size(self, word: str) -> int:
        """A dimension's size: a number, a name or a product of them; `|1` is taken at its full size."""
        factors = word.removesuffix("|1").split("*")
        return math.prod(int(f) if f.isdigit() else self.sizes[f] for f in factors)

    def dtype(self, spec: T) -> torch.dtype:
        """A tensor parameter's dtype."""
        return (
            self.dtypes.get(spec.dtype, torch.float32) if len(spec.dtype) == 1 else getattr(torch, spec.dtype)
        )


def table_of(rule: Rule) -> tuple[Rule | Translation, ...]:
    """The rules that a rule runs together with."""
    return next(table for table in TABLES if rule in table)


def tensors(rule: Rule) -> dict[str, T]:
    """A rule's tensor parameters."""
    return {name: spec for name, spec in rule.specs.items() if isinstance(spec, T)}


def dimensions(rule: Rule) -> tuple[str, ...]:
    """The names of a rule's sizes, each once."""
    found = [w.removesuffix("|1") for s in tensors(rule).values() for w in s.dims.split() if w[:3] != "..."]
    return tuple(dict.fromkeys(f for w in found for f in w.split("*") if not f.isdigit()))


def has_heads(rule: Rule) -> bool:
    """Whether its tensors are queries and keys: their leading dimensions are batch and heads, always."""
    return {"q", "k"} <= set(rule.specs)


def small(rule: Rule, sizes: Mapping[str, int], dtype: torch.dtype = torch.float32) -> Point:
    """One point of these sizes, with 4 for what leads; all dtype variables are one."""
    lead = (4, 4) if has_heads(rule) else (4,)
    return Point(sizes, lead, dtypes=dict.fromkeys(rule.dtype_variables(), dtype))


def points(rule: Rule, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Point]]:
    """Every point worth a try: tidy, ugly, all alike, each dimension 1, ranks of `...`, broadcasts at 1."""
    if rule.name in ROUNDED and torch.float64 in dtypes.values():
        return
    for label, sizes in (("tidy", TIDY), ("ugly", UGLY), ("square", SQUARE)):
        yield label, Point(sizes, dtypes=dtypes)
    for name in dimensions(rule):
        yield f"{name} is 1", Point(TIDY | {name: 1}, dtypes=dtypes)
    specs = [s.dims for s in tensors(rule).values()]
    if any("|1" in dims for dims in specs):
        yield "broadcast", Point(TIDY, ones=True, dtypes=dtypes)
    if any("..." in dims for dims in specs):
        for lead in ((), (5,), (2, 1, 3), (1, 1)):
            if len(lead) == 2 or not has_heads(rule):
                yield f"lead {lead}", Point(TIDY, lead=lead, dtypes=dtypes)


def arguments(rule: Rule, at: Point, absent: Sequence[str] = ()) -> dict[str, object]:
    """Random values for every parameter at a point; the same ones at each call."""
    random = torch.Generator().manual_seed(7)
    found: dict[str, object] = {}
    for i, (name, spec) in enumerate(rule.specs.items()):
        if name in absent:
            found[name] = None
        elif isinstance(spec, T):
            below = at.sizes[spec.below] if spec.below else None
            found[name] = _tensor(at.shape(spec), at.dtype(spec), random, below)
            if name in SCALES:
                found[name] *= SCALES[name]  # type: ignore[operator]  # a tensor
        elif isinstance(spec, Float):
            found[name] = spec.sample * (1.0 + 0.0625 * (i + 1))  # exact in every dtype where the sample is
        elif isinstance(spec, Text):
            found[name] = spec.sample
        else:
            found[name] = at.sizes[name]
    return found


def _tensor(
    shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator, below: int | None = None
) -> Tensor:
    """Normal numbers, coin flips, or as int64 distinct positions or indices below a size."""
    if below is not None:
        return torch.randint(below, shape, generator=random, dtype=dtype)
    if dtype.is_complex:
        return torch.randn(shape, generator=random, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)
    if dtype == torch.bool:
        hidden = torch.rand(shape, generator=random) < 0.5
        return hidden & (
            torch.arange(shape[-1]) > 0
        )  # every row keeps a key: eager's rows without one are nan
    if dtype == torch.int8:
        return torch.randint(-1, 2, shape, generator=random, dtype=dtype)  # sums stay small
    return torch.randperm(math.prod(shape), generator=random).reshape(shape)


# ------------------------------------------------------------------------------------------ carried arguments

Values = Mapping[str, object]


def _attention_arguments(v: Values) -> tuple[dict[str, object], list[dict[str, object]]]:
    q, k = v["q"], v["k"]
    assert isinstance(q, Tensor) and isinstance(k, Tensor)
    (b, h, s, _), t = q.shape, k.shape[2]
    random = torch.Generator().manual_seed(11)
    seen = torch.rand((b, 1, s, t), generator=random) < 0.6
    some = seen | (torch.arange(t) == 0)
    empty = some & (torch.arange(s) > 0)[:, None]
    padding = torch.rand((b, t), generator=random) < 0.6
    padding[:, 0] = True
    additive = torch.randn((b, h, s, t), generator=random).to(q.dtype)
    plain = {"scale": 1.0, "causal": False, "offset": 0, "empty_rows_mean": False}
    plain |= dict.fromkeys(("offset_tensor", "window", "key_padding", "bias", "softcap", "sinks"))
    everything = {
        "causal": True,
        "offset": 1,
        "key_padding": padding,
        "bias": additive,
        "softcap": 5.0,
        "scale": 0.3,
    }
    return plain, [
        {"scale": 0.375},
        {"causal": True, "offset": 1},
        {"causal": True, "offset_tensor": torch.tensor([2])},
        {"causal": True, "window": 3},
        {"key_padding": padding},
        {"bias": additive},
        {"bias": additive[:, :1]},
        {"bias": some},
        {"bias": some, "softcap": 5.0, "scale": 0.25},
        {"bias": empty, "empty_rows_mean": True},
        {"softcap": 5.0},
        {"sinks": torch.randn(h, generator=random).to(q.dtype)},
        everything,
    ]


def _norm_arguments(v: Values) -> tuple[dict[str, object], list[dict[str, object]]]:
    x = v["x"]
    assert isinstance(x, Tensor)
    weight, bias = torch.randn((2, x.shape[-1]), generator=torch.Generator().manual_seed(12)).to(x.dtype)
    plain = {"weight": None, "bias": None, "eps": 1e-6, "weight_offset": 0.0, "cast_before_scale": True}
    return plain, [
        {"eps": 0.125},
        {"weight": weight},
        {"weight": weight.float()},
        {"weight": weight, "weight_offset": 1.0, "cast_before_scale": False},
        {"weight": weight, "bias": bias, "eps": 0.125},
    ]


def _linear_arguments(v: Values) -> tuple[dict[str, object], list[dict[str, object]]]:
    weight = v["weight"]
    assert isinstance(weight, Tensor)
    bias = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(13)).to(weight.dtype)
    return {"bias": None}, [{"bias": bias}]


def _rope_arguments(v: Values) -> tuple[dict[str, object], list[dict[str, object]]]:
    return {"interleaved": False}, [{"interleaved": True}]


def _experts_arguments(v: Values) -> tuple[dict[str, object], list[dict[str, object]]]:
    gate_up, down = v["gate_up"], v["down"]
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    random = torch.Generator().manual_seed(15)
    plain = {"kind": "silu", "interleaved": False, "limit": None, "up_offset": 0.0}
    plain |= {"gate_up_bias": None, "down_bias": None, "gate_softcap": None, "up_softcap": None}
    biases = {
        "gate_up_bias": torch.randn(gate_up.shape[:2], generator=random).to(gate_up.dtype),
        "down_bias": torch.randn(down.shape[:2], generator=random).to(down.dtype),
    }
    return plain, [
        {"kind": "gelu"},
        biases,
        biases | {"kind": "quick_gelu", "interleaved": True, "limit": 1.5, "up_offset": 1.0},
        {"gate_softcap": 1.5, "up_softcap": 2.5},
    ]


def _fused_arguments(v: Values) -> tuple[dict[str, object], list[dict[str, object]]]:
    x, weight = v["x"], v["weight"]
    assert isinstance(x, Tensor) and isinstance(weight, Tensor)
    random = torch.Generator().manual_seed(14)
    part = lambda *shape: torch.randn(shape, generator=random).to(x.dtype)
    features, inner = weight.shape
    plain: dict[str, object] = dict.fromkeys(
        ("bias", "norm", "norm_weight", "norm_bias", "activation", "residual")
    )
    plain |= {"eps": 0.0, "weight_offset": 0.0, "cast_before_scale": True, "gated": False}
    late = {"eps": 0.125, "weight_offset": 1.0, "cast_before_scale": False}
    return plain, [
        {"bias": part(features)},
        {"norm": "rms", "norm_weight": part(inner), "eps": 0.125},
        {"norm": "rms", "norm_weight": part(inner), **late},
        {"norm": "layer", "norm_weight": part(inner), "norm_bias": part(inner), "eps": 0.125},
        {"activation": "gelu"},
        {"activation": "silu", "gated": features % 2 == 0},
        {"activation": "relu", "residual": part(*x.shape[:-1], features)},
        {"bias": part(features), "residual": part(features)},
    ]


CARRIED = {
    "fused_linear": _fused_arguments,
    "add_rms_norm": _norm_arguments,
    "add_layer_norm": _norm_arguments,
    "attention_scores": _attention_arguments,
    "attention_weights": _attention_arguments,
    "attention": _attention_arguments,
    "rms_norm": _norm_arguments,
    "layer_norm": _norm_arguments,
    "linear": _linear_arguments,
    "experts": _experts_arguments,
    "rope": _rope_arguments,
}


def carried(rule: Rule, side: Side, values: Values) -> list[dict[str, object]]:
    """What the arguments that a rule leaves open may be: first their defaults, then random ones."""
    if not rule.carry:
        return [{}]
    op = next(p.target for p in side.parts if any(isinstance(a, Carried) for a in p.args))
    plain, others = CARRIED[str(g.base_name(op))](values)
    plain = {name: plain[name] for name in rule.carry}
    chosen = [
        {n: c for n, c in other.items() if n in rule.carry}
        for other in others
        if set(other) & set(rule.carry)
        # a mask that hides whole rows goes with what such rows become
        and ("empty_rows_mean" not in other or "empty_rows_mean" in rule.carry)
    ]
    return [plain, *(plain | choice for choice in chosen)]


# ----------------------------------------------------------------------------------------- running one side


def run(
    side: Side, values: Values, at: Point, open_: Values, rule: Rule, *, raised: bool = False
) -> tuple[Tensor, ...]:
    """A traced side on values, its literals evaluated at the point; with `raised`, all floats are fp64."""
    names: dict[str, object] = {**at.sizes, **{k: v for k, v in values.items() if not isinstance(v, Tensor)}}
    for spec in tensors(rule).values():
        names |= {
            w: 1 if at.ones else at.size(w) for w in spec.dims.split() if w.endswith("|1") and w[:3] != "..."
        }
    made: dict[Part, object] = {}

    def up(value: object) -> object:
        return value.double() if raised and isinstance(value, Tensor) and value.is_floating_point() else value

    def argument(value: object) -> object:
        if isinstance(value, Part):
            return made[value]
        if isinstance(value, tuple):
            lead = [v.text for v in value[:2] if isinstance(v, Symbolic)] == ["lead0", "lead1"]
            return [*(at.lead if lead else ()), *(argument(v) for v in value[2 if lead else 0 :])]
        if isinstance(value, Symbolic):
            return evaluate(value, names)
        if isinstance(value, Parameter):
            return names[value.name]
        if isinstance(value, Carried):
            return up(open_[value.name])
        if raised and isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        if raised and isinstance(value, float) and value in LOWEST:
            return torch.finfo(torch.float64).min
        return value

    for part in side.parts:
        if part.leaf:
            made[part] = up(values[part.leaf])
        else:
            kwargs = {k: argument(v) for k, v in part.kwargs.items()}
            made[part] = part.target(*(argument(a) for a in part.args), **kwargs)  # type: ignore[operator]  # a call
    return tuple(argument(out) for out in side.outputs)  # type: ignore[misc]  # tensors


def pattern_of(rule: Rule, values: Values) -> tuple[Callable[..., object], list[Tensor]]:
    """The pattern as a model: a function of its tensors alone, and those tensors."""
    names = [n for n, v in values.items() if isinstance(v, Tensor)]
    fixed = {n: v for n, v in values.items() if not isinstance(v, Tensor)}
    around = AROUND.get(rule.name, lambda x: x)

    def model(*given: Tensor) -> object:
        result = rule.pattern(**dict(zip(names, given, strict=True)), **fixed)
        return around(result) if isinstance(result, Tensor) else result

    return model, [values[n] for n in names]  # type: ignore[misc]  # tensors
