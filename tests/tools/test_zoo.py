"""graphopt.tools.zoo: the judge beside a compiler, decoding, workers, tables, comparisons."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from graphopt import backend
from graphopt.errors import OptionError
from graphopt.tools import cli
from graphopt.tools.zoo import run
from graphopt.tools.zoo.build import tiny_model
from graphopt.tools.zoo.command import update_golden
from graphopt.tools.zoo.row import TOKENS, Row, Run
from graphopt.tools.zoo.table import details, lost, miscounted, read, table, totals, write, wrong
from graphopt.tools.zoo.workers import Worker, examined

ROOT = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------------ judging


class Doubled(nn.Module):
    """A graph of one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.linear(x)


def judged(model: nn.Module, x: torch.Tensor) -> Run:
    return run._run(model.eval().requires_grad_(False), {"x": x}, None, torch.float32)


def test_a_right_graph_is_right() -> None:
    found = judged(Doubled(), torch.randn(2, 4))
    assert found.right and found.graphs == found.judged == 1 and found.found["linear"] == 1


def test_a_wrong_graph_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = backend.graphopt

    def broken(gm: torch.fx.GraphModule, examples: list[object], **kwargs: object) -> Callable[..., object]:
        inner = real(gm, examples, **kwargs)  # type: ignore[arg-type]  # options of the call
        return lambda *args: tuple(1.01 * x for x in inner(*args))  # type: ignore[attr-defined]

    monkeypatch.setattr(backend, "graphopt", broken)
    found = judged(Doubled(), torch.randn(2, 4))
    assert not found.right and "rmse" in found.wrong[0]


