"""Every rule of the default table: its equation holds, it fires on its own pattern, it refuses all else."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, fx

from graphopt import graph as g
from graphopt.accuracy import HALF, judge, raise_to_fp64
from graphopt.defaults import RULES
from graphopt.match import VIEWS
from graphopt.passes.canonicalize import canonicalize
from graphopt.rule import Rule, Variant, variants
from tests.mutations import mutants, read_outside
from tests.rule_cases import (
    DTYPES,
    EQUATIONS,
    SQUARE,
    TIDY,
    Point,
    arguments,
    canonical,
    carried,
    outputs,
    pattern_of,
    points,
    rewritten,
    run,
    vocabulary,
)
from tests.tolerances import close

by_rule = pytest.mark.parametrize("rule", EQUATIONS, ids=lambda r: r.name)
# Where a rule is right not to fire on its own pattern.
UNFIRED = frozenset(
    {
        ("llama_rope", "d is 1"),  # one column has no second half to turn with
        ("repeated_heads", "g is 1"),  # nothing is repeated: the pattern is plain attention
    }
)
# The same dtype everywhere, and the mixtures that models have: fp32 norm weights with half activations.
PRESENT = (
    (torch.float64,),
    (torch.float32,),
    (torch.bfloat16,),
    (torch.float16,),
    (torch.float32, torch.bfloat16),
)


def of_dtypes(rule: Rule) -> list[Variant]:
    """A rule's variants for each of `PRESENT`, each once."""
    found = {v.dtypes + (v.absent,): v for dtypes in PRESENT for v in variants(rule, dtypes, canonicalize)}
    return list(found.values())


