"""expect={"attention": 32}: counted in each graph, families, names, and the error with the near misses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import backend, ops
from graphopt.errors import ExpectError, OptionError
from graphopt.expect import FAMILIES, check_expected, operators
from graphopt.options import Options
from graphopt.report import Report
from graphopt.steering import Steering
from tests.models import zoo


def attends(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.5, -1) @ v


def reads_scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.softmax(q @ k.mT * 0.5, -1)
    return scores @ v, scores.sum(-1)


QKV = tuple(torch.randn(2, 3, 5, 4) for _ in range(3))


def compiled(program: Callable[..., object], *args: Tensor, **options: object) -> object:
    torch.compiler.reset()
    with torch.no_grad():
        return torch.compile(program, backend="graphopt", options=options)(*args)


def test_enough_is_enough() -> None:
    torch.testing.assert_close(compiled(attends, *QKV, expect={"attention": 1}), attends(*QKV))
    compiled(attends, *QKV, expect={"attention": 0, "norm": 0})


def test_a_shortfall_raises_before_anything_runs_with_the_near_misses() -> None:
    backend.clear_reports()
    with pytest.raises(
        Exception, match="fewer operators were recognised than expected: attention: 0 of 1"
    ) as e:
        compiled(reads_scores, *QKV, expect={"attention": 1})
    text = str(e.value)
    assert "near miss: weighted_values at " in text and "softmax" in text
    assert len(backend.reports()) == 1


def test_each_graph_is_asked() -> None:
    """A graph break leaves the first half without what the second has."""

    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = torch.tanh(q)
        torch._dynamo.graph_break()
        return attends(q, k, v)

    ends = r"the graph ends before the program does: Call to `torch._dynamo.graph_break\(\)`"
    with pytest.raises(Exception, match=rf"attention: 0 of 1[\s\S]*{ends}[\s\S]*recognised are: none"):
        compiled(broken, *QKV, expect={"attention": 1})


def test_what_is_not_optimised_at_all_has_nothing() -> None:
    def program(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,))

    with pytest.raises(Exception, match=r"linear: 0 of 1[\s\S]*not optimised at all: the higher"):
        compiled(program, torch.ones(3), expect={"linear": 1})


def test_enable_and_optimize_take_it() -> None:
    torch.compiler.reset()
    with (
        torch.no_grad(),
        graphopt.enable(expect={"linear": 2}),
        pytest.raises(Exception, match="linear: 1 of 2"),
    ):
        torch.compile(nn.Linear(3, 4))(torch.ones(2, 3))
    model = graphopt.optimize(nn.Linear(3, 4), expect={"linear": 1})
    assert model(torch.ones(2, 3)).shape == (2, 4)
    graphopt.optimize(model, expect={"linear": 0})  # has no effect on weights: no other form of them


def test_explain_takes_it_and_families_are_sums() -> None:
    model = zoo.model("llama")
    given = zoo.inputs(model, zoo.Case())
    wanted = {"norm": 5, "attention": 2, "gated_activation": 2}
    report = graphopt.explain(model, expect=wanted, use_cache=False, **given)
    assert sum(report.counts.get(name, 0) for name in FAMILIES["norm"]) == 5
    with pytest.raises(ExpectError, match=r"than expected: norm: 5 of 6\s"):
        graphopt.explain(model, expect={**wanted, "norm": 6}, use_cache=False, **given)


def test_near_misses_of_what_is_short_come_first() -> None:
    from graphopt.rewrite import Refusal

    def miss(rule: str, depth: int) -> Refusal:
        return Refusal(rule, "n", "layers.0", "model.py:3 y", "div is also used by output", depth)

    names = ("gelu", "attention_a", "rope", "t5_attention", "a", "b", "c")
    report = Report(near_misses={n: miss(n, i + 2) for i, n in enumerate(names)})
    with pytest.raises(ExpectError) as e:
        check_expected(report, (("attention", 1),))
    shown = [line.split()[2] for line in str(e.value).splitlines() if "near miss" in line]
    assert shown[:2] == ["t5_attention", "attention_a"] and len(shown) == 5
    assert "layers.0 (model.py:3): div is also used by output" in str(e.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"atention": 1}, r"option 'expect' has no operator 'atention'; did you mean 'attention'\?"),
        ({"norms": 1}, r"did you mean 'norm'\?"),
        ({"attention": "2"}, "takes a dict of whole numbers, as {'attention': 32}"),
        ({"attention": True}, "takes a dict of whole numbers"),
        ({"attention": -1}, "takes a dict of whole numbers"),
        ("attention", "takes a dict of whole numbers"),
        ({3: 1}, "takes a dict of whole numbers"),
    ],
)
def test_what_is_wrong_is_named(given: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options.parse({"expect": given})


def test_the_option_is_a_plain_comparable_value() -> None:
    one, two = (
        Options.parse({"expect": e}) for e in ({"rope": 2, "linear": 1}, [("linear", 1), ("rope", 2)])
    )
    assert one == two and hash(one) == hash(two) and one.expect == (("linear", 1), ("rope", 2))
    assert Options.parse({"expect": list(map(list, one.expect))}) == one  # as an artifact's JSON has it


def test_every_operator_may_be_expected() -> None:
    assert set(operators()) == {op.__name__ for op in ops.OPS} | {"norm"}
    assert {name for family in FAMILIES.values() for name in family} <= set(operators())


def test_a_steered_compilation_is_not_asked_and_leaves_out_what_it_should() -> None:
    backend.steer(Steering(skip=frozenset({"recognise", "merge"})))
    try:
        compiled(attends, *QKV, expect={"attention": 1})
        assert "attention" not in backend.reports()[-1].counts
        assert "recognise" not in [p.name for p in backend.reports()[-1].passes]
    finally:
        backend.steer(Steering())
    compiled(attends, *QKV, expect={"attention": 1})
    assert backend.reports()[-1].counts["attention"] == 1
