"""graphopt.tools.compile: decode steps lowered for GPUs that are not there, and what is said of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from graphopt.errors import OptionError
from graphopt.targets import TARGETS
from graphopt.tools import cli
from graphopt.tools.compile import Compilation, compile_for
from graphopt.tools.models import load

MOST = 8  # launches of a decoder layer at decode: the bar of "Launches per layer"
DECODERS = ("llama", "qwen3", "gemma2", "gpt2")
LENGTH = 3  # the tiny windows are of 4, and the cache of one that is full rolls: 4 launches more


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled kernels that the tests of this file share."""
    return tmp_path_factory.mktemp("kernels")


def compiled(name: str, target: str, records: Path, **options: object) -> Compilation:
    torch.compiler.reset()
    example = load(name, batch=1, length=LENGTH, dtype="bfloat16", decode=name != "bert")
    return compile_for(
        example.model, example.args, example.kwargs, target=target, options=options, cache=records
    )


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_layer_is_at_most_eight_launches(name: str, records: Path) -> None:
    found = compiled(name, "cuda:90", records)
    layers = {layer: n for layer, n in found.layers.items() if layer}
    assert len(layers) == 2 and 0 < found.per_layer <= MOST, found.layers
    assert found.references == {}
    assert sum(row.launches for row in found.kernels) + sum(found.torch.values()) == sum(
        found.layers.values()
    )
    assert not any(row.faults for row in found.kernels), str(found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_no_op_is_left_without_a_kernel(name: str, target: str, records: Path) -> None:
    found = compiled(name, target, records)
    assert found.references == {} and found.kernels
    assert {row.compiled.target for row in found.kernels} == {target}


def test_int8_weights_are_read_by_their_own_kernel(records: Path) -> None:
    torch.compiler.reset()
    example = load(f"{__name__}:wide", decode=False)
    found = compile_for(
        example.model, example.args, target="cuda:90", options={"quantize": "int8"}, cache=records
    )
    assert found.references == {} and found.report.quantized == 2
    assert "int8" in found.code or "i8" in found.code


def wide() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """Two linears that a group of 64 divides."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(128, 192), torch.nn.SiLU(), torch.nn.Linear(192, 64))
    return model.eval(), (torch.randn(1, 128),)


def test_the_table_has_a_line_for_each_kernel(records: Path) -> None:
    found = compiled("llama", "cuda:90", records)
    lines = str(found).splitlines()
    assert lines[0].startswith("cuda:90: ") and "2 layers of" in lines[0]
    assert len(lines) == 2 + len(found.kernels) and lines[1].split()[0] == "kernel"
    parsed = json.loads(found.to_json())
    assert parsed["layers"] == found.layers and len(parsed["kernels"]) == len(found.kernels)


def test_a_faulty_kernel_has_a_line_of_its_own(records: Path) -> None:
    found = compiled("llama", "cuda:90", records)
    assert found.faults == () and "fault" not in str(found)
    bad = dataclasses.replace(found.kernels[0], faults=("88 bytes of stack > 0",))
    worse = dataclasses.replace(found, kernels=(bad, *found.kernels[1:]))
    assert str(worse).splitlines()[-1] == f"fault: {bad.name} ({bad.configuration}): 88 bytes of stack > 0"


def test_a_constant_of_the_graph_is_no_hindrance(records: Path) -> None:
    """A sliding layer of a dynamic cache clones a constant tensor."""
    torch.compiler.reset()
    example = load("gemma2", batch=1, length=9, dtype="bfloat16", cache="dynamic")
    found = compile_for(example.model, example.args, example.kwargs, target="cuda:90", cache=records)
    assert found.kernels and found.references == {}


@pytest.mark.parametrize(("target", "message"), [("cuda:91", "unknown target 'cuda:91'"), ("cpu", "'cpu'")])
def test_a_target_that_is_no_gpu_is_an_error_before_anything_is_captured(target: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        compile_for(torch.nn.Linear(2, 2), (None,), target=target)


def test_the_command_prints_program_and_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["compile", "llama", "--target", "cuda:90", "--decode", "--length", "16"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    assert "return (" in result.stdout and "registers" in result.stdout and "_attention" in result.stdout
    assert any(tmp_path.rglob("*.json")), "compiled kernels' records are kept"
    wrong = CliRunner().invoke(cli.app, ["compile", "llama", "--target", "cuda:9"])
    assert wrong.exit_code == 2 and "it is one of cuda:80, cuda:90" in wrong.output
    encoder = CliRunner().invoke(cli.app, ["compile", "bert", "--target", "cuda:90", "--decode"])
    assert encoder.exit_code == 2 and "bert has no cache to decode with" in encoder.output
