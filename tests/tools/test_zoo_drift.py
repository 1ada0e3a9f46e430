"""graphopt.tools.zoo.drift: what another version of a library loses, and the node that differs there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from graphopt.errors import OptionError
from graphopt.tools import cli
from graphopt.tools.zoo import command, drift, run
from graphopt.tools.zoo.row import Row, Run


def a_row(norms: int = 2, **changes: object) -> Row:
    found = Run(graphs=1, judged=1, found={"norm": norms}, matched={"some_rms_norm": norms} if norms else {})
    found.places = {"some_rms_norm": "layers.0.norm (old.py:7)"} if norms else {}
    decoded = Run(graphs=2, judged=2, tokens=6, found={"norm": 2 * norms})
    values = {"type": "llama", "group": "causal LM", "there": {"norm": 2}, "runs": {"fp32": found}}
    return Row(**{**values, "decoded": decoded} | changes)  # type: ignore[arg-type]  # options of the call


def told(here: Row, there: Row) -> list[str]:
    """What is said below the totals of both."""
    lines = drift.compared([here], [there], "6.0", "5.17.0").splitlines()
    assert [line.split(": ")[0] for line in lines[:2]] == ["transformers 6.0", "transformers 5.17.0"]
    return lines[2:]


def test_a_rule_that_is_lost_is_named_with_the_node_that_differs() -> None:
    now = a_row(1)
    now.runs["fp32"].misses = {"some_rms_norm": "at mul_3 in layers.1.norm (new.py:9): expected a, found b"}
    assert told(now, a_row()) == [
        "llama: norm 1 of 2 in 6.0, 2 of 2 in 5.17.0",
        "    some_rms_norm is lost: 2 in 5.17.0, at layers.0.norm (old.py:7); 1 in 6.0, "
        "nearest: at mul_3 in layers.1.norm (new.py:9): expected a, found b",
    ]
    assert told(a_row(), now)[0] == "llama: norm 1 of 2 in 5.17.0, 2 of 2 in 6.0"


def test_rules_that_are_lost_come_in_the_order_of_matching() -> None:
    """What a rule matches may be the work of one before it, which is then the cause."""
    before = a_row()
    before.runs["fp32"].matched = {"a_later_rule": 2, "some_rms_norm": 2}
    before.runs["fp32"].places["a_later_rule"] = "layers.0 (old.py:8)"
    rules = [line.split()[0] for line in told(a_row(0), before)[1:]]
    assert rules == ["some_rms_norm", "a_later_rule"]


def test_another_graph_break_is_told() -> None:
    broken = a_row(1)
    call = broken.runs["fp32"]
    call.graphs, call.judged, call.ends = 3, 3, ["nonzero (new.py:5)"]
    said = "    fp32: 3 graphs in 6.0, 1 in 5.17.0; graph break: nonzero (new.py:5)"
    assert told(broken, a_row())[1] == said


def test_another_rule_for_the_same_part_is_no_loss() -> None:
    other = a_row()
    other.runs["fp32"].matched = {"other_rms_norm": 2}
    assert told(a_row(), other) == ["no rule is lost in either, and both give the same right results"]


def test_what_only_a_decoding_loses_is_told() -> None:
    less = a_row(decoded=Run(graphs=2, judged=2, tokens=6, found={"norm": 3}))
    assert told(less, a_row()) == ["llama: decoding, norm 3 in 6.0, 4 in 5.17.0"]
    more = a_row()
    assert more.decoded is not None
    more.decoded.found["mlp"] = 2  # halves of experts, where the type has no MLP
    assert told(a_row(), more) == ["no rule is lost in either, and both give the same right results"]


def test_a_decoding_that_is_right_in_one_version_only_is_told() -> None:
    bad = a_row()
    assert bad.decoded is not None
    bad.decoded.wrong.append("greedy tokens [[1]], eager's are [[2]]")
    assert told(a_row(), bad) == [
        "llama (float32 decoded): right in 6.0 only; in 5.17.0: greedy tokens [[1]], eager's are [[2]]"
    ]
    without = a_row(decoded=None, undecoded="ValueError: no head")
    assert told(without, a_row()) == ["llama: decoded in 5.17.0 only; in 6.0: ValueError: no head"]


def test_a_run_that_is_right_in_one_version_only_is_told() -> None:
    unjudged = a_row()
    unjudged.runs["fp32"].judged = 0
    assert told(unjudged, a_row()) == ["llama (fp32): right in 5.17.0 only; in 6.0: not judged"]


def test_a_type_that_one_version_has_not_is_told() -> None:
    assert told(a_row(), a_row(broken="new")) == ["llama: not in 5.17.0: new"]


def test_the_command_examines_thoroughly_and_tells_both(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []

    def examined(tasks: list[dict[str, object]], workers: object) -> Iterator[Row]:
        given.extend(tasks)
        yield a_row()

    monkeypatch.setattr(command, "examined", examined)
    monkeypatch.setattr(drift, "rows_under", lambda wanted, tasks, **_: [a_row(1)])
    done = CliRunner().invoke(cli.app, ["zoo", "llama", "--drift", "5.17.0"])
    assert done.exit_code == 0 and [task["thorough"] for task in given] == [True], done.output
    assert "transformers 5.17.0: 1 types, 1 built, 1 right, 1 decoded" in done.stdout
    assert "llama: norm 1 of 2 in 5.17.0" in done.stdout


class Normed(nn.Module):
    """An RMS norm, and a division by the mean of |x|, which is none; a square keeps the rule in play."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6) + x.pow(2)


def test_a_thorough_run_keeps_what_a_rule_matched_and_what_it_nearly_matched() -> None:
    x = torch.randn(2, 3, 8)
    found = run._run(Normed().eval(), {"x": x}, None, torch.float32, thorough=True)
    (rule,) = [rule for rule in found.matched if "rms_norm" in rule]
    assert found.matched[rule] == 1 and Path(__file__).name in found.places[rule]
    assert "aten.abs" in found.misses[rule], "of the place where it did not match"
    short = run._run(Normed().eval(), {"x": x}, None, torch.float32)
    assert not short.places and rule not in short.misses


def test_an_environment_that_cannot_be_made_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift.sys, "executable", "/bin/false")
    with pytest.raises(OptionError, match=r"no environment with transformers 0\.0\.1"):
        drift.environment("0.0.1", tmp_path)
