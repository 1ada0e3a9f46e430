"""Collectives over a named axis become torch's over a group; a group of one process is all that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from graphopt import ops
from graphopt.errors import PipelineError
from graphopt.lowering.collectives import bind_collectives, one_after_another, side_by_side
from graphopt.runtime.ranks import Mesh, agree
from tests.graphs import Builder, targets

c10d = torch.ops._c10d_functional


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Mesh]:
    """A group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield Mesh("tp", 1, 0, dist.group.WORLD.group_name, "gloo")
    dist.destroy_process_group()


def test_each_is_a_call_and_a_wait(alone: Mesh) -> None:
    build = Builder()
    x = build.input("x", 3, 4)
    outs = [
        build.call(ops.all_reduce.overload, x, "tp"),
        build.call(ops.all_gather.overload, x, "tp", -1),
        build.call(ops.reduce_scatter.overload, x, "tp", 1),
    ]
    gm = build.done(*outs)
    assert bind_collectives(gm.graph, alone) == 3
    gm.graph.lint()
    gm.recompile()
    assert [t for t in targets(gm) if "c10d" in str(t)] == [
        c10d.all_reduce.default, c10d.wait_tensor.default,
        c10d.all_gather_into_tensor.default, c10d.wait_tensor.default,
        c10d.reduce_scatter_tensor.default, c10d.wait_tensor.default,
    ]  # fmt: skip
    given = torch.randn(4, 3).T  # not contiguous
    for found in gm(given):
        assert torch.equal(found, given)


def test_without_a_mesh_they_stay() -> None:
    build = Builder()
    gm = build.done(build.call(ops.all_reduce.overload, build.input("x", 3), "tp"))
    assert bind_collectives(gm.graph, None) == 0
    assert targets(gm) == [ops.all_reduce.overload]


def test_an_axis_that_the_mesh_does_not_have() -> None:
    build = Builder()
    gm = build.done(build.call(ops.all_reduce.overload, build.input("x", 3), "experts", name="sum_1"))
    with pytest.raises(PipelineError, match="sum_1 is over axis 'experts'; the mesh has 'tp' alone"):
        bind_collectives(gm.graph, Mesh("tp", 2, 0, "0", "gloo"))


@pytest.mark.parametrize("dim", [0, 1, -1, -3])
def test_parts_along_another_dimension_than_the_groups(dim: int) -> None:
    x = torch.randn(4, 6, 2)
    parts = x.chunk(2, dim)
    assert torch.equal(side_by_side(torch.cat(parts), 2, dim), x)
    assert torch.equal(one_after_another(x, 2, dim), torch.cat(parts))


def test_one_process_agrees_with_itself(alone: Mesh) -> None:
    agree(alone, "0123456789abcdef")