def lowest(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype whose tolerance counts."""
    return max(dtypes.values(), key=lambda d: torch.finfo(d).eps, default=torch.float32)


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


@by_rule
def test_equation_holds(rule: Rule) -> None:
    """Both sides agree with the pattern in fp64, in shape and dtype, with carried arguments."""
    tried = 0
    for variant in of_dtypes(rule):
        dtypes = dict(variant.dtypes)
        for label, at in points(rule, dtypes):
            if (rule.name, label) in UNFIRED:
                continue
            values = arguments(rule, at, variant.absent)
            for open_ in carried(rule, variant.pattern, values):
                try:
                    eager = run(variant.pattern, values, at, open_, rule)
                except (RuntimeError, ValueError, IndexError):
                    continue  # a pattern that does not run at these sizes is in no model
                tried += 1
                oracle = run(variant.pattern, values, at, open_, rule, raised=True)
                ours = run(variant.replacement, values, at, open_, rule)
                for want, have, exact in zip(eager, ours, oracle, strict=True):
                    assert (want.shape, want.dtype) == (have.shape, have.dtype), (label, dtypes, open_)
                    agree(exact, want, have, lowest(dtypes), f"{label}, {dtypes}, {open_}")
    assert tried >= 4


@by_rule
def test_traces_are_the_functions(rule: Rule) -> None:
    """A side traced at large primes and evaluated at small sizes is bitwise the plain function there."""
    for variant in of_dtypes(rule):
        for label, at in points(rule, dict(variant.dtypes)):
            values = arguments(rule, at, variant.absent)
            open_ = carried(rule, variant.pattern, values)[0]
            for side, function in ((variant.pattern, rule.pattern), (variant.replacement, rule.replacement)):
                try:
                    expected = outputs(function(**values))
                except (RuntimeError, ValueError, IndexError):
                    continue
                for want, have in zip(expected, run(side, values, at, open_, rule), strict=True):
                    assert torch.equal(want.nan_to_num(7), have.nan_to_num(7)), (label, variant.dtypes)


# --------------------------------------------------------------------------------------------------- firing


@by_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fires_on_its_own_pattern(rule: Rule, dtype: torch.dtype) -> None:
    """At every point the rule turns its own pattern into its replacement, to the same numbers, once."""
    for label, at in points(rule, dict.fromkeys(rule.dtype_variables(), dtype)):
        values = arguments(rule, at)
        model, inputs = pattern_of(rule, values)
        try:
            eager = outputs(model(*inputs))
        except (RuntimeError, ValueError, IndexError):
            continue  # no model looks so
        before = canonical(model, *inputs)
        exact = raise_to_fp64(before)(*inputs)
        after, seen = rewritten(before, (rule,))
        if (rule.name, label) in UNFIRED:
            assert not seen.matches
            continue
        assert [m.rule for m in seen.matches] == [rule.name], (label, seen.refusals)
        after.graph.lint()
        for triple in zip(exact, eager, after(*inputs), strict=True):
            agree(*triple, dtype, label)
        again, more = rewritten(after, (rule,))
        assert not more.matches and g.fingerprint(again.graph) == g.fingerprint(after.graph), label
        if dtype == torch.float32 and label in ("tidy", "square"):
            whole, _ = rewritten(before, RULES)
            assert set(vocabulary(after)) <= {*vocabulary(whole), "attention_scores"}, label
            for triple in zip(exact, eager, whole(*inputs), strict=True):
                agree(*triple, dtype, label)
            assert not rewritten(whole, RULES)[1].matches


# ------------------------------------------------------------------------------------------------- refusing


def numbers(gm: fx.GraphModule, inputs: list[Tensor]) -> list[Tensor]:
    """A graph's results in fp64, where rounding hides nothing."""
    return [x for x in raise_to_fp64(gm)(*inputs) if isinstance(x, Tensor)]


@by_rule
def test_no_mutant_of_the_pattern_becomes_something_else(rule: Rule) -> None:
    """Wherever a rule, or the whole table, fires on a mutant of the pattern, its numbers and dtypes stay."""
    refused = 0
    for sizes, dtype in ((SQUARE, torch.float32), (TIDY, torch.float32), (SQUARE, torch.bfloat16)):
        at = Point(sizes, lead=(4,), dtypes=dict.fromkeys(rule.dtype_variables(), dtype))
        model, inputs = pattern_of(rule, arguments(rule, at))
        gm = canonical(model, *inputs)
        for label, mutant in mutants(gm):
            for rules in ((rule,), RULES) if sizes is SQUARE else ((rule,),):
                after, seen = rewritten(mutant, rules)
                if not seen.matches:
                    refused += 1
                    continue
                try:
                    expected = numbers(mutant, inputs)
                except (RuntimeError, ValueError, IndexError):
                    continue  # runs on abstract values alone: an index out of range
                for want, have in zip(expected, numbers(after, inputs), strict=True):
                    worst = f"{label}\n{mutant.graph}\n{after.graph}"
                    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9, equal_nan=True, msg=worst)
                for want_value, have_value in zip(_returned(mutant), _returned(after), strict=True):
                    assert want_value == have_value, label
    assert refused > 4


def _returned(gm: fx.GraphModule) -> list[object]:
    """Shape and dtype of what a graph returns."""
    return [(tuple(g.shape(n)), g.dtype(n)) for n in g.output_node(gm.graph).all_input_nodes]


@by_rule
def test_inner_values_that_are_read_outside_stay(rule: Rule) -> None:
    """An inner value with another reader refuses the match by name; a view is free to be computed twice."""
    model, inputs = pattern_of(rule, arguments(rule, Point(TIDY)))
    before = canonical(model, *inputs)
    anchor = rewritten(before, (rule,))[1].matches[0].nodes[0]  # a guard may want readers around it
    for inner, mutant in read_outside(before):
        after, seen = rewritten(mutant, (rule,))
        for want, have in zip(mutant(*inputs), after(*inputs), strict=True):
            close(have, want, torch.float32)
        if inner.target in VIEWS or inner.name == anchor:
            continue
        assert not seen.matches, f"{inner} is also returned"
        assert any(r.reason == f"{inner} is also used by output" for r in seen.refusals), seen.refusals
