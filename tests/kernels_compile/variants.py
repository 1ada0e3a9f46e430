"""What the GPU kernels launch on the shapes that they must accept, each compiled kernel once."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from graphopt.aot import Compiled, CompileError, compile_launch, variant
from graphopt.kernel import Case, Kernel
from graphopt.launch import Launch
from graphopt.recorded import launches_of
from graphopt.targets import TARGETS, Target
from tests.kernel_check import TRITON_KERNELS, fake_node

DTYPES = (torch.bfloat16, torch.float32)
HALF = ("*bf16", "*fp16")


@dataclass(frozen=True)
class Variant:
    """A launch to compile, named after the first case that makes it."""

    label: str
    launch: Launch

    @property
    def is_half(self) -> bool:
        """Whether its activations are in half precision: its first pointer is."""
        return next(t for _, t in self.launch.signature if t.startswith(("*", "tensordesc"))).startswith(
            (*HALF, "tensordesc<bf16", "tensordesc<fp16")
        )


def launches(kernel: Kernel, case: Case, dtype: torch.dtype, target: Target) -> tuple[Launch, ...]:
    """What a kernel launches for a case on a target; nothing where it refuses."""
    node, arguments = fake_node(kernel, case, dtype)
    return () if kernel.refuses(node) is not None else launches_of(kernel.launch, arguments, target)


@functools.cache
def variants(target: Target) -> tuple[Variant, ...]:
    """What has to be compiled for a target."""
    found: dict[tuple[object, ...], Variant] = {}
    used: Counter[tuple[str, str]] = Counter()
    for label, launch in _labelled(target):
        if variant(launch) in found:
            continue
        used[launch.name, label] += 1  # two cases may have one name
        again = used[launch.name, label]
        found[variant(launch)] = Variant(f"{label} ({again})" if again > 1 else label, launch)
    return tuple(found.values())


def _labelled(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every launch of every case, as `rms_norm_triton, 16k, bfloat16, 1`; the number counts one call's."""
    for kernel in TRITON_KERNELS:
        for case in kernel.must_accept:
            for dtype in DTYPES:
                for i, launch in enumerate(launches(kernel, case, dtype, target)):
                    where = f"{kernel.name}, {case.name}, {str(dtype).removeprefix('torch.')}"
                    yield f"{where}, {i}" if i else where, launch


def jit_names() -> tuple[str, ...]:
    """The jit functions, over all targets."""
    return tuple(sorted({v.launch.name for t in TARGETS.values() for v in variants(t)}))


def of(name: str, target: Target) -> tuple[Variant, ...]:
    """The variants of one jit function."""
    return tuple(v for v in variants(target) if v.launch.name == name)


@functools.cache
def compiled(name: str, target: Target) -> dict[str, Compiled | CompileError]:
    """Label -> a variant of one jit function as compiled, or why it is not; each compiled once a process."""
    return {v.label: _tried(v.launch, target) for v in of(name, target)}


def _tried(launch: Launch, target: Target) -> Compiled | CompileError:
    try:
        return compile_launch(launch, target)
    except CompileError as error:
        return error
