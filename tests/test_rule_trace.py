"""Rules as values: specs, literals as expressions of names, variants, and what is an error in making one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from graphopt import ops
from graphopt.binding import evaluate
from graphopt.errors import RuleError
from graphopt.passes.canonicalize import canonicalize
from graphopt.rule import Float, Int, Part, Rule, Side, Symbolic, T, rule, variants
from graphopt.rule_trace import needed_targets
from tests.rule_cases import NAMED

aten = torch.ops.aten
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def literals(side: Side) -> set[str]:
    """The expressions that a traced side holds."""

    def within(value: object) -> set[str]:
        if isinstance(value, Symbolic):
            return {value.text}
        if isinstance(value, (tuple, list)):
            return {t for v in value for t in within(v)}
        return set()

    return {t for p in side.parts if not p.leaf for t in within((p.args, tuple(p.kwargs.values())))}


def only(found: Rule, *dtypes: torch.dtype) -> Side:
    """The pattern of a rule's single variant."""
    (variant,) = variants(found, dtypes or (F32,), canonicalize)
    return variant.pattern


def test_literals_are_expressions_of_names() -> None:
    """Halves, products and the sizes of symbols: nothing of the trace's own sizes is left."""
    assert literals(only(NAMED["llama_rope"])) == {"d", "d // 2", "s", "b|1"}
    assert {"hk * g", "g", "hk", "t", "d", "e", "b"} >= literals(only(NAMED["repeated_heads"]))
    assert literals(only(NAMED["llama_rms_norm"])) == {"eps"}


def test_scalars_may_be_combined() -> None:
    """f, 1 / f, f * g and f / g are told apart; a constant stays one."""

    def scaled(x: Tensor, a: float, b: float) -> Tensor:
        return (x + a) * b

    found = rule(
        scaled, lambda x, a, b: (x + a * b) * (1.0 / b) + a / b, x=T("n"), a=Float(0.3), b=Float(0.7)
    )
    (variant,) = variants(found, (F32,), canonicalize)
    assert literals(variant.pattern) == {"a", "b"}
    texts = literals(variant.replacement)
    assert {"a * b", "1.0 / b"} <= texts
    assert evaluate(Symbolic("a * b", ("a", "b")), {"a": 2.0, "b": 4.0}) == 8.0
    constant = rule(lambda x: x * math.pi, lambda x: x, x=T("n"))
    assert not literals(only(constant))


def test_a_lowest_number_is_that_of_the_dtype() -> None:
    """finfo(dtype).min is a constant of each variant, not an expression."""
    found = {v.dtypes[0][1]: v for v in variants(NAMED["filled_mask"], (F32, BF16, F16, F64), canonicalize)}
    for dtype, variant in found.items():
        (part,) = [p for p in variant.pattern.parts if p.target is aten.masked_fill.Scalar]
        assert part.args[2] == torch.finfo(dtype).min


def test_variants_follow_the_dtypes_that_are_there() -> None:
    """A cast that vanishes in fp32 is in the bf16 variant; two dtype variables give each combination once."""
    norm = NAMED["llama_rms_norm"]
    casts = lambda v: sum(p.target is aten.to.dtype for p in v.pattern.parts)
    assert [casts(v) for v in variants(norm, (F32,), canonicalize)] == [0]
    assert [casts(v) for v in variants(norm, (BF16,), canonicalize)] == [2]
    both = variants(norm, (F32, BF16), canonicalize)
    assert len(both) == 4 and len({v.dtypes for v in both}) == 4
    assert not variants(norm, (torch.int64,), canonicalize)


