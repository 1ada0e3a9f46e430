"""Every rule of the default table: its equation holds, it fires on its own pattern, it refuses all else."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.accuracy import raise_to_fp64
from graphopt.defaults import RULES
from graphopt.match import VIEWS
from graphopt.passes.canonicalize import canonicalize
from graphopt.rule import Rule, Variant, variants
from tests.mutations import mutants, read_outside
from tests.rewriting import agree, canonical, outputs, rewritten, vocabulary
from tests.rule_cases import (
    AROUND,
    DTYPES,
    SQUARE,
    TIDY,
    Point,
    arguments,
    by_rule,
    carried,
    pattern_of,
    points,
    run,
    small,
    table_of,
    tensors,
)
from tests.tolerances import IN_FP64, close

# Where a rule is right not to fire on its own pattern.
UNFIRED = frozenset(
    {
        # One column has no second half to turn with.
        ("llama_rope", "d is 1"),
        ("upcast_rope", "d is 1"),
        ("backward_rope", "d is 1"),
        ("token_rope", "d is 1"),
        ("deepseek_rope", "d is 1"),
        ("token_deepseek_rope", "d is 1"),
        # One expert a row: neither a reshape of ids nor a sum that says so; the rows' experts are found.
        ("batched_routing", "k is 1"),
        ("batched_routing_of_plain_experts", "k is 1"),
        ("llama4_experts", "t is 1"),  # nor a reshape of scores: another rule of one row's
        ("inkling_shared_experts", "e is 1"),  # nor a broadcast: another rule
        ("interleaved_heads", "g is 1"),
        ("repeated_heads", "g is 1"),  # nothing is repeated: the pattern is plain attention
        ("expanded_head", "h is 1"),
        ("unflattened_scores", "b is 1"),  # the shape is what it was
        ("unflattened_biased_scores", "b is 1"),
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
    given = [{*dtypes, *rule.fixed_dtypes()} for dtypes in PRESENT]
    found = {v.dtypes + (v.absent,): v for dtypes in given for v in variants(rule, dtypes, canonicalize)}
    return list(found.values())


def lowest(rule: Rule, *dtypes: torch.dtype) -> torch.dtype:
    """The dtype whose tolerance counts: of its variables, and of what the rule names outright."""
    used = {*dtypes, *rule.fixed_dtypes()}
    return max(used, key=lambda d: torch.finfo(d).eps, default=torch.float32)


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
                    agree(exact, want, have, lowest(rule, *dtypes.values()), f"{label}, {dtypes}, {open_}")
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
            agree(*triple, lowest(rule, *([dtype] if rule.dtype_variables() else [])), label)
        again, more = rewritten(after, (rule,))
        assert not more.matches and g.fingerprint(again.graph) == g.fingerprint(after.graph), label
        if dtype == torch.float32 and label in ("tidy", "square"):
            table = table_of(rule)
            whole, _ = rewritten(before, table)
            half_way = {"attention_scores", "attention_weights"}
            assert set(vocabulary(after)) <= {*vocabulary(whole), *half_way}, label
            for triple in zip(exact, eager, whole(*inputs), strict=True):
                agree(*triple, lowest(rule, dtype), label)
            assert not rewritten(whole, table)[1].matches


@by_rule
def test_fires_with_symbols(rule: Rule) -> None:
    """Every size a symbol of its own and every scalar a graph value, as with dynamic=True: one match."""
    at = Point(TIDY)
    values = arguments(rule, at)
    mode = torch_private.new_fake_mode(symbolic=True)
    literal = {n for n in TIDY if n in rule.specs} | (
        {"d"} if "rope" in rule.name else set()
    )  # even, for sure
    symbols = {n: m if n in literal else torch_private.symbolic_int(mode, n, m) for n, m in TIDY.items()}
    lead = [torch_private.symbolic_int(mode, f"lead{i}", n) for i, n in enumerate(at.lead)]
    fakes: list[object] = []
    for spec in tensors(rule).values():
        sizes: list[object] = []
        for word in spec.dims.split():
            named = word.removesuffix("|1").split("*") if word[:3] != "..." else []
            factors = [int(f) if f.isdigit() else symbols[f] for f in named]
            sizes += [math.prod(factors)] if factors else lead
        with mode:
            fakes.append(torch.empty(sizes, dtype=at.dtype(spec)))  # type: ignore[call-overload]  # symbolic sizes
    scalars = {n: v for n, v in values.items() if isinstance(v, float) and n != "fill"}  # guards look at it
    fakes += [torch_private.symbolic_float(mode, n, v) for n, v in scalars.items()]
    names = [*tensors(rule), *scalars]
    fixed = {n: v for n, v in values.items() if n not in names}
    around = AROUND.get(rule.name, lambda x: x)

    def program(*given: object) -> object:
        result = rule.pattern(**dict(zip(names, given, strict=True)), **fixed)
        return around(result) if isinstance(result, Tensor) else result

    before = canonical(program, *fakes)
    after, seen = rewritten(before, (rule,))
    assert [m.rule for m in seen.matches] == [rule.name], seen.refusals
    real = [values[n] for n in names]
    for triple in zip(raise_to_fp64(before)(*real), outputs(program(*real)), after(*real), strict=True):
        agree(*triple, lowest(rule), "symbols")


# ------------------------------------------------------------------------------------------------- refusing


def numbers(gm: fx.GraphModule, inputs: list[Tensor]) -> list[Tensor]:
    """A graph's results in fp64, where rounding hides nothing."""
    return [x for x in raise_to_fp64(gm)(*inputs) if isinstance(x, Tensor)]


