"""graphopt.journal: what GRAPHOPT_DUMP=dir and TORCH_LOGS leave behind."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx

from graphopt import journal, torch_private
from graphopt.journal import Journal, Log, from_environment, sentence
from graphopt.observe import (
    Event,
    KernelChosen,
    Matched,
    Observer,
    PassEnded,
    PassStarted,
    Refused,
    Warned,
    emit,
)
from graphopt.rewrite import Match, Refusal
from tests.sketch import Sketch

aten = torch.ops.aten


def graph(target: Callable[..., object] = aten.neg.default) -> fx.GraphModule:
    s = Sketch()
    return s.done(s.call(target, s.input("x", 2, 3)))


MATCH = Match("m1", "llama_rms_norm", "layers.0", "model.py:3 y", ("mul", "mean"), ("rms_norm",))
REFUSAL = Refusal("gelu", "tanh", "layers.0.mlp", "model.py:9 z", "literal 0.5 is not 1.0", 3)


def compilation() -> list[Event]:
    before, after = graph(), graph(aten.abs.default)
    return [
        PassStarted("canonicalize", 0, before),
        PassEnded("canonicalize", 0, before, False, 0.5),
        PassStarted("recognise", 1, before),
        Matched(MATCH),
        Refused(REFUSAL),
        PassEnded("recognise", 1, after, True, 0.25),
        KernelChosen("rms_norm", "rms_norm", "reference", ("fast: bf16",)),
        Warned("careful"),
    ]


def play(*observers: Observer) -> None:
    for event in compilation():
        emit(observers, event)


def entries(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]


def test_nothing_is_written_without_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(journal.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    observers = from_environment()
    play(*observers)
    assert [type(o) for o in observers] == [Log]
    assert list(tmp_path.iterdir()) == []


def test_the_variable_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(journal.VARIABLE, str(tmp_path / "new" / "dump"))
    observers = from_environment()
    assert not (tmp_path / "new").exists()  # a compilation that never begins leaves nothing
    play(*observers)
    (directory,) = (tmp_path / "new" / "dump").iterdir()
    assert sorted(p.name for p in directory.iterdir()) == [
        "00-captured.txt",
        "02-recognise.txt",
        "journal.jsonl",
    ]


def test_one_line_an_event_and_a_listing_a_change(tmp_path: Path) -> None:
    play(Journal(tmp_path))
    (directory,) = tmp_path.iterdir()
    lines = entries(directory)
    assert [e["event"] for e in lines] == [type(e).__name__ for e in compilation()]
    assert lines[0]["listing"] == "00-captured.txt" and lines[0]["nodes"] == 3
    assert "listing" not in lines[1] and lines[1]["changed"] is False and lines[1]["seconds"] == 0.5
    assert lines[3]["match"] == {**MATCH.__dict__, "nodes": ["mul", "mean"], "new_nodes": ["rms_norm"]}
    assert lines[4]["refusal"] == REFUSAL.__dict__
    assert lines[5]["listing"] == "02-recognise.txt"
    assert lines[6]["reasons"] == ["fast: bf16"] and lines[7]["message"] == "careful"
    assert "aten.neg" in (directory / "00-captured.txt").read_text()
    assert "aten.abs" in (directory / "02-recognise.txt").read_text()


def test_each_compilation_has_its_own_directory(tmp_path: Path) -> None:
    again = Journal(tmp_path)
    for _ in range(2):
        play(again)
    play(Journal(tmp_path))
    directories = sorted(tmp_path.iterdir())
    assert len(directories) == 3
    assert all(len(entries(d)) == len(compilation()) for d in directories)


def test_a_crash_leaves_the_events_so_far(tmp_path: Path) -> None:
    kept = Journal(tmp_path)
    kept.on_event(compilation()[0])
    assert kept.directory is not None
    assert len(entries(kept.directory)) == 1  # the journal is still open


def test_an_unwritable_directory_warns_once_and_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a directory")
    play(Journal(tmp_path / "file"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "set GRAPHOPT_DUMP to a writable directory" in record.message


def test_listings_reach_torchs_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(torch_private, "trace_artifact", lambda name, text: sent.append(name))
    play(Journal(tmp_path))
    assert sent == ["graphopt_00-captured", "graphopt_02-recognise"]


def test_the_log_has_one_line_an_event(caplog: pytest.LogCaptureFixture) -> None:
    play(Log())
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, logger="graphopt"):
        play(Log())
    assert [r.message for r in caplog.records] == [sentence(e) for e in compilation()]
    assert all(r.name == "graphopt.journal" for r in caplog.records)


def test_sentences() -> None:
    said = [sentence(e) for e in compilation()]
    assert said[1] == "pass 0 canonicalize changed nothing: 3 nodes, 500.0 ms"
    assert said[3] == "llama_rms_norm matched mul, mean in layers.0 [m1]"
    assert said[4] == "gelu refused tanh in layers.0.mlp: literal 0.5 is not 1.0"
    assert said[6] == "rms_norm: rms_norm runs as reference; not fast: bf16"
