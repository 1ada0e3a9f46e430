"""Linear kernels, interpreted, beyond their cases: many tiles a program, odd strides, all targets' tiles."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from graphopt import ops
from graphopt.accuracy import judge
from graphopt.kernel import Tensor
from graphopt.kernels import linear_triton
from graphopt.launch import configured_for
from graphopt.targets import TARGETS

FEW = dataclasses.replace(TARGETS["cuda:90"], multiprocessors=1)  # large tiles at once, and several a program
NO_NORM = (None, None, None, 0.0, 0.0, True)


def made(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return Tensor(shape, scale=scale).make(torch.float16, "cpu", generator)


def same(arguments: tuple[object, ...]) -> None:
    """Assert that fused_linear's kernel does what its reference does."""
    oracle = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    reference = ops.fused_linear.reference
    found = linear_triton.fused_linear(*arguments)  # type: ignore[arg-type]  # as the op takes them
    verdict = judge(reference(*oracle), reference(*arguments), found, torch.float16)
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("k", [72, 77], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_program_takes_several_tiles(gated: bool, k: int) -> None:
    x, weight, residual = made(300, k), made(2 * 280 if gated else 280, k, scale=0.1), made(300, 280, seed=1)
    activation = "silu" if gated else None
    with configured_for(FEW):
        same((x, weight, None, None, *NO_NORM, activation, gated, residual))


def test_a_program_takes_several_tiles_of_int8() -> None:
    weight = made(520, 128, scale=0.1)
    scales = ops.scales_int8.reference(weight, 64)
    packed = ops.pack_int8.reference(weight, scales)
    with configured_for(FEW):
        same((made(140, 128), packed, scales, made(520), *NO_NORM, None, False, None))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("target", TARGETS)
def test_a_transposed_weight_is_read_in_place(rows: int, target: str) -> None:
    with configured_for(TARGETS[target]):
        same((made(rows, 40), made(40, 24, scale=0.1).t(), None, None, *NO_NORM, None, False, None))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_vectors_whose_elements_are_apart(norm: str, rows: int) -> None:
    x, weight, apart, one = made(rows, 40), made(24, 40, scale=0.1), made(80)[::2], made(1).expand(40)
    norm_bias = one if norm == "layer" else None
    same((x, weight, None, made(48)[::2], norm, apart, norm_bias, 1e-5, 0.0, True, None, False, None))
    same((x, weight, None, made(1).expand(24), norm, one, None, 1e-5, 0.0, True, None, False, None))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_residual_of_one_number(rows: int) -> None:
    x, weight, residual = made(rows, 40), made(8, 40, scale=0.1), torch.tensor(0.5)
    arguments = (x, weight, None, None, *NO_NORM, None, False, residual)
    same(arguments)
    assert linear_triton.fused_linear(*arguments).dtype == torch.float16


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_nan_reaches_its_own_row_alone(rows: int) -> None:
    x = made(rows, 40)
    x[-1, 3] = torch.nan
    arguments = (x, made(8, 40), None, None, "rms", made(40), None, 1e-5, 0.0, True, "silu", False, None)
    found = linear_triton.fused_linear(*arguments)
    assert found[-1].isnan().all() and not found[:-1].isnan().any()


def test_more_rows_than_a_kernel_takes_are_an_error() -> None:
    with pytest.raises(ValueError, match="17 rows > 16; gemm takes more"):
        linear_triton.skinny(product(17, None))
    with pytest.raises(ValueError, match="gemm has no norm 'rms'; launch it before"):
        linear_triton.gemm(product(17, "rms"))


def product(rows: int, norm: str | None) -> linear_triton.Product:
    x, weight, y = made(rows, 16), made(8, 16), made(rows, 8)
    return linear_triton.Product(
        x, weight, None, None, norm, None, None, 0.0, 0.0, True, None, False, None, y
    )
