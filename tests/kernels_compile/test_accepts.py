"""GPU kernels take the shapes that they must, in every dtype, and what they then launch fits the targets."""

from __future__ import annotations

import pytest
import torch

from graphopt.kernel import Kernel
from graphopt.targets import TARGETS
from tests.kernel_check import GPU_KERNELS, TRITON_KERNELS, refusal
from tests.kernels_compile.variants import launches, variants

EACH = pytest.mark.parametrize("kernel", TRITON_KERNELS, ids=lambda k: k.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", GPU_KERNELS, ids=lambda k: k.name)
def test_kernel_accepts_what_it_must(kernel: Kernel, dtype: torch.dtype) -> None:
    assert kernel.must_accept, f"{kernel.name} promises nothing"
    refused = {c.name: refusal(kernel, c, dtype) for c in kernel.must_accept}
    assert not any(refused.values()), {name: reason for name, reason in refused.items() if reason}


@EACH
def test_kernel_launches_something_for_each(kernel: Kernel) -> None:
    for target in TARGETS.values():
        silent = [c.name for c in kernel.must_accept if not launches(kernel, c, torch.bfloat16, target)]
        assert not silent, f"nothing is launched for {silent} on {target.name}"


def test_kernels_without_triton_in_their_name_launch_nothing() -> None:
    for kernel in set(GPU_KERNELS) - set(TRITON_KERNELS):
        for case in kernel.must_accept:
            assert not launches(kernel, case, torch.bfloat16, TARGETS["cuda:90"]), kernel.name


def test_labels_name_one_variant_each() -> None:
    for target in TARGETS.values():
        labels = [(v.kernel, v.label) for v in variants(target)]
        assert len(set(labels)) == len(labels)


def test_what_kernels_expect_is_spelled_right() -> None:
    for kernel in TRITON_KERNELS:
        seen = {
            one.name
            for case in kernel.must_accept
            for one in launches(kernel, case, torch.bfloat16, TARGETS["cuda:90"])
        }
        for name, what in kernel.expects:
            assert name in seen, f"{kernel.name} expects something of {name}, and launches {sorted(seen)}"
            assert what in ("matrix", "wide_loads"), f"{kernel.name} expects {what!r} of {name}"