def test_a_refused_graph_is_named_and_not_judged() -> None:
    class Complex(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (torch.view_as_complex(x) * 1j).conj().abs()

    found = judged(Complex(), torch.randn(2, 4, 2))
    assert found.refused and found.handed_back == found.graphs == 1 and found.judged == 0


@pytest.fixture(scope="module")
def writer() -> nn.Module:
    return tiny_model("gpt2")


def decoded(model: nn.Module) -> Row:
    row = Row("gpt2", "causal LM")
    with torch.no_grad():
        run._decode(row, model)
    torch.compiler.reset()
    assert model._compiled_call_impl is None
    return row


def test_greedy_tokens_are_compared_and_each_call_is_judged(writer: nn.Module) -> None:
    row = decoded(writer)
    assert row.decoded is not None and row.decoded.right and row.undecoded is None
    assert row.decoded.graphs == row.decoded.judged == TOKENS
    assert row.decoded.tokens == TOKENS * 3, "of each row of the prompt"
    assert row.decoded.found["attention"] == TOKENS * 2, "layers"


def test_another_greedy_token_is_wrong(writer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    real = backend.graphopt

    def negated(gm: torch.fx.GraphModule, examples: list[object], **kwargs: object) -> Callable[..., object]:
        inner = real(gm, examples, **kwargs)  # type: ignore[arg-type]  # options of the call
        return lambda *args: tuple(-x if x.shape[-1] > 64 else x for x in inner(*args))  # type: ignore[attr-defined]  # known to be there

    monkeypatch.setattr(backend, "graphopt", negated)
    row = decoded(writer)
    assert row.decoded is not None and any(text.startswith("greedy tokens") for text in row.decoded.wrong)
    assert row.decoded.tokens < TOKENS * 3
    assert any("float32 decoded" in text for text in wrong([row]))


def test_what_eager_cannot_decode_is_told(writer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**given: object) -> torch.Tensor:
        raise ValueError("no tokens here")

    monkeypatch.setattr(writer, "generate", refuse)
    row = decoded(writer)
    assert row.decoded is None and row.undecoded == "ValueError: no tokens here"
    assert details([row]) == ["gpt2 (float32): not decoded, for eager raises ValueError: no tokens here"]


def test_what_a_cache_loses_is_told() -> None:
    row = a_row(decoded=Run(graphs=2, judged=2, found={"norm": 3}))
    assert details([row]) == ["llama: decoding recognises less: norm 3 of 4"]


def test_what_fails_to_build_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> nn.Module:
        raise ValueError(f"no {name} here")

    monkeypatch.setattr(run, "tiny_model", refuse)
    row = run.examine("llama", [torch.float32])
    assert row.broken == "ValueError: no llama here" and not row.right


# ------------------------------------------------------------------------------------------- rows, tables


def a_row(norms: int = 2, **changes: object) -> Row:
    found = Run(
        graphs=1, judged=1, found={"norm": norms}, matched={"some_rms_norm": norms}, unmatched={"a": 0.5}
    )
    return Row(
        **{"type": "llama", "group": "causal LM", "there": {"norm": 2}, "runs": {"fp32": found}} | changes
    )  # type: ignore[arg-type]


def test_rows_are_kept_in_json(tmp_path: Path) -> None:
    rows = [a_row(decoded=Run(graphs=2, tokens=6)), Row("x", "causal LM", broken="no", undecoded="no head")]
    write(rows, tmp_path / "zoo.json", {"torch": "2"})
    assert read(tmp_path / "zoo.json") == tuple(rows)
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(OptionError, match="make one with graphopt zoo --json"):
        read(tmp_path / "odd.json")


def test_the_short_row_has_what_all_runs_have() -> None:
    row = a_row()
    row.runs["bf16"] = Run(graphs=1, judged=1, found={"norm": 1}, matched={}, unmatched={"a": 0.7})
    short = row.short()
    (whole,) = short.runs.values()
    assert short.right and short.found("norm") == row.found("norm") == 1
    assert whole.unmatched == {"a": 0.7}
    row.runs["bf16"].wrong.append("rmse")
    assert not row.short().right


def test_what_an_equal_call_compiles_again_must_be_judged_too() -> None:
    row = a_row()
    row.runs["fp32"].recompiled = 1
    assert not row.right and not row.short().right
    row.runs["fp32"].judged = 2
    assert row.right and row.short().right


def test_lost_matches_are_told_with_their_rules() -> None:
    assert lost([a_row()], [a_row()]) == [] == lost([a_row()], [])
    fewer = a_row(1)
    fewer.runs["fp32"].misses = {"some_rms_norm": "at layers.0: eps differs"}
    (told,) = lost([fewer], [a_row().short()])
    assert told.splitlines() == [
        "llama: norm 2 -> 1; nearest misses now:",
        "    some_rms_norm at layers.0: eps differs",
    ]
    assert lost([Row("llama", "causal LM", broken="no")], [a_row()]) == ["llama is broken: no"]
    off = a_row()
    off.runs["fp32"].wrong = ["rmse"]
    assert lost([off], [a_row()]) == ["llama is no longer right: rmse"] and wrong([off])


def test_other_counts_than_the_golden_ones_are_told() -> None:
    assert not miscounted([a_row()], {"llama": {"norm": 2}}) and not miscounted([a_row()], {})
    assert "counts {'norm': 2}" in miscounted([a_row()], {"llama": {"norm": 3}})[0]


def test_the_golden_table_is_updated_by_type(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    path.write_text('{"bert": {"norm": 1}}')
    update_golden([a_row(), Row("x", "causal LM", broken="no")], path)
    assert json.loads(path.read_text()) == {"bert": {"norm": 1}, "llama": {"norm": 2}}


def test_the_table_and_its_details_say_what_is_missing() -> None:
    from rich.console import Console

    row = a_row(1)
    row.runs["fp32"].misses = {"other_norm": "at layers.0: eps differs"}
    row.runs["fp32"].ends = ["nonzero's shape depends on data (model.py:3)"]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table([row, Row("x", "causal LM", broken="no such size")]))
    text = console.export_text()
    assert "1/2" in text and "50%" in text and "broken: no such size" in text
    assert details([row]) == [
        "llama: short of norm; nearest misses:",
        "    other_norm at layers.0: eps differs",
        "    graph break: nonzero's shape depends on data (model.py:3)",
    ]
    assert "norm 50.0% of 2" in str(totals([row]))


# ------------------------------------------------------------------------------------- workers, command


def task(name: str) -> dict[str, object]:
    return {"type": name, "group": "image", "dtypes": ["float32"], "paddings": ["none"]}


def test_a_process_examines_types_and_survives_a_dead_one(tmp_path: Path) -> None:
    dead = tmp_path / "dead"
    dead.write_text("#!/bin/sh\necho broken pipe of dreams >&2\nexit 3\n")
    dead.chmod(0o755)
    (row,) = examined([task("vit")], [Worker(python=str(dead))])
    assert row.broken == "the process ended: status 3, broken pipe of dreams"
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    (row,) = examined([task("vit")], [Worker(python=str(slow), limit=0.2)])
    assert row.broken == "not done in 0 s"


def started(words: list[str]) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it: a process of its own, with its own streams."""
    command = [sys.executable, "-m", "graphopt.tools.cli", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_the_command_writes_compares_and_fails(tmp_path: Path) -> None:
    full, golden = tmp_path / "zoo.json", tmp_path / "golden.json"
    words = ["zoo", "vit", "--dtype", "float32", "--json", str(full), "--golden", str(golden), "--update"]
    done = started(words)
    assert done.returncode == 0, done.stderr
    assert "1 types, 1 built, 1 right" in done.stdout
    (row,) = read(full)
    assert (
        row.right
        and list(row.runs) == ["float32 none"]
        and json.loads(golden.read_text())["vit"] == row.there
    )
    row.there["norm"] += 1
    row.runs["float32 none"].found["norm"] += 1
    write([row], full, {})
    golden.write_text(json.dumps({"vit": {**row.there}}))
    words = ["zoo", "vit", "--dtype", "float32", "--baseline", str(full), "--golden", str(golden)]
    done = started(words)
    assert done.returncode == 1 and "an eager run counts" in done.stderr, done.stderr


def test_an_unknown_type_is_named() -> None:
    done = CliRunner().invoke(cli.app, ["zoo", "lama"])
    assert done.exit_code == 2 and "did you mean 'llama'?" in done.output
