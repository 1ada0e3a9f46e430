"""What a lowered program launches, counted on fakes: kernels, torch's operators, views that are free."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.errors import PipelineError
from graphopt.kernel import GPU, Kernel, never
from graphopt.launch import launch
from graphopt.lowering.fold import fold
from graphopt.lowering.select import select
from graphopt.lowering.steps import launches_per_layer, layer_of, steps
from graphopt.targets import TARGETS
from graphopt.weights import WeightStore
from tests.graphs import Builder

aten = torch.ops.aten
TARGET = TARGETS["cuda:90"]


class _Jitted:
    """Stands for a jit function: nothing here runs it."""

    __name__ = "_twice"
    arg_names = ("x_ptr", "y_ptr", "n", "BLOCK")


def twice(x: torch.Tensor, kind: str) -> torch.Tensor:
    y = torch.empty_like(x)
    launch(_Jitted(), (2,), x, y, x.numel(), BLOCK=64, num_warps=4)
    return y


TWICE = (Kernel("activation", "twice", twice, never, GPU),)


def program(kernels: tuple[Kernel, ...]) -> fx.GraphModule:
    """Two layers of relu(x @ w^T), with views between them and a sum outside."""
    build = Builder()
    x = build.input("x", 4, 8)
    for i in range(2):
        w = build.weight(f"layers.{i}.w", 8, 8)
        merged = build.call(aten.cat.default, [w], 0)
        x = build.call(ops.linear.overload, x, merged, None, path=f"layers.{i}.up")
        x = build.call(aten.reshape.default, x, [2, 2, 8], path=f"layers.{i}")
        x = build.call(ops.activation.overload, x, "relu", path=f"layers.{i}.act")
        x = build.call(aten.permute.default, x, [1, 0, 2], path=f"layers.{i}")
        x = build.call(aten.reshape.default, x, [4, 8], path=f"layers.{i}")
    gm = build.done(build.call(aten.add.Tensor, x, 1))
    fold(gm, WeightStore())
    select(gm.graph, kernels, TARGET.name)
    gm.recompile()
    return gm


def test_kernels_copies_and_operators_count_and_views_do_not() -> None:
    found = steps(program(TWICE), TARGET)
    work = [(g.module_path(s.node), s.node.meta.get("kernel"), len(s.launches), s.torch) for s in found]
    layer = [(".up", "reference", 0, 1), (".act", "twice", 1, 0), ("", None, 0, 1)]  # the reshape has to copy
    expected = [(f"layers.{i}{p}", *rest) for i in range(2) for p, *rest in layer]
    assert work == [*expected, ("", None, 0, 1)]
    assert launches_per_layer(found) == {"layers.0": 3, "layers.1": 3, "": 1}
    assert [s.is_reference for s in found] == [True, False, False] * 2 + [False]


def test_a_reference_counts_what_it_runs() -> None:
    activation = [s for s in steps(program(()), TARGET) if s.is_reference][1]
    assert activation.launches == () and activation.count == 1


def test_a_launch_is_described_as_the_launcher_asked() -> None:
    first, _ = [s.launches[0] for s in steps(program(TWICE), TARGET) if s.launches]
    assert first.name == "_twice" and first.grid == (2,) and dict(first.constants)["BLOCK"] == 64
    assert dict(first.signature)["x_ptr"] == "*fp32" and dict(first.options) == {"num_warps": 4}


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.3.mlp.up", "model.layers.3"),
        ("h.11", "h.11"),
        ("0.attn", "0"),
        ("model.norm", ""),
        ("", ""),
        ("blocks.1.experts.4.up", "blocks.1"),
        ("encoder2.layer", ""),
    ],
)
def test_a_layer_is_the_path_up_to_its_first_number(path: str, layer: str) -> None:
    assert layer_of(path) == layer


def test_symbolic_shapes_are_refused_by_name() -> None:
    build = Builder()
    x = build.input("x", build.size("n", 4), 8)
    gm = build.done(build.call(aten.neg.default, x))
    with pytest.raises(PipelineError, match="input n has no fixed shape"):
        steps(gm, TARGET)
