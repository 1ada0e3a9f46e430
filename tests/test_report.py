"""graphopt.report: the account of a compilation, built from its events."""

import io
import json

import pytest
import torch
from rich.console import Console
from torch import fx

from graphopt import ops
from graphopt.observe import Event, KernelChosen, Matched, PassEnded, PassStarted, Refused, Warned
from graphopt.report import PassRun, Report, ReportObserver, counts, nearest
from graphopt.rewrite import Match, Refusal
from tests.sketch import Sketch

aten = torch.ops.aten


def spelled() -> fx.GraphModule:
    s = Sketch()
    x, w = s.input("x", 2, 7, 12), s.weight("w", 12, 12)
    return s.done(s.call(aten.softmax.int, s.call(aten.matmul.default, x, w), -1))


def recognised() -> fx.GraphModule:
    s = Sketch()
    x, w = s.input("x", 2, 7, 12), s.weight("w", 12, 12)
    h = s.call(ops.linear.overload, s.call(ops.linear.overload, x, w, None), w, None)
    return s.done(s.call(aten.mul.Tensor, s.call(aten.matmul.default, h, w), s.call(aten.sym_size.int, x, 0)))


def match(number: int = 1, rule: str = "plain_linear") -> Match:
    return Match(
        f"{rule}@{number}", rule, f"layers.{number}", "model.py:3 y", (f"mul_{number}",), ("linear",)
    )


def refusal(rule: str, node: str, depth: int, reason: str = "dtype int64 is not half") -> Refusal:
    return Refusal(rule, node, "layers.0.attn", "model.py:7 q @ k", reason, depth)


def reported(*events: Event) -> Report:
    observer = ReportObserver()
    for event in events:
        observer.on_event(event)
    return observer.report


def full() -> Report:
    before, after = spelled(), recognised()
    return reported(
        PassStarted("canonicalize", 0, before),
        PassEnded("canonicalize", 0, before, False, 0.001),
        PassStarted("recognise", 1, before),
        Matched(match(1)),
        Matched(match(2)),
        Refused(refusal("divided_attention", "div", 4, "div is also used by output")),
        PassEnded("recognise", 1, after, True, 0.002),
        KernelChosen("linear", "linear", "onednn", ()),
        KernelChosen("linear_1", "linear", "onednn", ("fast: K 12 < 16",)),
        Warned("no kernel for rope"),
    )


def test_counts_are_of_operators_ours_first() -> None:
    assert list(counts(recognised().graph).items()) == [("linear", 2), ("aten.matmul", 1), ("aten.mul", 1)]


def test_the_recognised_graph_is_counted_not_the_last() -> None:
    report = reported(
        PassEnded("canonicalize", 0, spelled(), True, 0.0),
        PassEnded("recognise", 1, recognised(), True, 0.0),
        PassEnded("merge", 2, spelled(), True, 0.0),
    )
    assert report.counts["linear"] == 2
    assert list(report.unmatched) == ["aten.matmul"]


def test_without_recognise_the_graph_given_to_merge_is_counted() -> None:
    report = reported(
        PassEnded("fold_norms", 0, recognised(), True, 0.0),
        PassStarted("merge", 1, recognised()),
        PassEnded("merge", 1, spelled(), True, 0.0),
    )
    assert report.counts["linear"] == 2


def test_with_neither_the_last_graph_is_counted() -> None:
    report = reported(PassEnded("a", 0, spelled(), True, 0.0), PassEnded("b", 1, recognised(), True, 0.0))
    assert report.counts["linear"] == 2


def test_passes_with_nodes_before_and_after() -> None:
    before, after = spelled(), recognised()
    report = reported(PassStarted("recognise", 0, before), PassEnded("recognise", 0, after, True, 0.25))
    sizes = len(before.graph.nodes), len(after.graph.nodes)
    assert report.passes == (PassRun("recognise", True, 0.25, *sizes),)


def test_refusals_are_kept_once_a_place_the_furthest() -> None:
    report = reported(
        Refused(refusal("a", "n", 2, "early")),
        Refused(refusal("a", "n", 5, "late")),
        Refused(refusal("a", "n", 3, "between")),
        Refused(refusal("a", "m", 1)),
        Refused(refusal("b", "n", 4)),
    )
    assert [(r.rule, r.node, r.depth) for r in report.refusals] == [
        ("a", "n", 5),
        ("a", "m", 1),
        ("b", "n", 4),
    ]
    assert {rule: r.reason for rule, r in report.near_misses.items()}["a"] == "late"


def test_the_earliest_of_equal_misses_is_the_nearest() -> None:
    assert nearest([refusal("a", "n", 2, "first"), refusal("a", "m", 2, "second")])["a"].reason == "first"


