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
from graphopt.targets import Target
from tests.kernel_check import TRITON_KERNELS, fake_node

DTYPES = (torch.bfloat16, torch.float32)
HALF = ("*bf16", "*fp16")


@dataclass(frozen=True)
class Variant:
    """A launch to compile, named after the first case that makes it.

    Attributes:
        kernel: the name of the first kernel that launches it.
        label: its case, dtype and jit function, as `16k, bfloat16, _rms_norm`.
        launch: what to compile.
    """

    kernel: str
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
    for kernel, case, dtype in _cases():
        for launch in launches(kernel, case, dtype, target):
            if variant(launch) in found:
                continue
            label = f"{case.name}, {str(dtype).removeprefix('torch.')}, {launch.name}"
            used[kernel.name, label] += 1  # two cases may have one name
            again = used[kernel.name, label]
            label = f"{label} ({again})" if again > 1 else label
            found[variant(launch)] = Variant(kernel.name, label, launch)
    return tuple(found.values())


def _cases() -> Iterator[tuple[Kernel, Case, torch.dtype]]:
    for kernel in TRITON_KERNELS:
        for case in kernel.must_accept:
            for dtype in DTYPES:
                yield kernel, case, dtype


def of(kernel: str, target: Target) -> tuple[Variant, ...]:
    """The variants that a kernel is the first to launch."""
    return tuple(v for v in variants(target) if v.kernel == kernel)


@functools.cache
def compiled(kernel: str, target: Target) -> dict[str, Compiled | CompileError]:
    """Label -> a variant of one kernel as compiled, or why it is not; each compiled once a process."""
    return {v.label: _tried(v.launch, target) for v in of(kernel, target)}


def _tried(launch: Launch, target: Target) -> Compiled | CompileError:
    try:
        return compile_launch(launch, target)
    except CompileError as error:
        return error
