"""Collectives over a named mesh axis, as graphs hold them before a lowering binds the axis to a group.

The axis is a name ("tp"), not a process group: a graph with collectives prints, hashes and is cached
independent of any process. A lowering replaces these with `torch.distributed`'s functional collectives
(`_c10d_functional`). Here, as everywhere, the op is its reference: its meaning on a mesh of one rank, where a
collective is a copy.
"""

from __future__ import annotations

from torch import Tensor

from graphopt.ops.define import op

REDUCTIONS = ("sum", "avg", "max", "min")


def _check(name: str, axis: str, reduction: str | None = None, dim: int | None = None, rank: int = 0) -> None:
    """Raise ValueError for what does not fit together."""
    if not axis.isidentifier():
        raise ValueError(f"{name}: axis {axis!r} is no name of a mesh axis, as 'tp'")
    if reduction is not None and reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction {reduction!r} is not one of {', '.join(REDUCTIONS)}")
    if dim is not None and not -rank <= dim < rank:
        raise ValueError(f"{name}: dim {dim} is outside of a tensor with {rank} dimensions")


@op
def all_reduce(x: Tensor, axis: str, reduction: str = "sum") -> Tensor:
    """Every rank's x, reduced over the ranks of the axis: the same result on each, of x's shape.

    Source: Shoeybi et al. 2019 (Megatron-LM), section 3; `torch.distributed._functional_collectives`.
    Raises ValueError for an axis that is no name and an unknown reduction.
    """
    _check("all_reduce", axis, reduction)
    return x.clone()


@op
def all_gather(x: Tensor, axis: str, dim: int) -> Tensor:
    """Every rank's x, concatenated along `dim` in the order of ranks: size times the number of ranks there.

    Raises ValueError for an axis that is no name and a dim outside of x.
    """
    _check("all_gather", axis, dim=dim, rank=x.dim())
    return x.clone()


@op
def reduce_scatter(x: Tensor, axis: str, dim: int, reduction: str = "sum") -> Tensor:
    """Every rank's x, reduced, of which each rank keeps its part along `dim`.

    Raises ValueError for an axis that is no name, an unknown reduction and a dim outside of x.
    """
    _check("reduce_scatter", axis, reduction, dim, x.dim())
    return x.clone()
