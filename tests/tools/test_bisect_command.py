"""graphopt.tools.bisect_command: real scripts in processes of their own, that know nothing of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graphopt.errors import BisectError
from graphopt.tools import cli
from graphopt.tools.bisect_command import SITE, bisect_command

ROOT = Path(__file__).resolve().parents[2]

# A user's check: two blocks, compiled and eager. With `wrong`, a rule takes no notice of eps, which shows in
# the second block alone.
SCRIPT = """
import sys
import dataclasses
import torch
from torch import nn
from graphopt import defaults, ops

class Norm(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(24)), eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)

class Block(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.norm, self.linear = Norm(eps), nn.Linear(24, 24)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))

rules = [r for r in defaults.RULES if r.name in ("llama_rms_norm", "torch_linear")]
if "wrong" in sys.argv:
    rules[1] = dataclasses.replace(rules[1], replacement=lambda x, weight, eps: ops.rms_norm(x, weight, 0.01))
defaults.RULES = tuple(rules)
torch.manual_seed(0)
model, x = nn.Sequential(Block(0.01), Block(0.3)).eval(), torch.randn(2, 5, 24)
with torch.no_grad():
    want = model(x)
    got = torch.compile(model, backend="graphopt", options={"strict": True, "expect": {"rms_norm": 2}})(x)
apart = (want - got).abs().max().item()
sys.exit(f"differs by {apart:.3g}" if apart > 1e-3 else 0)
"""

ODD = """
import sys
from pathlib import Path
import torch
import graphopt.defaults
graphopt.defaults.RULES = ()
torch.compile(torch.tanh, backend="graphopt")(torch.ones(3))
count = Path("count")
count.write_text(count.read_text() + "x" if count.exists() else "x")
sys.exit(len(count.read_text()) % 2)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The scripts, in a folder from which this repository's graphopt is imported."""
    (tmp_path / "check.py").write_text(SCRIPT)
    (tmp_path / "odd.py").write_text(ODD)
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_rule_and_the_layer_of_an_unedited_script(folder: Path) -> None:
    result = CliRunner().invoke(
        cli.app, ["bisect", "--command", f"{sys.executable} check.py wrong", "--json", "--most", "16"]
    )
    assert result.exit_code == 1, result.output
    told = json.loads(result.stdout)
    (culprit,) = told["culprits"]
    assert (culprit["rule"], culprit["module_path"]) == ("llama_rms_norm", "1.norm")
    assert culprit["source"].startswith("check.py:") and told["runs"] <= 12
    assert told["broken"].startswith("exit status 1 (differs by ")
    assert "aten.rsqrt.default(" in culprit["before"] and "ops.rms_norm(" in culprit["after"]
    names: dict[str, object] = {}
    exec(f"import torch\nfrom graphopt import ops\naten = torch.ops.aten\n{culprit['before']}", names)
    assert callable(names["before"])


def test_a_command_with_two_results_is_said(folder: Path) -> None:
    with pytest.raises(BisectError, match=r"not deterministic: .* exit status 1"):
        bisect_command((sys.executable, "odd.py"), most=4)


def test_a_command_that_compiles_nothing_is_said(folder: Path) -> None:
    with pytest.raises(BisectError, match=r"no pass ran \(exit status 3\): nothing was compiled"):
        bisect_command((sys.executable, "fails.py"))


def test_a_run_that_takes_too_long_is_broken(folder: Path) -> None:
    (folder / "slow.py").write_text("import time; time.sleep(60)")
    with pytest.raises(BisectError, match=r"no pass ran \(exit status none after 0.2 s\)"):
        bisect_command((sys.executable, "slow.py"), timeout=0.2)


def test_the_environments_own_sitecustomize_runs_too(tmp_path: Path) -> None:
    """Ours hides it on the path; without graphopt a process is otherwise as it was."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for place, text in ((ours, SITE), (theirs, "import builtins; builtins.THEIRS = 3")):
        place.mkdir()
        (place / "sitecustomize.py").write_text(text)
    code = "import sys; print(THEIRS, 'torch' in sys.modules, 'graphopt' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ours, theirs)))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["3", "False", "False"] and not done.stderr
