"""The first kernel that does not refuse is chosen, the reference last, and the reasons are told."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from graphopt import ops
from graphopt.kernel import GPU, Kernel, never
from graphopt.kernels import rms_norm as kernels
from graphopt.lowering.select import REFERENCE, kernel_for, select
from graphopt.observe import Event, KernelChosen
from tests.graphs import Builder


def first(x: torch.Tensor, *rest: object) -> torch.Tensor:
    return x + 1


def second(x: torch.Tensor, *rest: object) -> torch.Tensor:
    return x + 2


def picky(node: fx.Node) -> str | None:
    return "D 8 < 16"


class Listener:
    def __init__(self) -> None:
        self.chosen: list[KernelChosen] = []

    def on_event(self, event: Event) -> None:
        assert isinstance(event, KernelChosen)
        self.chosen.append(event)


def graph() -> fx.GraphModule:
    build = Builder()
    x, w = build.input("x", 2, 8), build.weight("norm.weight", 8)
    y = build.call(ops.rms_norm.overload, x, w, 1e-6, 0.0, True)
    return build.done(build.call(torch.ops.aten.neg.default, y))


def chosen(*kernels: Kernel, target: str = "cpu") -> tuple[fx.GraphModule, KernelChosen]:
    gm, listener = graph(), Listener()
    assert select(gm.graph, kernels, target, (listener,)) == 1
    gm.recompile()
    return gm, listener.chosen[0]


def test_the_first_that_does_not_refuse_is_chosen() -> None:
    table = (
        Kernel("rms_norm", "picky", first, picky),
        Kernel("rms_norm", "second", second, never),
        *kernels.KERNELS,
    )
    gm, event = chosen(*table)
    assert event == KernelChosen("rms_norm_default", "rms_norm", "second", ("picky: D 8 < 16",))
    assert torch.equal(gm(torch.zeros(2, 8), torch.ones(8))[0], torch.full((2, 8), -2.0))
    node = next(n for n in gm.graph.nodes if n.target is second)
    assert node.meta["kernel"] == "second" and "second(" in gm.code


def test_the_reference_is_last_and_called_directly() -> None:
    gm, event = chosen(Kernel("rms_norm", "picky", first, picky))
    assert event.kernel == REFERENCE and event.reasons == ("picky: D 8 < 16",)
    assert any(n.target is ops.rms_norm.reference for n in gm.graph.nodes)
    x, w = torch.randn(2, 8), torch.randn(8)
    torch.testing.assert_close(gm(x, w)[0], -ops.rms_norm(x, w, 1e-6))


def test_kernels_of_other_targets_and_ops_are_not_asked() -> None:
    other = Kernel("rms_norm", "gpu", first, never, "cuda:90")
    _, event = chosen(other, Kernel("layer_norm", "norm", first, never))
    assert event.kernel == REFERENCE and event.reasons == ()
    _, event = chosen(other, target="cuda:90")
    assert event.kernel == "gpu"


def test_nodes_of_other_operators_stay() -> None:
    gm, _ = chosen(*kernels.KERNELS)
    (neg,) = [n for n in gm.graph.nodes if n.target is torch.ops.aten.neg.default]
    assert "kernel" not in neg.meta


def test_a_scalar_on_another_device_is_refused_for_every_kernel() -> None:
    build = Builder()
    q, k, v = (build.input(name, 1, 2, 3, 8) for name in "qkv")
    past = build.input("past", dtype=torch.int64)
    past.meta["val"] = torch.empty((), dtype=torch.int64, device="meta")
    y = build.call(ops.attention.overload, q, k, v, 0.5, True, 0, past)
    gm, listener = build.done(y), Listener()
    select(gm.graph, (Kernel("attention", "second", second, never),), "cpu", (listener,))
    assert listener.chosen[0].kernel == REFERENCE
    assert listener.chosen[0].reasons == ("second: past is on meta, q on cpu",)


@pytest.mark.parametrize(
    ("target", "name"), [("cpu", "cpu's"), ("cuda:90", "all's"), ("hip:gfx942", "all's")]
)
def test_a_kernel_for_all_gpus_serves_each_and_no_cpu(target: str, name: str) -> None:
    table = (Kernel("rms_norm", "all's", first, never, GPU), Kernel("rms_norm", "cpu's", second, never))
    _, event = chosen(*table, target=target)
    assert event.kernel == name


def test_the_kernel_of_a_call_is_known_without_a_graph() -> None:
    table = (Kernel("rms_norm", "all's", first, never, GPU),)
    arguments = (torch.randn(2, 8), torch.randn(8), 1e-6, 0.0, True)
    assert kernel_for(ops.rms_norm, arguments, table, "cuda:80") == ("all's", first)
    assert kernel_for(ops.rms_norm, arguments, table, "cpu")[0] == REFERENCE
