"""graphopt.tools.explain: the report of a model that was captured and recognised; and copies of graphs."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt import journal
from graphopt.errors import OptionError
from graphopt.observe import Event, PassEnded
from graphopt.report import Report
from graphopt.tools.explain import captured, explain, road, stages
from graphopt.tools.snapshots import Snapshots, snapshot
from tests.sketch import Sketch

aten = torch.ops.aten


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor) -> torch.Tensor:
        return self.down(torch.sin(self.up(x) + shift))


INPUTS = (torch.randn(3, 12),), {"shift": torch.randn(20)}


def test_the_report_counts_what_was_recognised() -> None:
    report = explain(TwoLinears().eval(), INPUTS[0][0], shift=INPUTS[1]["shift"])
    assert isinstance(report, Report)
    assert report.counts["linear"] == 2 and report.counts["aten.sin"] == 1
    assert "aten.linear" not in report.counts
    assert [p.name for p in report.passes] == list(stages()[1 : stages().index("recognise") + 1])
    assert Report.from_json(report.to_json()) == report


def test_a_plain_function_is_explained() -> None:
    report = explain(lambda x, w: torch.nn.functional.linear(x, w), torch.randn(3, 4), torch.randn(5, 4))
    assert report.counts == {"linear": 1}


def test_the_road_ends_where_it_is_told() -> None:
    class Ends:
        def __init__(self) -> None:
            self.names: list[str] = []

        def on_event(self, event: Event) -> None:
            if isinstance(event, PassEnded):
                self.names.append(event.name)

    ends = Ends()
    road(TwoLinears().eval(), *INPUTS, until="canonicalize", observers=(ends,))
    assert ends.names == ["canonicalize"]
    with pytest.raises(OptionError, match="no stage 'recognize' in this pipeline; it has captured, canon"):
        road(TwoLinears().eval(), *INPUTS, until="recognize")


def test_snapshots_keep_each_stage() -> None:
    taken, first = Snapshots(), Snapshots()
    road(TwoLinears().eval(), *INPUTS, until="recognise", observers=(taken,))
    assert list(taken.graphs) == list(stages()[: stages().index("recognise") + 1])
    calls = [{str(n.target) for n in taken.graphs[s].graph.nodes} for s in ("captured", "recognise")]
    assert "aten.linear.default" in calls[0] and "aten.linear.default" not in calls[1]
    assert road(TwoLinears().eval(), *INPUTS, until="captured", observers=(first,)) == Report()
    assert list(first.graphs) == ["captured"]


def test_a_snapshot_is_equal_runs_and_stands_alone() -> None:
    s = Sketch()
    gm = s.done(s.call(aten.neg.default, s.input("x", 3), path="layers.0", name="minus"))
    copy = snapshot(gm)
    assert [n.name for n in copy.graph.nodes] == ["x", "minus", "output"]
    assert [n.meta for n in copy.graph.nodes] == [n.meta for n in gm.graph.nodes]
    (result,) = copy(torch.ones(3))
    assert torch.equal(result, -torch.ones(3))
    next(n for n in gm.graph.nodes if n.op == "call_function").target = aten.abs.default
    assert "aten.neg.default" in {str(n.target) for n in copy.graph.nodes}


def test_the_journal_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(journal.VARIABLE, str(tmp_path))
    explain(TwoLinears().eval(), INPUTS[0][0], shift=INPUTS[1]["shift"])
    (directory,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "PassStarted" and lines[-1]["event"] == "PassEnded"
    assert "w:up.weight" in (directory / "00-captured.txt").read_text()


class Cache:
    """What torch.export refuses as an input, as it does the library's static caches."""

    def __init__(self, size: int) -> None:
        self.keys = torch.zeros(size, 12)


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        return self.up(x + cache.keys.sum(0))


def test_a_function_that_torch_compiles_no_more_can_be_looked_at() -> None:
    """Dynamo's limit for one function is 8, and a library's decorated models share one function."""
    torch.compiler.reset()
    model = Cached().eval()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    with torch.no_grad():
        for size in range(2, 12):
            compiled(torch.randn(size, 12), Cache(size))
    found = captured(model, (torch.randn(20, 12), Cache(20)), {}, dynamic=False)
    assert any(n.target is aten.linear.default for n in found.gm.graph.nodes)
