"""Every guard has a program that it alone refuses: without the guard the rule fires on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphopt import graph as g
from graphopt import ops
from graphopt.binding import Miss
from graphopt.match import match
from graphopt.passes.canonicalize import canonicalize
from graphopt.rule import Rule, variants
from tests.rewriting import canonical, rewritten
from tests.rule_cases import EQUATIONS, FUSED_EQUATIONS, TIDY, Point, arguments, pattern_of

RULES = {r.name: r for r in (*EQUATIONS, *FUSED_EQUATIONS)}
GUARDS = sorted({rule.guard.__name__ for rule in RULES.values() if rule.guard is not None})
Trip = tuple[str, Callable[..., object], tuple[Tensor, ...], str]


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


Q, K, V, HIDDEN = rand(2, 2, 4, 8), rand(2, 2, 6, 8), rand(2, 2, 6, 8), torch.ones(2, 1, 4, 6).bool()
scores = lambda q, k: ops.attention_scores(q, k, 1.0)

ODD = (rand(2, 2, 4, 7), rand(2, 2, 4, 7), rand(1, 4, 7), rand(1, 4, 7))


def odd_turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A head of 7, split 3 and 4"""
    turn = lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1)
    c, s = cos[:, None], sin[:, None]
    return q * c + turn(q) * s, k * c + turn(k) * s


def of_rows(rows: int, name: str) -> tuple[Callable[..., object], tuple[Tensor, ...]]:
    """A rule's own pattern on so many rows."""
    program, inputs = pattern_of(RULES[name], arguments(RULES[name], Point(TIDY, lead=(rows,))))
    return program, tuple(inputs)


# By the guard's name: a rule, a program, its inputs, and what the guard says.
TRIPS: dict[str, Trip] = {
    "_even": ("llama_rope", odd_turn, ODD, "head_dim 7 is odd"),
    "_not_fp64": (
        "bloom_gelu",
        RULES["bloom_gelu"].pattern,
        (rand(2, 8, dtype=torch.float64),),
        "0.79788456 is not sqrt(2 / pi) in fp64",
    ),
    "_feeds_softmax": (
        "product_scores",
        lambda q, k: (q @ k.transpose(2, 3)).relu(),
        (Q, K),
        "no softmax follows the product",
    ),
    "_positive": (
        "gemma_softcap",
        lambda q, k: torch.tanh(scores(q, k)) * -5.0,
        (Q, K),
        "the softcap -5.0 is not positive",
    ),
    "representable": (
        "hidden_mask",
        lambda q, k, hidden: torch.where(hidden, -1e39, scores(q, k)),
        (Q, K, HIDDEN),
        "the fill -1e+39 is beyond",
    ),
    "_low": (
        "low_filled_weights",
        lambda q, k, hidden: torch.softmax(scores(q, k).masked_fill(hidden, -1e4), -1),
        (Q, K, HIDDEN),
        "the fill -10000.0 > -1000000000.0: a score may be as low",
    ),
    "_is_input": (
        "dynamic_cache",
        lambda k, v: torch.cat([k * 2.0, v], -2),
        (K, V),
        "mul is no input of the graph, so no cache",
    ),
    "_few_rows": ("layer_normed_linear", *of_rows(65, "layer_normed_linear"), "65 rows > "),
    "_few_rows_of_one_dtype": ("rms_normed_linear", *of_rows(65, "rms_normed_linear"), "65 rows > "),
}


def test_every_guard_is_tripped() -> None:
    missing = sorted(set(GUARDS) - set(TRIPS))
    assert not missing, f"no program trips {missing}; add a row to TRIPS"


@pytest.mark.parametrize("name", TRIPS)
def test_the_guard_alone_refuses(name: str) -> None:
    rule_name, program, inputs, reason = TRIPS[name]
    rules = [r for r in (*EQUATIONS, *FUSED_EQUATIONS) if r.name == rule_name]
    assert rules and all(r.guard is not None and r.guard.__name__ == name for r in rules)
    gm = canonical(program, *inputs)
    assert not rewritten(gm, rules)[1].matches
    assert any(said.startswith(reason) for said in reasons(gm, rules)), reasons(gm, rules)
    open_rules = [dataclasses.replace(r, guard=None) for r in rules]
    assert fires(gm, open_rules), "another part of the rule refuses it, too"


def reasons(gm: torch.fx.GraphModule, rules: list[Rule]) -> list[str]:
    """Why the rules do not match, anywhere; the rewriter tells only what came far."""
    dtypes = {g.dtype(n) for n in gm.graph.nodes if g.is_tensor(n)}
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    tried = [(v, n) for r in rules for v in variants(r, dtypes, canonicalize) for n in calls]
    found = [match(v, n) for v, n in tried if n.target == v.anchor.target]
    return [miss.reason for miss in found if isinstance(miss, Miss)]


def fires(gm: torch.fx.GraphModule, rules: list[Rule]) -> bool:
    """Whether a rule matches; one whose result is then an error of the op's own has matched."""
    try:
        return bool(rewritten(gm, rules)[1].matches)
    except (RuntimeError, ValueError):
        return True
