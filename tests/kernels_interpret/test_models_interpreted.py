"""Tiny real models lowered for a GPU, on interpreted Triton kernels, against the fp64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import fx

from graphopt.accuracy import judge
from graphopt.capture import from_dynamo
from graphopt.defaults import context, pipeline
from graphopt.lowering.select import REFERENCE
from graphopt.options import Options
from graphopt.report import Report
from tests.models import zoo

TARGET = "cuda:90"


class Interpreted:
    """A backend that lowers for the GPU and runs on the CPU: the interpreter takes the place of launches."""

    def __init__(self, **options: object) -> None:
        self.options = Options.parse({"strict": True, "target": TARGET, **options})
        self.reports: list[Report] = []

    def __call__(self, gm: fx.GraphModule, examples: Sequence[object]) -> Callable[..., object]:
        captured = from_dynamo(gm, examples)
        program, report = pipeline(self.options).run(captured, context(self.options))
        self.reports.append(report)
        return program.runnable(program.gm.forward)


def chosen(reports: Sequence[Report]) -> dict[str, set[str]]:
    """Op -> the kernels that were chosen for it."""
    found: dict[str, set[str]] = {}
    for report in reports:
        for op, kernels in report.kernels.items():
            found.setdefault(op, set()).update(kernels)
    return found


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "bert"])
def test_a_model_on_interpreted_kernels_is_right(name: str, dynamic: bool) -> None:
    cache = "static" if zoo.FAMILIES[name].caches else "none"
    case = zoo.Case(batch=2, length=5, padding="none" if dynamic else "left", cache=cache)
    model = zoo.model(name, tied=case.tied, window=case.window)
    given = zoo.inputs(model, case)
    backend = Interpreted()
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    assert isinstance(compiled, torch.nn.Module)
    with torch.no_grad():
        outcome = zoo.run(compiled, given, case.cache)
    verdict = judge(
        zoo.oracle(name, case),
        zoo.eager(name, case, torch.float32),
        zoo.real(outcome, given),
        torch.float32,
    )
    assert verdict.ok, verdict.reason
    kernels = chosen(backend.reports)
    assert "attention" in kernels
    without = [op for op, names in kernels.items() if REFERENCE in names]
    assert not without, f"no kernel for {without}"
