"""Compile what the GPU tests of kernels launch into Triton's cache, on all cores: python -m tests.gpu.warm.

One process compiles a kernel in half a second, and the tests launch hundreds. Needs no GPU, and starts none.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator

import torch

from graphopt.aot import CompileError, build, variant
from graphopt.kernel import Case, Kernel
from graphopt.launch import Launch
from graphopt.recorded import launches_of
from graphopt.targets import Target, target_named
from tests.kernel_check import TRITON_KERNELS, fake_node

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _cases(kernel: Kernel) -> Iterator[tuple[Case, torch.dtype]]:
    """What the tests run."""
    for dtype in DTYPES:
        yield from ((c, dtype) for c in kernel.cases)
    yield from ((c, torch.bfloat16) for c in kernel.must_accept)


def launches(target: Target) -> list[Launch]:
    """Each launch once, those of the first cases first."""
    found: dict[tuple[object, ...], Launch] = {}
    for kernel in TRITON_KERNELS:
        for case, dtype in _cases(kernel):
            node, arguments = fake_node(kernel, case, dtype)
            if kernel.refuses(node) is None:
                for one in launches_of(kernel.launch, arguments, target):
                    found.setdefault(variant(one), one)
    return list(found.values())


def main(name: str = "cuda:90") -> None:
    """Compile for a target. What fails is told; the tests will say more."""
    target = target_named(name)
    wanted = launches(target)
    # Forked, children have the launches: jit functions cannot be sent.
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), _inherit, (wanted, target)) as pool:
        failed = [text for text in pool.imap_unordered(_built, range(len(wanted))) if text]
    sys.stdout.write(
        "".join(f"{text}\n" for text in failed) + f"{len(wanted)} kernels, {len(failed)} failed\n"
    )


_inherited: tuple[list[Launch], Target]


def _inherit(wanted: list[Launch], target: Target) -> None:
    global _inherited
    _inherited = wanted, target


def _built(i: int) -> str:
    wanted, target = _inherited
    try:
        build(wanted[i], target)
    except CompileError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