def test_kernels_matches_and_warnings() -> None:
    report = reported(
        KernelChosen("a", "linear", "onednn", ()),
        KernelChosen("b", "linear", "reference", ()),
        KernelChosen("c", "linear", "onednn", ()),
        Matched(match(1)),
        Matched(match(1)),
        Warned("w"),
        Warned("w"),
    )
    assert report.kernels == {"linear": {"onednn": 2, "reference": 1}}
    assert [m.id for m in report.matches] == ["plain_linear@1"]
    assert report.warnings == ("w",)


def test_json_keeps_everything() -> None:
    report = full()
    report.fallback, report.weights_prepared, report.weights_prepared_bytes = "gradients", 3, 1024
    again = Report.from_json(report.to_json())
    assert again == report
    assert isinstance(again.matches[0], Match) and isinstance(again.matches[0].nodes, tuple)
    assert json.loads(report.to_json())["counts"]["linear"] == 2


@pytest.mark.parametrize("text", ["[]", '{"counts": {}, "colour": 1}', "nonsense"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Report.from_json(text)


def test_summary_says_what_matters() -> None:
    report = full()
    report.weights_prepared, report.weights_prepared_bytes = 3, 3 * 2**20
    text = str(report)
    assert text == report.summary()
    for part in (
        "2 matches by 1 rule, 5 -> 8 nodes in 2 passes, 3 ms",
        "linear 2",
        "aten.matmul 1",
        "32.9% of FLOPs: aten.matmul 32.9%",
        "divided_attention at layers.0.attn (model.py:7): div is also used by output",
        "linear: onednn 2",
        "3 prepared, 3.0 MiB",
        "no kernel for rope",
    ):
        assert part in text
    assert "not optimised" not in text


def test_a_fallback_is_said_first() -> None:
    report = Report(fallback="gradients are enabled; call it under torch.no_grad()")
    assert str(report).splitlines()[1].split(None, 2) == ["not", "optimised", report.fallback]
    assert len(str(report).splitlines()) == 2


def test_near_misses_of_rules_that_matched_or_at_taken_nodes_are_not_shown() -> None:
    report = reported(
        Matched(match(1, "llama_rms_norm")),
        Refused(refusal("llama_rms_norm", "other", 9, "of a rule that matched")),
        Refused(refusal("rival", "mul_1", 9, "at a node that was taken")),
        Refused(refusal("wanted", "softmax", 1, "head_dim 320 > 256")),
        Refused(refusal("shallow", match(1, "llama_rms_norm").new_nodes[0], 2, "at a node that a rule made")),
    )
    text = str(report)
    assert "head_dim 320 > 256" in text and "at a node that a rule made" not in text
    assert "of a rule that matched" not in text and "at a node that was taken" not in text
    assert len(report.near_misses) == 4


def test_where_the_graph_ends_is_shown() -> None:
    report = reported(Matched(match(1, "llama_rms_norm")))
    assert "graph break" not in str(report)
    report.ends = "nonzero's shape depends on data (model.py:3)"
    assert "graph break" in str(report) and report.ends in str(report)
    assert Report.from_json(report.to_json()).ends == report.ends


def test_rich_shows_the_same_lines() -> None:
    report, out = full(), io.StringIO()
    Console(file=out, width=200).print(report)
    shown = [line.split() for line in out.getvalue().splitlines()]
    assert shown == [line.split() for line in str(report).splitlines()]


def test_packed_weights_are_counted_with_their_scales() -> None:
    s = Sketch()
    x, w, v = s.input("x", 2, 128), s.weight("w", 32, 128), s.weight("v", 8, 128)
    scales = s.call(ops.scales_int8.overload, w, 64)
    packs = [s.call(ops.pack_int8.overload, w, scales)]
    outs = [
        s.call(ops.linear_int8.overload, x, packs[0], scales, None),
        s.call(ops.linear.overload, x, v, None),
    ]
    gm = s.done(*outs)
    kept = [refusal("int8_linear", f"linear_{i}", 1, "64 weights < 4096") for i in range(4)]
    report = reported(PassEnded("quantize", 3, gm, True, 0.0), *map(Refused, kept))
    assert report.quantized == 1 and report.quantized_bytes == (32 * 128 * 4, 32 * 128 + 32 * 2 * 4)
    assert report.kept == tuple(kept) and Report.from_json(report.to_json()) == report
    (row,) = [line for line in str(report).splitlines() if line.startswith("quantized")]
    assert "1 weight, 0.0 -> 0.0 MiB; kept layers.0.attn (64 weights < 4096), " in row
    assert row.endswith(", and 1 more") and "near miss" not in str(report)


def test_a_report_without_quantization_says_nothing_of_it() -> None:
    assert full().quantized is None and "quantized" not in str(full())
    nothing = reported(PassEnded("quantize", 3, recognised(), False, 0.0))
    assert nothing.quantized == 0 and "0 weights, 0.0 -> 0.0 MiB" in str(nothing)
