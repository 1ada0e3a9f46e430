"""graphopt.tools.cli and .models: the command line, the models that it makes, and its errors."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from graphopt.errors import OptionError
from graphopt.tools import cli
from graphopt.tools.models import choice, load

MODULE = '''
"""Models for the command line's tests."""
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self, twice):
        super().__init__()
        self.up, self.down, self.twice = nn.Linear(12, 20), nn.Linear(20, 12), twice

    def forward(self, x, shift):
        y = self.down(torch.sin(self.up(x) + shift))
        return y + y if self.twice else y

def once(): return Two(False).eval(), (torch.randn(3, 12),), {"shift": torch.randn(20)}
def twice(): return Two(True).eval(), (torch.randn(3, 12), torch.randn(20))
def graph(): return torch.fx.symbolic_trace(Two(False))
def wrong(): return 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory, which is not on the path."""
    (tmp_path / "cli_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    return "cli_models"


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def test_explain_prints_the_report(module: str) -> None:
    result = run("explain", f"{module}:once")
    assert result.exit_code == 0, result.output
    assert "linear 2" in result.stdout and result.stdout.startswith("graphopt")


def test_explain_as_json(module: str) -> None:
    result = run("explain", f"{module}:once", "--json")
    assert json.loads(result.stdout)["counts"]["linear"] == 2


def test_explain_answers_a_question(module: str) -> None:
    result = run("explain", f"{module}:once", "--rule", "torch_linear", "--module", "up")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("rule torch_linear, module up: 1 matched, 0 missed")
    told = json.loads(run("explain", f"{module}:once", "--node", "sin", "--json").stdout)
    assert told["question"] == {"rule": "*", "module": "*", "node": "sin"} and told["matches"] == []
    unknown = run("explain", f"{module}:once", "--rule", "torch_liner")
    assert unknown.exit_code == 2 and "did you mean 'torch_linear'?" in unknown.stderr


def test_explain_with_an_expectation(module: str) -> None:
    enough = run("explain", f"{module}:once", "--expect", "linear=2", "--expect", "norm=0")
    assert enough.exit_code == 0, enough.output
    short = run("explain", f"{module}:once", "--expect", "linear=3")
    assert short.exit_code == 2 and "linear: 2 of 3" in short.stderr and "linear 2" in short.stderr


def test_diff_of_two_stages(module: str) -> None:
    result = run("diff", f"{module}:once@captured", f"{module}:once@recognise")
    assert result.exit_code == 0, result.output
    assert "linear(" in result.stdout and result.stdout.splitlines()[-1].count("nodes") == 1
    assert "no difference" in run("diff", f"{module}:once@recognise", f"{module}:once@recognise").stdout


def test_diff_of_two_functions(module: str) -> None:
    told = json.loads(run("diff", f"{module}:once", f"{module}:twice", "--json").stdout)
    assert told["changed"] is True
    assert any("aten.add.Tensor" in text for hunk in told["hunks"] for text in hunk["added"])


def test_diff_of_graphs_as_they_are(module: str) -> None:
    assert "no difference" in run("diff", f"{module}:graph", f"{module}:graph").stdout


def test_a_model_that_is_asked_for_twice_is_made_once() -> None:
    asked: list[str] = []
    gm = torch.fx.symbolic_trace(torch.nn.ReLU())

    def load(name: str) -> cli.Example:
        asked.append(name)
        return cli.Example(gm)

    assert cli.graphs([("m", "captured"), ("m", "merge"), ("n", "captured")], load) == [gm, gm, gm]
    assert asked == ["m", "n"]


def test_version() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        want = version("graphopt")
    except PackageNotFoundError:
        pytest.skip("graphopt is not installed here")
    assert run("--version").stdout.strip() == f"graphopt {want}"


def test_without_a_command_the_help_is_shown() -> None:
    text = run().output
    assert all(word in text for word in ("explain", "diff", "bisect", "demo"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("explain", "lama"), "unknown model type 'lama'; did you mean 'llama'?"),
        (("explain", "bert", "--dtype", "bfloat"), "unknown dtype 'bfloat'; did you mean 'bfloat16'?"),
        (("explain", "bert", "--cache", "x"), "unknown cache 'x'; it is one of none, dynamic, static"),
        (("diff", "bert@recognize", "bert@merge"), "unknown stage 'recognize'; did you mean 'recognise'?"),
        (("explain", "{}:twise"), "unknown function of cli_models 'twise'; did you mean 'twice'?"),
        (("explain", "{}:wrong"), "cli_models:wrong returned int, not (model, args, kwargs)"),
        (("explain", "no_such_module:f"), "no module 'no_such_module'"),
        (("explain", "bert", "--expect", "linear"), "'linear' is no expectation; give OPERATOR=NUMBER"),
        (("explain", "bert", "--expect", "liner=2"), "has no operator 'liner'; did you mean 'linear'?"),
        (("explain", "qqqqqqq"), "unknown model type 'qqqqqqq'; give package.module:function"),
    ],
)
def test_mistakes_get_one_line_and_the_way_out(module: str, words: tuple[str, ...], message: str) -> None:
    result = run(*(word.format(module) for word in words))
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("explain", "bert")
    assert result.exit_code == 2 and "pip install 'graphopt[transformers]'" in result.stderr


def test_choice() -> None:
    assert choice("a", ("a", "b"), "letter") == "a"
    with pytest.raises(OptionError, match="unknown letter 'x'; it is one of a, b"):
        choice("x", ("a", "b"), "letter")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_tiny_models_run(name: str) -> None:
    example = load(name, batch=3, length=5)
    with torch.no_grad():
        first = example.model(*example.args, **example.kwargs)[0]
    assert first.shape[0] == 3 and bool(first.isfinite().all())
    assert sum(p.numel() for p in example.model.parameters()) < 250_000
    assert not example.model.training


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_caches(cache: str) -> None:
    example = load("llama", cache=cache, dtype="bfloat16")
    with torch.no_grad():
        result = example.model(**example.kwargs)
    assert result.logits.dtype == torch.bfloat16
    held = result.past_key_values
    assert (
        type(held).__name__ == {"none": "NoneType", "dynamic": "DynamicCache", "static": "StaticCache"}[cache]
    )


def test_a_config_on_disk_gives_a_model_without_weights(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=1, hidden_size=4096).save_pretrained(tmp_path)
    example = load(str(tmp_path), length=3)
    assert {p.device.type for p in example.model.parameters()} == {"meta"}
    ids = example.kwargs["input_ids"]
    assert isinstance(ids, torch.Tensor) and ids.shape == (2, 3) and ids.device.type == "meta"


def test_diff_shows_what_passes_on_request_do() -> None:
    words = ("--length", "5", "--batch", "1")
    sharded = run("diff", "llama@merge", "llama@shard", "--shard", "2", *words)
    assert sharded.exit_code == 0, sharded.output
    assert "all_reduce(" in sharded.stdout and "aten.slice" in sharded.stdout
    fused = run("diff", "llama@merge", "llama@fuse", "--target", "cuda:90", *words)
    assert fused.exit_code == 0 and "fused_linear(" in fused.stdout
    unknown = run("diff", "llama@merge", "llama@shard", *words)
    assert unknown.exit_code == 2 and "unknown stage 'shard'" in unknown.output