def test_the_longest_variant_comes_first() -> None:
    """Else a weight's cast would be left outside of the norm that casts it."""
    lengths = [len(v.pattern.parts) for v in variants(NAMED["gemma_rms_norm"], (F32, BF16), canonicalize)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


def test_an_optional_parameter_has_a_variant_without_it() -> None:
    """T(optional=True): None is passed to both sides."""

    def shifted(x: Tensor, bias: Tensor | None) -> Tensor:
        return x.exp() if bias is None else x.exp() + bias

    found = rule(
        shifted,
        lambda x, bias: x.sin() if bias is None else x.sin() + bias,
        x=T("n"),
        bias=T("n", optional=True),
    )
    assert {v.absent for v in variants(found, (F32,), canonicalize)} == {(), ("bias",)}


def test_needed_targets_are_the_operators_of_torch() -> None:
    """A rule is traced for good only where all of them occur."""
    assert aten.rsqrt.default in needed_targets(NAMED["llama_rms_norm"], canonicalize)
    assert needed_targets(NAMED["flat_weighted_values"], canonicalize) == {
        *(aten.reshape.default, aten.matmul.default)
    }


def test_the_anchor_is_the_first_output() -> None:
    """Matching starts there."""
    (variant,) = variants(NAMED["residual_rms_norm"], (F32,), canonicalize)
    assert isinstance(variant.anchor, Part) and variant.anchor.target is ops.rms_norm.overload


# --------------------------------------------------------------------------------------------------- errors


def plain(x: Tensor) -> Tensor:
    """A pattern of one call."""
    return x.exp()


def test_each_parameter_needs_one_spec() -> None:
    """The message has the names."""
    with pytest.raises(
        RuleError, match=r"plain takes \('x',\), but specs are given for \('y',\); name each once"
    ):
        rule(plain, plain, y=T("n"))


def unused_scale(x: Tensor, scale: float) -> Tensor:
    """Forgets its scale."""
    return x.exp()


def branching(x: Tensor) -> Tensor:
    """Another graph at other sizes."""
    return x.exp() if x.shape[0] < 3000 else x.sin()


def burnt_in(x: Tensor) -> Tensor:
    """A size that is no expression of the names."""
    return x.reshape(-1)[: (x.shape[0] * 7919) % 613].exp()


def constant_tensor(x: Tensor) -> Tensor:
    """Holds a tensor of its own."""
    return x.exp() * torch.tensor([1.0, 2.0])[0]


@pytest.mark.parametrize(
    ("pattern", "specs", "message"),
    [
        (
            unused_scale,
            {"scale": Float(0.3)},
            "parameter 'scale' leaves no trace in the pattern; use it or drop it",
        ),
        (branching, {}, "it is another graph at other sizes; split it into a rule for each"),
        (burnt_in, {}, r"the literal \d+ is no expression of x"),
        (lambda x: x, {}, "the pattern has to compute each of its outputs"),
        (lambda x: x.reshape(3, 5).exp(), {}, "cannot be traced"),
    ],
)
def test_what_is_no_rule_is_an_error(pattern: object, specs: dict[str, Float], message: str) -> None:
    """When its variants are made, and by name."""
    names = ("x", *specs)
    made = rule(
        pattern, (lambda x: x.sin()) if len(names) == 1 else (lambda x, scale: x.sin()), x=T("n"), **specs
    )  # type: ignore[arg-type]
    with pytest.raises(RuleError, match=message):
        variants(made, (F32,), canonicalize)


def test_both_sides_have_as_many_outputs() -> None:
    """One each."""
    made = rule(plain, lambda x: (x.sin(), x.cos()), x=T("n"))
    with pytest.raises(RuleError, match="the pattern has 1 outputs, the replacement 2"):
        variants(made, (F32,), canonicalize)


def test_too_many_scalars_are_refused() -> None:
    """Each needs a factor of its own to be told apart."""

    def four(x: Tensor, a: float, b: float, c: float, d: float) -> Tensor:
        return x * a + b * x - c * x.exp() + d

    many = {n: Float(0.1 * (i + 1)) for i, n in enumerate("abcd")}
    with pytest.raises(RuleError, match="4 Float parameters; at most 3"):
        variants(rule(four, lambda x, a, b, c, d: x, x=T("n"), **many), (F32,), canonicalize)


def test_a_dimension_and_an_int_of_one_name_are_one_number() -> None:
    """`rotary` is a size of cos and the end of a slice."""
    found = rule(
        lambda x, t, rotary: x[:, :rotary] * t,
        lambda x, t, rotary: x,
        x=T("n d"),
        t=T("n rotary"),
        rotary=Int(6),
    )
    assert literals(only(found)) == {"rotary"}
