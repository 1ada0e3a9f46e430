"""Every rule of the default table: its equation holds, it fires on its own pattern, it refuses what is not its pattern."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from graphopt.accuracy import HALF, judge, raise_to_fp64
from graphopt.rule import Rule, Variant, variants
from graphopt import graph as g
from graphopt.defaults import RULES
from tests.rule_cases import (
    DTYPES,
    EQUATIONS,
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
PRESENT = ((torch.float64,), (torch.float32,), (torch.bfloat16,), (torch.float16,), (torch.float32, torch.bfloat16))


def of_dtypes(rule: Rule) -> list[Variant]:
    """A rule's variants for each of `PRESENT`, each once."""
    found = {v.dtypes + (v.absent,): v for dtypes in PRESENT for v in variants(rule, dtypes)}
    return list(found.values())


def lowest(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype whose tolerance counts."""
    return max(dtypes.values(), key=lambda d: torch.finfo(d).eps, default=torch.float32)


def agree(exact: Tensor, eager: Tensor, ours: Tensor, dtype: torch.dtype, where: str) -> None:
    """Element by element in full precision; in half, ours may be as far from fp64 as eager is (sums are rounded)."""
    exact, eager, ours = (x.masked_fill(x == torch.finfo(x.dtype).min, -torch.inf) for x in (exact, eager, ours))
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
    """Both sides agree with the pattern in fp64, in shape and dtype, at every point and with every carried argument."""
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
    """At every point the rule turns its own pattern into its replacement, with the same numbers, and only once."""
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
