"""Every CPU kernel against its op's reference, on every case, layout and dtype; and why it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from graphopt import ops
from graphopt.accuracy import judge
from graphopt.kernel import Case, Kernel, Tensor
from graphopt.kernels import attention, cache, experts, layer_norm, linear, linear_int8, mlp, rms_norm, rope
from tests.graphs import node_of, node_of_case
from tests.tolerances import close

KERNELS: tuple[Kernel, ...] = (
    *rms_norm.KERNELS,
    *layer_norm.KERNELS,
    *rope.KERNELS,
    *attention.KERNELS,
    *linear.KERNELS,
    *linear_int8.KERNELS,
    *mlp.KERNELS,
    *experts.KERNELS,
    *cache.KERNELS,
)
ALL_CASES = [pytest.param(k, c, id=f"{k.name}-{c.name}") for k in KERNELS for c in k.cases]
DTYPES = (torch.float32, torch.bfloat16)


def op(kernel: Kernel) -> ops.Op:
    return getattr(ops, kernel.op)


def raised(arguments: Sequence[object]) -> tuple[object, ...]:
    return tuple(
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "case"), ALL_CASES)
def test_kernel_computes_what_its_reference_does(kernel: Kernel, case: Case, dtype: torch.dtype) -> None:
    reason = kernel.refuses(node_of_case(op(kernel).overload, case, dtype))
    if reason is not None:  # another kernel of the op, or its reference, takes the case
        assert reason and not (dtype == torch.float32 and case in kernel.must_accept)
        return
    arguments = case.make(dtype)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    found = kernel.launch(*arguments)
    verdict = judge(op(kernel).reference(*raised(arguments)), op(kernel).reference(*arguments), found, dtype)
    assert verdict.ok, verdict.reason
    for a, b in zip(arguments, before, strict=True):
        assert a is b or torch.equal(a, b), "a kernel changed its input"  # type: ignore[arg-type]  # tensors


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.must_accept], ids=lambda k: k.name)
def test_kernel_accepts_what_it_must(kernel: Kernel) -> None:
    for case in kernel.must_accept:
        assert kernel.refuses(node_of_case(op(kernel).overload, case)) is None, case.name


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_kernel_runs_at_least_one_of_its_cases(kernel: Kernel) -> None:
    taken = {
        (case.name, dtype)
        for case in kernel.cases
        for dtype in DTYPES
        if kernel.refuses(node_of_case(op(kernel).overload, case, dtype)) is None
    }
    assert len(taken) >= 2, f"{kernel.name} refuses its own cases"


@pytest.mark.parametrize("kind", sorted(ops.mlp.ACTIVATIONS))
def test_a_broken_kernel_would_be_seen(kind: str) -> None:
    case = Case("", (Tensor((3, 7, 123), scale=3.0), kind))
    x, _ = case.make()
    reference = ops.activation.reference
    assert isinstance(x, torch.Tensor)
    wrong = reference(x * 1.01, kind)
    assert not judge(reference(x.double(), kind), reference(x, kind), wrong, torch.float32).ok


# ----------------------------------------------------------------------------------------------- refusals

F32, BF16 = torch.float32, torch.bfloat16


def tensor(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def refusal(kernel_name: str, *arguments: object) -> str | None:
    kernel = next(k for k in KERNELS if k.name == kernel_name)
    return kernel.refuses(node_of(op(kernel).overload, arguments))


X, W = tensor(2, 3, 8), tensor(8)
Q, K = tensor(2, 4, 5, 8), tensor(2, 2, 5, 8)
REFUSALS = [
    ("rms_norm_torch", (X, W, 1e-6, 1.0), "weight_offset 1.0 != 0"),
    ("rms_norm_torch", (X.bfloat16(), W, 1e-6), "weight is torch.float32, x is torch.bfloat16"),
    ("add_rms_norm_torch", (X, X.bfloat16(), W, 1e-6), "residual is torch.bfloat16, x is torch.float32"),
    ("add_rms_norm_torch", (X, X, W, 1e-6, 1.0), "weight_offset 1.0 != 0"),
    ("layer_norm_torch", (X.bfloat16(), W, None, 1e-6), "weight is torch.float32, x is torch.bfloat16"),
    (
        "add_layer_norm_torch",
        (X, X.bfloat16(), W, None, 1e-6),
        "residual is torch.bfloat16, x is torch.float32",
    ),
    (
        "rope_rolled",
        (Q, K, tensor(1, 5, 8, dtype=BF16), tensor(1, 5, 8), 8),
        "cos is torch.bfloat16, q is torch.float32",
    ),
    ("gated_activation_torch", (X, X.bfloat16(), "silu"), "gate is torch.float32, up is torch.bfloat16"),
    ("gated_activation_torch", (X, W, "silu"), "gate is (2, 3, 8), up is (8,)"),
    ("attention_sdpa", (Q, K, K, 0.5, True, 1), "causal with offset 1 != 0"),
    (
        "attention_sdpa",
        (Q, K, K, 0.5, False, 0, torch.tensor(3)),
        "offset_tensor is no part of a mask tensor yet",
    ),
    ("attention_sdpa", (Q, K, K, 0.5, True, 0, None, 3), "window is no part of a mask tensor yet"),
    ("attention_sdpa", (Q, K, K, 0.5, True, 0, None, None, None, tensor(5, 5)), "causal beside a bias"),
    (
        "attention_sdpa",
        (Q, K, K, 0.5, False, 0, None, None, None, tensor(5, 5, dtype=torch.bool)),
        "bias is torch.bool, not additive",
    ),
    ("attention_sdpa", (Q, K, K, 0.5, False, 0, None, None, None, None, 3.0), "softcap is not None"),
    (
        "attention_sdpa",
        (Q, K, K, 0.5, False, 0, None, None, None, None, None, tensor(4)),
        "sinks is not None",
    ),
    ("attention_sdpa", (Q, K.bfloat16(), K, 0.5), "q is torch.float32, k torch.bfloat16, v torch.float32"),
    (
        "attention_sdpa",
        (Q, K, K, 0.5, False, 0, None, None, None, tensor(5, 5, dtype=BF16)),
        "bias is torch.bfloat16, q is torch.float32",
    ),
    ("attention_one_query", (Q, K, K, 0.5), "5 queries, not 1"),
    ("attention_one_query", (Q[:, :, :1], K, K, 0.5), "dtype torch.float32 is not half"),
    ("attention_composed", (Q, K, K, 0.5, True), "causal is no part of a mask tensor yet"),
]


@pytest.mark.parametrize(
    ("kernel", "arguments", "reason"), REFUSALS, ids=[f"{r[0]}-{r[2]}" for r in REFUSALS]
)
def test_refusal_names_value_and_limit(kernel: str, arguments: tuple[object, ...], reason: str) -> None:
    assert refusal(kernel, *arguments) == reason


# ---------------------------------------------------------------------------------------- rows without keys


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", attention.KERNELS, ids=lambda k: k.name)
def test_a_row_that_the_bias_hides_gives_zeros_or_the_mean(kernel: Kernel, dtype: torch.dtype) -> None:
    queries = 1 if kernel.name == "attention_one_query" else 3
    generator = torch.Generator().manual_seed(1)
    q, k, v = (Tensor((2, 4, n, 16)).make(dtype, "cpu", generator) for n in (queries, 6, 6))
    for hidden, expected in (
        (-torch.inf, torch.zeros_like(v[0, :, 0])),
        (torch.finfo(dtype).min, v[0].mean(1)),
    ):
        bias = torch.zeros(2, 1, queries, 6, dtype=dtype)
        bias[0] = hidden
        found = kernel.launch(q, k, v, 0.25, bias=bias)
        close(found[0, :, 0], expected, dtype)  # type: ignore[index]  # a tensor
        assert not torch.isnan(found).any()  # type: ignore[arg-type]  # a tensor


def test_case_layouts_are_what_they_say() -> None:
    generator = torch.Generator()
    made = {
        name: Tensor((2, 3, 4), layout=name).make(F32, "cpu", generator)
        for name in ("contiguous", "transposed", "sliced", "expanded")
    }
    assert all(t.shape == (2, 3, 4) for t in made.values())
    assert made["contiguous"].is_contiguous()
    assert made["transposed"].stride() == (12, 1, 3) and made["sliced"].stride() == (24, 8, 1)
    assert made["expanded"].stride()[0] == 0
    with pytest.raises(ValueError, match="layout 'diagonal' is none of"):
        Tensor((2, 2), layout="diagonal").make(F32, "cpu", generator)
