"""graphopt.question and the fields of a refusal: what is asked about, what is told, expected and found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graphopt import ops
from graphopt.passes.canonicalize import canonicalize
from graphopt.question import SHOWN, Question, answer, within
from graphopt.report import KEPT, Report
from graphopt.rewrite import KEPT_MISSES, UNTRIED, Match, Refusal, Rewriter
from graphopt.rule import Float, T, rule
from tests.rewriting import Watch, canonical, rewritten

# --------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("path", "pattern", "yes"),
    [
        ("model.layers.1.mlp", "model.layers.1.*", True),
        ("model.layers.1.mlp", "model.layers.1", True),
        ("model.layers.1.mlp", "layers.1.mlp", True),
        ("model.layers.1.mlp.act", "mlp", True),
        ("model.layers.11.mlp", "layers.1", False),
        ("model.layers.1.mlp", "attn", False),
        ("", "layers", False),
        ("", "*", True),
    ],
)
def test_modules_are_meant_by_path_end_and_what_is_below(path: str, pattern: str, yes: bool) -> None:
    assert within(path, pattern) is yes


def test_all_of_a_question_has_to_hold() -> None:
    asked = Question("*_norm", "layers.1", "mul_3")
    assert asked.about("t5_rms_norm", ("layers.1.ln",), ("mul_3", "add"))
    assert not asked.about("gelu", ("layers.1.ln",), ("mul_3",))
    assert not asked.about("t5_rms_norm", ("layers.2.ln",), ("mul_3",))
    assert not asked.about("t5_rms_norm", ("layers.1.ln",), ("mul_4",))
    assert str(asked) == "rule *_norm, module layers.1, node mul_3"
    assert str(Question()) == "every rule, everywhere"


MATCH = Match("gelu@layers.0.mlp#1", "gelu", "layers.0.mlp", "model.py:3 y", ("tanh", "mul"), ("activation",))
MISS = Refusal(
    "norm", "sqrt", "layers.0.ln", "model.py:7 h", "expected aten.rsqrt, found aten.sqrt (sqrt)", 3,
    "aten.rsqrt", "aten.sqrt (sqrt) [2,3] f32", "", "mul_2", "layers.0",
)  # fmt: skip


def test_an_answer_has_matches_and_the_nearest_misses_first() -> None:
    near = replace(MISS, depth=5, node="pow")
    told = answer(Question(), (MATCH,), (MISS, near, MISS))
    assert told.matches == (MATCH,) and told.misses == (near, MISS)
    text = str(told)
    for part in (
        "matched gelu in layers.0.mlp  [gelu@layers.0.mlp#1]",
        "tanh, mul -> activation",
        "missed norm in layers.0: 3 nodes matched, from mul_2 up",
        "source    model.py:7 h",
        "expected  aten.rsqrt",
        "found     aten.sqrt (sqrt) [2,3] f32",
    ):
        assert part in text
    assert json.loads(told.to_json())["misses"][0]["node"] == "pow"


def test_a_miss_at_a_place_where_the_rule_matched_in_the_end_is_none() -> None:
    early = replace(MISS, rule="gelu", anchor="tanh")
    assert answer(Question(), (MATCH,), (early, MISS)).misses == (MISS,)


def test_who_took_a_place_is_said() -> None:
    told = answer(Question(rule="norm", node="tanh"), (MATCH,), ())
    assert told.notes == ("gelu took tanh, mul there [gelu@layers.0.mlp#1]",)


def test_a_long_answer_is_cut_in_its_text_only() -> None:
    told = answer(Question(), (), [replace(MISS, node=f"n{i}") for i in range(SHOWN + 4)])
    assert "and 4 misses that came less far" in str(told) and len(told.misses) == SHOWN + 4


def test_a_report_answers_from_what_it_kept_and_says_so() -> None:
    report = Report(matches=(MATCH,), refusals=(MISS,))
    told = report.explain(node="sqrt")
    assert told.misses == (MISS,) and not told.matches and told.notes == (KEPT,)
    again = Report.from_json(report.to_json())
    assert again == report and again.explain(module="mlp").matches == (MATCH,)


# ------------------------------------------------------------------------------------------- what is refused


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def positive(binding: object) -> str | None:
    return f"eps is {binding.number('eps')}" if binding.number("eps") < 0 else None  # type: ignore[attr-defined]


NORM = rule(
    rms_norm,
    lambda x, weight, eps: ops.rms_norm(x, weight, eps),
    x=T("... n"), weight=T("n"), eps=Float(1e-6), guard=positive,
)  # fmt: skip


def furthest(program: Callable[..., object], *inputs: Tensor) -> Refusal:
    """The miss that came furthest, the latest of equals; a mean beside it makes the rule be tried at all."""
    _, watch = asked(lambda x, *rest: (program(x, *rest), x.mean(0)), Question(), *inputs)
    assert not watch.matches
    return max(reversed(watch.refusals), key=lambda r: r.depth)


X, W = torch.randn(2, 3, 8), torch.randn(8)


def test_another_operator_is_expected_and_found() -> None:
    told = furthest(lambda x, w: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)), X, W)
    assert (told.expected, told.found) == ("aten.mean", "aten.sum (sum_1) [2,3,1] f32")
    assert told.guard == "" and told.node.startswith("sum") and told.anchor.startswith("mul")


def test_a_literal_is_expected_and_found() -> None:
    told = furthest(lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)), X, W)
    assert (told.expected, told.found) == ("-1", "-2") or (told.expected, told.found) == ("-1", "1")


def test_a_tensor_of_another_shape_is_told_with_its_shape() -> None:
    told = furthest(
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), X, torch.randn(2, 1, 1)
    )
    assert told.expected == "weight [n] f32" and "[2,1,1] f32" in told.found
    assert told.reason == "weight has 3 dimensions, not 1"


def test_the_guard_that_refused_is_named() -> None:
    told = furthest(lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + -1.0)), X, W)
    assert told.guard == "positive" and told.reason == "eps is -1.0" and told.expected == told.found == ""


def test_a_reader_outside_is_a_guard_too() -> None:
    def program(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * (x * r), r + 1

    told = furthest(program, X, W)
    assert told.guard == "outside_reader" and "is also used by" in told.reason


def test_the_first_operand_that_differs_is_told_of_a_shallow_miss() -> None:
    told = furthest(lambda x, w: w * torch.tanh(x) + torch.rsqrt(x.pow(2)), X, W)
    assert (told.expected, told.found) == ("aten.mul", "aten.tanh (tanh) [2,3,8] f32")


# ------------------------------------------------------------------------------------------ under a question


def asked(program: Callable[..., object], question: Question, *inputs: Tensor) -> tuple[Rewriter, Watch]:
    gm, watch = canonical(program, *inputs), Watch()
    rewriter = Rewriter(gm, (NORM,), canonicalize, (watch,), question=question)
    rewriter.run()
    return rewriter, watch


def test_without_a_question_a_first_node_alone_is_no_near_miss() -> None:
    _, watch = rewritten(canonical(lambda x, w: w * torch.tanh(x), X, W), [NORM])
    assert not watch.refusals


def test_a_rule_whose_operators_are_not_there_says_which() -> None:
    _, watch = asked(lambda x, w: torch.tanh(x) + w, Question(), X, W)
    (told,) = watch.refusals
    assert (
        told.guard == UNTRIED and told.reason == "no aten.mean, aten.mul, aten.pow, aten.rsqrt in the graph"
    )


def test_no_miss_is_cut_off_under_a_question() -> None:
    def many(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(0)
        for _ in range(KEPT_MISSES + 5):
            x = w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6))
        return x, mean

    inputs = torch.randn(2, 4), torch.randn(4)
    gm = canonical(many, *inputs)
    _, cut = rewritten(gm, [NORM])
    assert len(cut.refusals) == KEPT_MISSES
    watch = Watch()
    last = [n.name for n in gm.graph.nodes if n.name.startswith("sum")][-1]
    Rewriter(gm, (NORM,), canonicalize, (watch,), question=Question(node=last)).run()
    assert last not in {r.node for r in cut.refusals}
    assert {r.node for r in watch.refusals if r.depth} == {last}