@by_rule
def test_no_mutant_of_the_pattern_becomes_something_else(rule: Rule) -> None:
    """Wherever a rule, or the whole table, fires on a mutant of the pattern, its numbers and dtypes stay."""
    refused = 0
    for sizes, dtype in ((SQUARE, torch.float32), (TIDY, torch.float32), (SQUARE, torch.bfloat16)):
        model, inputs = pattern_of(rule, arguments(rule, small(rule, sizes, dtype)))
        gm = canonical(model, *inputs)
        for label, mutant in mutants(gm):
            for rules in ((rule,), table_of(rule)) if sizes is SQUARE else ((rule,),):
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
                    torch.testing.assert_close(have, want, equal_nan=True, msg=worst, **IN_FP64)
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
            close(have, want, lowest(rule))
        if inner.target in VIEWS or inner.name == anchor:
            continue
        if rule.optional() and [m.nodes[0] for m in seen.matches] == [inner.name]:
            continue  # the pattern without its optional parameters ends there
        assert not seen.matches, f"{inner} is also returned"
        assert any(r.reason == f"{inner} is also used by output" for r in seen.refusals), seen.refusals


# ------------------------------------------------------------------------------------------- several rules


def _turned(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * c + torch.cat((-x[..., half:], x[..., :half]), -1) * s


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    """rope, repeated kv heads, a softcap, an additive mask, the transpose back: attention's neighbours."""
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    q, k = _turned(q, c, s), _turned(k, c, s)
    k, v = (x[:, :, None].expand(4, 2, 2, 4, 4).reshape(4, 4, 4, 4) for x in (k, v))
    scores = torch.tanh(q @ k.transpose(2, 3) * 0.5 / 30.0) * 30.0 + mask
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(4, 4, 16)


def gated_block(x: Tensor, r: Tensor, w: Tensor, up: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """A residual, a norm and a gated MLP."""
    x = x + r
    h = w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
    return torch.nn.functional.silu(h @ gate.T) * torch.nn.functional.linear(h, up), x


def gelu_block(x: Tensor, r: Tensor, w: Tensor, b: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """A residual, a layer norm and GPT-2's GELU."""
    x = x + r
    h = torch.nn.functional.linear(torch.nn.functional.layer_norm(x, (4,), w, b), up)
    return 0.5 * h * (1.0 + torch.tanh(0.7978845608028654 * (h + 0.044715 * h.pow(3.0)))), x


BLOCKS = {
    grouped_attention: ((4, 4, 4, 4), (4, 2, 4, 4), (4, 2, 4, 4), (4, 4, 4), (4, 4, 4), (4, 4, 4, 4)),
    gated_block: ((4, 4), (4, 4), (4,), (4, 4), (4, 4)),
    gelu_block: ((4, 4), (4, 4), (4,), (4,), (4, 4)),
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda f: f.__name__)
def test_no_mutant_of_a_block_becomes_something_else(block: Callable[..., object]) -> None:
    """What the whole table makes of a wrong block is as wrong as the block, and equal to it."""
    random = torch.Generator().manual_seed(5)
    inputs = [torch.randn(shape, generator=random) for shape in BLOCKS[block]]
    gm = canonical(block, *inputs)
    made = vocabulary(rewritten(gm, RULES)[0])
    changed = 0
    for label, mutant in mutants(gm):
        after, _ = rewritten(mutant, RULES)
        changed += vocabulary(after) != made
        try:
            expected = numbers(mutant, inputs)
        except (RuntimeError, ValueError, IndexError):
            continue
        for want, have in zip(expected, numbers(after, inputs), strict=True):
            torch.testing.assert_close(have, want, equal_nan=True, msg=label, **IN_FP64)
    assert changed > 10
