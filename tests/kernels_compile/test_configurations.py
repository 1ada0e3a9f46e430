"""Whatever the sizes, a launcher chooses no configuration larger than one that the gates have passed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import pytest
import torch

from graphopt.kernel import Case, Kernel, Tensor
from graphopt.launch import Launch
from graphopt.recorded import launches_of
from graphopt.targets import TARGETS, Target
from tests.kernel_check import TRITON_KERNELS, fake_node
from tests.kernels_compile.variants import variants

# Around the choices that launchers make: one, a warp's, no power of two, a large model's.
SIZES = (1, 16, 40, 128, 300, 2048, 8192)


def resized(case: Case) -> Iterator[Case]:
    """A case with one of its sizes replaced by another, in all tensors, and in its ints or not."""
    sizes = sorted({n for a in case.arguments if isinstance(a, Tensor) for n in a.shape})
    for old in sizes:
        for new in SIZES:
            for ints in {False, any(type(a) is int and a == old for a in case.arguments)}:
                arguments = tuple(_resized(a, old, new, ints) for a in case.arguments)
                yield Case(f"{case.name}, {old} -> {new}", arguments)


def _resized(argument: object, old: int, new: int, ints: bool) -> object:
    if isinstance(argument, Tensor):
        return dataclasses.replace(argument, shape=tuple(new if n == old else n for n in argument.shape))
    return new if ints and type(argument) is int and argument == old else argument


def configuration(launch: Launch) -> tuple[str, tuple[tuple[str, object], ...], int]:
    """A launch's function, options, and how many elements its blocks hold."""
    blocks = [v for k, v in launch.constants if k.startswith(("BLOCK", "ROWS")) and isinstance(v, int)]
    return launch.name, launch.options, math.prod(blocks)


def largest(launches: Iterable[Launch]) -> dict[tuple[str, object], int]:
    """Function and options -> the most elements."""
    most: dict[tuple[str, object], int] = {}
    for launch in launches:
        name, options, elements = configuration(launch)
        most[name, options] = max(most.get((name, options), 0), elements)
    return most


def chosen(kernel: Kernel) -> Iterator[tuple[Case, Target, Launch]]:
    """What a kernel launches at many sizes, where the op and the kernel take them."""
    seen: set[str] = set()
    for case in kernel.must_accept:
        for other in resized(case):
            if repr(other.arguments) in seen:
                continue
            seen.add(repr(other.arguments))
            try:
                node, arguments = fake_node(kernel, other, torch.bfloat16)
            except (ValueError, RuntimeError):  # the op's own checks: sizes that do not fit together
                continue
            if kernel.refuses(node) is not None:
                continue
            for target in TARGETS.values():
                for launch in launches_of(kernel.launch, arguments, target):
                    yield other, target, launch


@pytest.mark.parametrize("kernel", TRITON_KERNELS, ids=lambda k: k.name)
def test_no_size_makes_a_larger_configuration_than_those_compiled(kernel: Kernel) -> None:
    known = {t.name: largest(v.launch for v in variants(t)) for t in TARGETS.values()}
    beyond: dict[tuple[object, ...], str] = {}
    count = 0
    for case, target, launch in chosen(kernel):
        count += 1
        name, options, elements = configuration(launch)
        most = known[target.name].get((name, options), 0)
        if elements > most:
            where = f"{target.name}, {case.name}: {name}"
            what = f"{elements} elements with {dict(options)} > {most}, the most that is compiled"
            beyond.setdefault((target.name, name, options, elements), f"{where}: {what}")
    assert count, "no size was taken"
    advice = "give must_accept a case of that size, bound the choice, or refuse:"
    assert not beyond, "\n".join([advice, *beyond.values()])


def test_a_larger_configuration_is_seen() -> None:
    launch = variants(TARGETS["cuda:90"])[0].launch
    larger = dataclasses.replace(launch, constants=(*launch.constants, ("BLOCK_X", 2)))
    name, options, elements = configuration(larger)
    assert elements == 2 * configuration(launch)[2] and largest([launch])[name, options] < elements
    assert largest([launch, larger])[name, options] == elements


def test_sizes_are_replaced_in_tensors_and_ints_together() -> None:
    case = Case("c", (Tensor((2, 64)), Tensor((64,)), 64, 64.0, True))
    found = {c.name: c.arguments for c in resized(case)}
    assert found["c, 64 -> 16"] in (
        (Tensor((2, 16)), Tensor((16,)), 16, 64.0, True),
        (Tensor((2, 16)), Tensor((16,)), 64, 64.0, True),
    )
    assert found["c, 2 -> 16"] == (Tensor((16, 64)), Tensor((64,)), 64, 64.0, True)
