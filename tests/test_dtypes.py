"""Dtypes and sizes at the edge of what is optimised: as eager, and the report says what became of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from graphopt import backend
from graphopt.report import Report
from tests.block import agree, block, example

F = torch.nn.functional
FP8 = torch.float8_e4m3fn
SMALL_INTS = (torch.uint8, torch.int8)


def small(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Whole numbers in [0, 9), which every dtype here holds."""
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class Compiled:
    """What a compiled call gave: its result, the graph's report, the warnings."""

    result: Tensor
    report: Report
    warnings: tuple[str, ...]


def compiled(program: Callable[..., Tensor], *args: Tensor) -> Compiled:
    """A first call through torch.compile; one graph."""
    torch.compiler.reset()
    backend.clear_reports()
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        result = torch.compile(program, backend="graphopt", fullgraph=True)(*args)
    (report,) = backend.reports()
    return Compiled(result, report, tuple(str(w.message) for w in seen))


def same(ours: Tensor, eager: Tensor) -> None:
    """Equal in dtype and in every bit; fp8 has no comparison of its own."""
    assert ours.dtype == eager.dtype
    assert torch.equal(ours.double(), eager.double())


@pytest.mark.parametrize("dtype", SMALL_INTS, ids=str)
def test_products_of_small_integers_wrap_as_in_eager(dtype: torch.dtype) -> None:
    """9 sums of up to 64 pass 255: a product that computed in another dtype would show."""
    x, w = small(3, 9, dtype=dtype) + 20, small(5, 9, dtype=dtype, seed=1) + 20
    found = compiled(lambda x, w: x @ w.mT, x, w)
    same(found.result, x @ w.mT)
    assert (x.int() @ w.int().mT).max() > 255
    assert found.report.fallback is None


@pytest.mark.parametrize("dtype", SMALL_INTS, ids=str)
def test_a_linear_of_small_integers_is_as_in_eager(dtype: torch.dtype) -> None:
    x, w = small(2, 3, 9, dtype=dtype), small(5, 9, dtype=dtype, seed=1)
    found = compiled(F.linear, x, w)
    same(found.result, F.linear(x, w))
    assert found.report.fallback is None


@pytest.mark.parametrize("dtype", SMALL_INTS, ids=str)
def test_scores_of_small_integers_become_no_attention(dtype: torch.dtype) -> None:
    """q @ k wraps before the softmax; an attention op would not."""
    q, k, v = (small(2, 3, n, 9, dtype=dtype, seed=n) for n in (4, 5, 5))

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT).float() / 64, -1) @ v.float()

    found = compiled(program, q, k, v)
    agree(found.result, program(q, k, v))
    assert "attention" not in found.report.counts
    (reason,) = {r.reason for r in found.report.refusals if r.rule == "attention_scores"}
    assert f"[2, 3, 4, 9] {dtype}" in reason


def test_fp8_weights_are_cast_and_multiplied_as_written() -> None:
    x, w = torch.randn(3, 16).bfloat16(), torch.randn(5, 16).to(FP8)
    found = compiled(lambda x, w: F.linear(x, w.bfloat16()), x, w)
    same(found.result, F.linear(x, w.bfloat16()))
    assert found.report.counts == {"linear": 1, "aten.to": 1} and not found.warnings


def test_a_norm_of_fp8_is_optimised_behind_its_cast() -> None:
    x = torch.randn(3, 16).to(FP8)

    def program(x: Tensor) -> Tensor:
        h = x.float()
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)

    found = compiled(program, x)
    agree(found.result, program(x))
    assert found.report.counts["rms_norm"] == 1


def test_a_result_in_fp8_is_rounded_as_in_eager() -> None:
    x = torch.randn(3, 5)
    found = compiled(lambda x: F.silu(x).to(FP8), x)
    same(found.result, F.silu(x).to(FP8))
    assert found.report.counts == {"activation": 1, "aten.to": 1}


def test_what_eager_has_no_kernel_for_fails_as_in_eager() -> None:
    x = torch.randn(3, 5).to(FP8)
    with pytest.raises(NotImplementedError) as eager:
        F.silu(x)
    with pytest.raises(NotImplementedError) as ours:
        compiled(F.silu, x)
    assert str(ours.value) == str(eager.value)


def test_a_graph_of_integers_has_nothing_to_optimise_and_does_not_warn() -> None:
    def program(x: Tensor, y: Tensor) -> Tensor:
        return (x * y + x.cumsum(-1))[:, :2].sum(-1) // 3

    args = torch.arange(12).view(3, 4), torch.ones(3, 4, dtype=torch.int32)
    found = compiled(program, *args)
    same(found.result, program(*args))
    assert found.report.fallback is None and not found.warnings
    assert not [name for name in found.report.counts if "." not in name], found.report.counts


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (0, 0)])
def test_an_empty_batch_is_optimised_too(batch: int, length: int) -> None:
    model, x = block(), torch.zeros(batch, length, 20)
    found = compiled(model, x)
    assert found.result.shape == model(x).shape == (batch, length, 20)
    assert found.report.fallback is None and not found.warnings
    assert found.report.counts["attention"] == 1 and found.report.counts["linear"] == 7


def test_a_batch_that_becomes_empty_is_right() -> None:
    model = block()
    torch.compiler.reset()
    ours = torch.compile(model, backend="graphopt", dynamic=True, options={"strict": True})
    for batch in (3, 0, 2):
        agree(ours(example(5, batch)), model(example(5, batch)))
