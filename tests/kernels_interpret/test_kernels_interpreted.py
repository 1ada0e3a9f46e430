"""Every GPU kernel, interpreted, against its op's reference: every case, in fp32 and fp16, between canaries.

Not in bf16: the interpreter computes on its bits. `tests/test_triton_lint.py` sees to it that kernels upcast
first, so that bf16 differs in loads and stores alone.
"""

from __future__ import annotations

import functools

import pytest
import torch

from graphopt import ops
from graphopt.kernel import Case, Kernel, Tensor
from graphopt.launch import configured_for
from graphopt.targets import TARGETS
from tests import sample_kernels
from tests.kernel_check import GPU_KERNELS, check, op_of, refusal

# Both on purpose: 1 / (1 + exp(100)) is 0, and log(0) is what a row without keys has.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning"),
]
DTYPES = (torch.float32, torch.float16)
CASES = [pytest.param(k, c, id=f"{k.name}-{c.name}") for k in GPU_KERNELS for c in k.cases]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_kernel_computes_what_its_reference_does(kernel: Kernel, case: Case, dtype: torch.dtype) -> None:
    reason = refusal(kernel, case, dtype)
    if reason is not None:  # another kernel of the op, or its reference, takes the case
        assert reason
        return
    check(kernel.launch, op_of(kernel), case, dtype)


@pytest.mark.parametrize("name", ["cuda:80", "hip:gfx942"])
@pytest.mark.parametrize("kernel", GPU_KERNELS, ids=lambda k: k.name)
def test_kernel_computes_the_same_as_configured_for_another_target(kernel: Kernel, name: str) -> None:
    accepted = [c for c in kernel.cases if refusal(kernel, c, torch.float16) is None]
    with configured_for(TARGETS[name]):
        for case in accepted[:2]:
            check(kernel.launch, op_of(kernel), case, torch.float16)


@pytest.mark.parametrize("kernel", GPU_KERNELS, ids=lambda k: k.name)
def test_kernel_runs_its_own_cases(kernel: Kernel) -> None:
    assert kernel.cases and kernel.must_accept, "a kernel without cases is not tested"
    taken = [c.name for c in kernel.cases if refusal(kernel, c, torch.float16) is None]
    assert taken, f"{kernel.name} refuses all of its own cases"


# --------------------------------------------------------------------------- what the check itself sees

SEEN = {
    "writes behind": r"broken: wrote outside of allocation 0, \(7, 123\)",
    "reads behind": r"broken: \[0\]: infinities or nans stand elsewhere",
    "reads before": r"broken: \[0\]: infinities or nans stand elsewhere",
    "leaves a tail": r"broken: \[0\]: infinities or nans stand elsewhere",
    "writes its input": "broken: changed argument 0",
    "wrong": r"broken: \[0\]: rmse",
}
SIZES = {"ugly": (7, 123), "edge": (64,), "one": (1,), "block": (4096,)}


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_right_kernel_passes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(sample_kernels.relu, ops.activation, Case("right", (Tensor(shape), "relu")), dtype)


@pytest.mark.parametrize("fault", SEEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_broken_kernel_is_seen(fault: str, dtype: torch.dtype) -> None:
    launcher = functools.partial(sample_kernels.relu, fault=fault)
    case = Case("broken", (Tensor((7, 123), scale=3.0), "relu"))
    with pytest.raises(AssertionError, match=SEEN[fault]):
        check(launcher, ops.activation, case, dtype)


def test_a_result_that_is_an_input_is_seen() -> None:
    with pytest.raises(AssertionError, match="a result is an input"):
        check(lambda x, kind: x, ops.activation, Case("alias", (Tensor((3,)), "relu")), torch.float32)


def test_a_result_of_another_dtype_is_seen() -> None:
    with pytest.raises(AssertionError, match="is float32"):
        case = Case("dtype", (Tensor((3,)), "relu"))
        check(lambda x, kind: x.float().relu(), ops.activation, case, torch.float16)
