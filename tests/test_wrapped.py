"""Models that others have wrapped: accelerate's hooks and offloaded weights, exported and saved programs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import nn

import graphopt
from graphopt import backend, defaults
from graphopt.accuracy import judge
from graphopt.tools.zoo.census import expected_counts, recognised_counts
from tests.block import counted
from tests.generating import clean
from tests.models import zoo

CASE = zoo.Case(padding="left", tied=False)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A clean start, and no traces."""
    with clean():
        yield


def check(name: str, ours: torch.Tensor, eager: torch.Tensor) -> None:
    """The logits of real tokens in CASE, by the fp64 rule."""
    rows = zoo.inputs(zoo.model(name), CASE)["attention_mask"].bool()
    right = {"logits": zoo.oracle(name, CASE)["logits0"]}
    verdict = judge(right, {"logits": eager[rows]}, {"logits": ours[rows]}, torch.float32)
    assert verdict.ok, verdict.reason


def compiled(model: nn.Module) -> nn.Module:
    """By torch, with breaks where hooks want them."""
    return torch.compile(model, backend="graphopt", options={"strict": True})  # type: ignore[return-value]  # a module


def optimized(model: nn.Module) -> nn.Module:
    """In place, its weights ours."""
    return graphopt.optimize(model, strict=True)


# -------------------------------------------------------------------------------------------------- hooks


class Negated(ModelHook):
    """A hook that shows: a module's output changes its sign."""

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        """Behind the module."""
        return -output


def test_hooks_become_a_part_of_the_graph() -> None:
    model, given = copy.deepcopy(zoo.model("llama", tied=False)), zoo.inputs(zoo.model("llama"), CASE)
    with torch.no_grad():
        plain = model(**given, use_cache=False).logits
    add_hook_to_module(model.lm_head, Negated())
    with torch.no_grad():
        eager = model(**given, use_cache=False).logits
        assert torch.equal(eager, -plain)
        ours = compiled(model)(**given, use_cache=False).logits
    check("llama", -ours, plain)
    (report,) = backend.reports()
    expected = expected_counts(zoo.model("llama"), **given)
    assert report.fallback is None and recognised_counts(report.counts) == expected


def whole_layers(model: nn.Module) -> nn.Module:
    """A layer's weights are there while it runs, as new parameters at each call."""
    for layer in model.model.layers:
        kept = {name: p.detach().clone() for name, p in layer.state_dict().items()}
        hook = AlignDevicesHook(CPU, offload=True, weights_map=kept, place_submodules=True)
        add_hook_to_module(layer, hook)
    return model


def each_module(model: nn.Module) -> nn.Module:
    """`accelerate.cpu_offload`: so it is for every module that has weights."""
    return accelerate.cpu_offload(model, execution_device=CPU)


@pytest.mark.parametrize("how", [compiled, optimized])
@pytest.mark.parametrize("offload", [whole_layers, each_module])
def test_offloaded_weights_come_and_go(
    offload: Callable[[nn.Module], nn.Module], how: Callable[[nn.Module], nn.Module]
) -> None:
    model, given = copy.deepcopy(zoo.model("llama", tied=False)), zoo.inputs(zoo.model("llama"), CASE)
    with torch.no_grad():
        eager = model(**given, use_cache=False).logits
    ours = how(offload(model))
    before = [entry for _, entry in backend.STORE.entries()]
    # As many compilations as accelerate's one wrapper of all modules takes.
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        check("llama", ours(**given, use_cache=False).logits, eager)
        reports = backend.reports()
        with counted() as counts:
            check("llama", ours(**given, use_cache=False).logits, eager)
    assert any(p.device.type == "meta" for p in model.parameters()), "gone again"
    assert reports and not [r.fallback for r in reports if r.fallback]
    assert counts["graphs"] == 0
    left = [entry for _, entry in backend.STORE.entries() if not any(entry is x for x in before)]
    assert not left, "what was prepared went too"
    if offload is whole_layers:
        (layer,) = (r for r in reports if r.counts.get("attention"))
        assert layer.counts["rope"] == layer.counts["gated_activation"] == 1, "one graph for both layers"
        assert counts["prepared"] == 4, "Q, K, V and gate, up of each, for they are other tensors now"


# ------------------------------------------------------------------------------------------------- exported


def exported(model: nn.Module, path: Path, dynamic: bool, **given: object) -> torch.export.ExportedProgram:
    """A model as it comes out of a file."""
    shapes = None
    if dynamic:
        sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=60)}
        shapes = {name: sizes if isinstance(x, torch.Tensor) else None for name, x in given.items()}
    with torch.no_grad():
        program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)
    return torch.export.load(path)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_exported_program_that_was_saved(name: str, dynamic: bool, tmp_path: Path) -> None:
    model = zoo.model(name, tied=CASE.tied)
    given = zoo.inputs(model, CASE)
    more = {"use_cache": False} if zoo.FAMILIES[name].caches else {}
    program = exported(model, tmp_path / "model.pt2", dynamic, **given, **more)
    lowered, report = defaults.pipeline().run(graphopt.capture(program))
    ours = compiled(program.module())
    cases = [given, zoo.inputs(model, zoo.Case(batch=2, length=11))] if dynamic else [given]
    for i, values in enumerate(cases):
        values = {"attention_mask": torch.ones_like(values["input_ids"]), **values}
        with torch.no_grad():
            eager = model(**values, **more).logits
            for call in (lowered, ours):
                logits = call(**values, **more).logits
                assert torch.equal(logits.argmax(-1), eager.argmax(-1)) or i == 0
                if i == 0:
                    check(name, logits, eager)
    expected = expected_counts(model, **given)
    assert 1 <= len(backend.reports()) <= len(cases)
    for each in (report, *backend.reports()):
        assert recognised_counts(each.counts) == expected and each.unmatched_share == 0
        assert each.fallback is None
