"""Compare a compiled program with eager: values, mutations, aliasing, strides and the random state."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import pytest
import torch
from torch.utils import _pytree as pytree

from graphopt import backend

Program: TypeAlias = "Callable[..., object]"
Tensors: TypeAlias = "Sequence[torch.Tensor]"


def x34() -> torch.Tensor:
    """[3, 4]: -5.5 to 5.5."""
    return torch.arange(12.0).reshape(3, 4) - 5.5


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same place in memory: one storage, and it is not empty."""
    return (
        a.numel() > 0 and b.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )


def relations(tensors: Tensors) -> set[tuple[int, int]]:
    """Which pairs share memory."""
    pairs = itertools.combinations(range(len(tensors)), 2)
    return {(i, j) for i, j in pairs if same_memory(tensors[i], tensors[j])}


def identities(tensors: Tensors) -> set[tuple[int, int]]:
    """Which pairs are one object."""
    return {(i, j) for i, j in itertools.combinations(range(len(tensors)), 2) if tensors[i] is tensors[j]}


def assert_same(
    got: torch.Tensor, want: torch.Tensor, what: str, exact: bool = True, layout: bool = True
) -> None:
    """Value for value; dtype, shape and, with `layout`, strides too."""
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{what}: {got.dtype} {got.shape}, eager {want.dtype} {want.shape}"
    )
    sizes = [i for i, n in enumerate(want.shape) if n != 1] if want.numel() else []
    strides = [(got.stride(i), want.stride(i)) for i in sizes]
    assert not layout or all(a == b for a, b in strides), (
        f"{what}: strides {got.stride()}, eager {want.stride()}"
    )
    assert got.requires_grad == want.requires_grad, what
    if exact:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")
    else:
        torch.testing.assert_close(got, want, equal_nan=True, msg=lambda m: f"{what}: {m}")


def compare(
    eager: Program,
    compiled: Program,
    arguments: tuple,
    *,
    exact: bool = True,
    layout: bool = True,
    seed: int = 0,
) -> None:
    """Run both on their own copies of the arguments; everything that a caller can see has to be the same."""
    sides = []
    for program in (eager, compiled):
        mine = copy.deepcopy(arguments)
        torch.manual_seed(seed)
        args, kwargs = mine if len(mine) == 2 and isinstance(mine[1], dict) else (mine, {})
        result = program(*args, **kwargs)
        flat, spec = pytree.tree_flatten(result)
        inputs = [x for x in pytree.tree_leaves(mine) if isinstance(x, torch.Tensor)]
        sides.append((flat, spec, inputs, torch.rand(1)))
    (want, want_spec, want_inputs, want_next), (got, got_spec, got_inputs, got_next) = sides
    assert got_spec == want_spec
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if isinstance(b, torch.Tensor):
            assert isinstance(a, torch.Tensor)
            assert_same(a, b, f"output {i}", exact, layout)
        else:
            assert type(a) is type(b) and a == b, f"output {i}: {a!r}, eager {b!r}"
    for i, (a, b) in enumerate(zip(got_inputs, want_inputs, strict=True)):
        assert_same(a, b, f"input {i} afterwards", exact)
    mine = [*got_inputs, *(x for x in got if isinstance(x, torch.Tensor))]
    eagers = [*want_inputs, *(x for x in want if isinstance(x, torch.Tensor))]
    assert relations(mine) == relations(eagers), "which outputs and inputs share memory"
    assert identities(mine) >= identities(eagers), "which outputs and inputs are one object"
    assert torch.equal(got_next, want_next), "the random generator is somewhere else"


def as_eager(
    program: Program,
    *arguments: object,
    dynamic: bool | None = None,
    exact: bool = True,
    graphs: int | None = 1,
    strict: bool = True,
) -> None:
    """The compiled program is the eager one, on the arguments and again on them; nothing fell back.

    `graphs` is how many graphs were compiled; None where Dynamo may need none. Not `strict`: it need match no
    rule.
    """
    torch.compiler.reset()
    backend.clear_reports()
    compiled = torch.compile(program, backend="graphopt", options={"strict": strict}, dynamic=dynamic)
    with torch.no_grad():
        for seed in (0, 1):
            compare(program, compiled, arguments, exact=exact, seed=seed)
    reports = backend.reports()
    assert not any(r.fallback for r in reports) and (graphs is None or len(reports) == graphs), reports


def falls_back(program: Program, *arguments: object, why: str) -> None:
    """The compiled program is the eager one, because it runs the original, for that reason."""
    torch.compiler.reset()
    backend.clear_reports()
    compiled = torch.compile(program, backend="graphopt")
    with pytest.warns(UserWarning, match="runs the original"), torch.no_grad():
        compare(program, compiled, arguments)
    reasons = [r.fallback for r in backend.reports()]
    assert any(why in reason for reason in reasons), reasons
