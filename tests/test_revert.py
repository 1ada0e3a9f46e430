"""Taking a match back: the program without it runs from the next call on, and what cannot be is an error."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor

from graphopt import api, backend, defaults
from graphopt import graph as g
from graphopt.errors import GraphoptError, ReleasedError, RevertError
from graphopt.passes.merge import Merge
from graphopt.pipeline import Context
from graphopt.report import Report
from graphopt.rewrite import Match
from tests.block import MERGED, agree, block, example
from tests.test_verify import Feed
from tests.verifying import ran, wrong_translation

pytestmark = pytest.mark.usefixtures("fresh", "own_certificates")


def compiled(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    return torch.compile(model, backend="graphopt", options={"strict": True, **options})  # type: ignore[return-value]


def match_of(report: Report, name: str) -> Match:
    return next(m for m in report.matches if m.rule == name)


def test_a_match_is_taken_back_at_the_next_call() -> None:
    model, x = block(), example()
    ours = compiled(model)
    agree(ours(x), model(x))
    (report,) = backend.reports()
    merged = match_of(report, "merge_siblings")
    others = {m.id for m in report.matches} - {merged.id}
    report.revert(merged)
    assert {m.id for m in report.matches} == others, "the report is the new program's"
    assert any(r.rule == "merge_siblings" and r.reason == "denied" for r in report.refusals)
    agree(ours(x), model(x))
    assert backend.reports() == (report,), "nothing was compiled anew"
    report.revert(match_of(report, "torch_silu").id)
    agree(ours(x), model(x))
    assert "gated_activation" not in report.counts
    agree(ours(example(7)), model(example(7)))
    assert len(backend.reports()) == 2
    assert match_of(backend.reports()[-1], "torch_silu"), "another graph is another program"


def test_what_was_prepared_for_a_match_goes_with_it() -> None:
    model, x, others = block(), example(), len(backend.STORE)
    ours = compiled(model)
    ours(x)
    assert len(backend.STORE) == others + MERGED
    report = backend.reports()[0]
    report.revert(match_of(report, "merge_siblings"))
    ours(x)
    assert len(backend.STORE) == others + MERGED - 1
    model.q.weight.mul_(2)
    agree(ours(x), model(x))


def test_unknown_matches_and_reports_of_nothing_are_errors() -> None:
    ours, x = compiled(block()), example()
    ours(x)
    report = backend.reports()[0]
    known = match_of(report, "torch_silu").id
    with pytest.raises(RevertError, match=r"'torch_sil@' was not applied in this .*; did you mean 'torch_s"):
        report.revert("torch_sil@")
    report.revert(known)
    with pytest.raises(RevertError, match="was taken back already"):
        report.revert(known)
    for copy in (Report.from_json(report.to_json()), pickle.loads(pickle.dumps(report)), Report()):
        with pytest.raises(RevertError, match="of no program that still runs"):
            copy.revert(known)
    assert issubclass(RevertError, RuntimeError) and issubclass(RevertError, GraphoptError)


def test_a_program_that_is_gone_cannot_be_changed_and_holds_no_weight() -> None:
    model, x = block(), example()
    ours = compiled(model)
    ours(x)
    weight = weakref.ref(model.q.weight)
    report = backend.reports()[0]
    program = report.link.find()
    assert program is not None
    del ours, model
    torch.compiler.reset()
    gc.collect()
    assert weight() is None, "what a program is built from holds no weight"
    del program
    gc.collect()
    with pytest.raises(RevertError, match="of no program that still runs"):
        report.revert(report.matches[0])


def test_what_a_pass_applies_all_the_same_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(Merge):
        def run(self, gm: torch.fx.GraphModule, ctx: Context) -> None:
            ctx.deny = frozenset()
            super().run(gm, ctx)

    passes = tuple(Deaf() if p.name == "merge" else p for p in defaults.PIPELINE)
    monkeypatch.setattr(defaults, "PIPELINE", passes)
    model, x = block(), example()
    ours = compiled(model)
    ours(x)
    report = backend.reports()[0]
    matches = report.matches
    with pytest.raises(RevertError, match="cannot be denied: its pass applies it all the same"):
        report.revert(match_of(report, "merge_siblings"))
    assert report.matches == matches
    agree(ours(x), model(x))


def test_a_program_that_needs_released_weights_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model = api.optimize(Feed().eval(), quantize="int8", strict=True)
    x = torch.randn(3, 64)
    expected = model(x)
    (report,) = backend.reports()
    quantized = match_of(report, "int8_linear")
    report.revert(quantized)
    with pytest.raises(ReleasedError, match="was released"):
        model(x)
    assert quantized in report.matches, "it was not taken back"
    assert torch.equal(model(x), expected)


def test_an_optimized_model_without_a_merge() -> None:
    """Merged weights are views of what was prepared: they can be read apart, and stay when the merge goes."""
    eager, x = block(), example()
    model = api.optimize(block(), strict=True)
    agree(model(x), eager(x))
    (report,) = backend.reports()
    held = len(backend.STORE)
    for match in [m for m in report.matches if m.rule == "merge_siblings"]:
        report.revert(match)
    agree(model(x), eager(x))
    assert report.weights_prepared == 0 and len(backend.STORE) == held


def test_under_dynamic_shapes_a_program_is_built_again_for_all_lengths() -> None:
    model = block()
    ours = torch.compile(model, backend="graphopt", dynamic=True, options={"strict": True})
    for length in (5, 9):
        agree(ours(example(length)), model(example(length)))
    (report,) = backend.reports()
    report.revert(match_of(report, "torch_sdpa"))
    for length in (5, 9, 12):
        agree(ours(example(length)), model(example(length)))
    assert backend.reports() == (report,) and "attention" not in report.counts


def test_a_guard_that_a_new_program_needs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has made its guards: a program that would be right for this length alone is not taken."""

    class Fixes(Merge):
        def run(self, gm: torch.fx.GraphModule, ctx: Context) -> None:
            if ctx.deny:
                lengths = [g.val(n) for n in g.placeholders(gm.graph) if isinstance(g.val(n), torch.SymInt)]
                assert lengths and int(lengths[0]) > 0  # type: ignore[call-overload]  # a SymInt
            super().run(gm, ctx)

    passes = tuple(Fixes() if p.name == "merge" else p for p in defaults.PIPELINE)
    monkeypatch.setattr(defaults, "PIPELINE", passes)
    model = block()
    ours = torch.compile(model, backend="graphopt", dynamic=True, options={"strict": True})
    agree(ours(example(5)), model(example(5)))
    (report,) = backend.reports()
    before = report.matches
    with pytest.raises(RevertError, match=r"cannot be built without .*guard"):
        report.revert(match_of(report, "torch_silu"))
    assert report.matches == before
    for length in (5, 9):
        agree(ours(example(length)), model(example(length)))


def test_verification_and_taking_back_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user takes back is built without what failed, and what matches then is verified."""
    monkeypatch.setattr(defaults, "RULES", wrong_translation("torch_silu", lambda a: {"kind": "relu"}))
    model, x = block(), example()
    kept: list[Report] = []

    def first(c: object) -> Tensor:
        result = c(x)  # type: ignore[operator]
        report = backend.reports()[-1]
        report.revert(match_of(report, "torch_sdpa"))
        kept.append(report)
        return result

    outcome = ran(model, first, lambda c: c(x))
    for result in outcome.results:
        agree(result, model(x))  # type: ignore[arg-type]
    rules = {m.rule for m in kept[0].matches}
    assert not rules & {"torch_silu", "torch_sdpa"} and "merge_siblings" in rules
    assert outcome.culprits == {"torch_silu"} and len(outcome.warnings) == 1
