"""Linear kernels in Triton, not run: what they refuse, and what they launch for which rows and target."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from graphopt import ops, torch_private
from graphopt.graph import val
from graphopt.kernel import Kernel
from graphopt.kernels import linear_triton
from graphopt.launch import Launch
from graphopt.recorded import launches_of
from graphopt.targets import TARGETS
from graphopt.triton_gemm import WITH_TMA, has_descriptor
from tests.graphs import Builder, node_of

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
HOPPER = TARGETS["cuda:90"]
NO_NORM = (None, None, None, 0.0, 0.0, True)


def tensor(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def kernel(name: str) -> Kernel:
    return next(k for k in linear_triton.KERNELS if k.name == name)


X, W = tensor(2, 3, 64), tensor(8, 64)
REFUSALS = [
    (
        "linear_triton",
        (X.double(), W.double(), None),
        "dtype torch.float64 of x is not float32, float16 or bfloat16",
    ),
    ("linear_triton", (X.float(), W, None), "weight is torch.bfloat16, x is torch.float32"),
    ("linear_aten", (tensor(8, 8, 64), W, None), "64 rows <= 64"),
    ("linear_aten", (tensor(65, 64).float(), W, None), "weight is torch.bfloat16, x is torch.float32"),
    (
        "linear_int8_triton",
        (tensor(2, 24), tensor(8, 24, dtype=INT8), tensor(8, 1), None),
        "group 24 is no multiple of 16",
    ),
    (
        "fused_linear_triton",
        (tensor(2, 24), tensor(8, 24, dtype=INT8), tensor(8, 3), None, *NO_NORM, None, False, None),
        "group 8 is no multiple of 16",
    ),
    (
        "fused_linear_triton",
        (X, W.float(), None, None, *NO_NORM, None, False, None),
        "weight is torch.float32, x is torch.bfloat16",
    ),
    (
        "fused_linear_triton",
        (X, W, None, None, "rms", tensor(64, dtype=F32), None, 1e-5, 0.0, True, None, False, None),
        "norm_weight is torch.float32, x is torch.bfloat16, and the row is cast before it",
    ),
    (
        "fused_linear_triton",
        (tensor(1, 64), W, None, None, *NO_NORM, None, False, tensor(5, 8)),
        "residual is (5, 8), the result is (1, 8)",
    ),
    (
        "fused_linear_triton",
        (X, W, None, None, *NO_NORM, None, False, tensor(2, 3, 8, dtype=torch.int64)),
        "residual is torch.int64, which is not floating point",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "reason"), REFUSALS, ids=[f"{r[0]}-{r[2]}" for r in REFUSALS])
def test_refusal_names_value_and_limit(name: str, arguments: tuple[object, ...], reason: str) -> None:
    node = node_of(getattr(ops, kernel(name).op).overload, arguments)
    assert kernel(name).refuses(node) == reason


def test_what_is_at_the_limit_is_taken() -> None:
    taken = [
        ("linear_aten", (tensor(65, 64), W, None)),
        ("linear_int8_triton", (tensor(2, 48), tensor(8, 48, dtype=INT8), tensor(8, 3), None)),
        (
            "fused_linear_triton",
            (
                X,
                W,
                None,
                None,
                "rms",
                tensor(64, dtype=F32),
                None,
                1e-5,
                1.0,
                False,
                None,
                False,
                tensor(3, 1),
            ),
        ),
    ]
    for name, arguments in taken:
        assert kernel(name).refuses(node_of(getattr(ops, kernel(name).op).overload, arguments)) is None, name


def test_an_unknown_number_of_rows_is_left_to_the_library_that_counts_them() -> None:
    build = Builder()
    x = build.input("x", build.size("n", 4), 64, dtype=BF16)
    node = build.call(ops.linear.overload, x, build.input("w", 8, 64, dtype=BF16), None)
    assert kernel("linear_aten").refuses(node) is None
    assert not isinstance(val(x).shape[0], int)  # type: ignore[attr-defined]  # a fake tensor


# ------------------------------------------------------------------------------------------------ launches


def launches(
    rows: int,
    k: int,
    features: int,
    target: str = "cuda:90",
    dtype: torch.dtype = BF16,
    norm: str | None = None,
) -> tuple[Launch, ...]:
    x, weight = tensor(rows, k, dtype=dtype), tensor(features, k, dtype=dtype)
    vector = tensor(k, dtype=dtype) if norm else None
    arguments = (x, weight, None, None, norm, vector, None, 1e-5, 0.0, True, None, False, None)
    return launches_of(linear_triton.fused_linear, arguments, TARGETS[target])


def constant(launch: Launch, name: str) -> object:
    return dict(launch.constants)[name]


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (0, []),
        (1, ["_gemv"]),
        (2, ["_skinny"]),
        (16, ["_skinny"]),
        (17, ["_rms_norm", "_gemm"]),
        (64, ["_rms_norm", "_gemm"]),
    ],
)
def test_rows_decide_what_is_launched(rows: int, names: list[str]) -> None:
    assert [one.name for one in launches(rows, 64, 32, norm="rms")] == names


def test_large_tiles_where_they_fill_the_target_and_small_ones_elsewhere() -> None:
    sizes = {
        (rows, features): (constant(one, "BLOCK_M"), constant(one, "BLOCK_N"))
        for rows, features in ((4096, 3072), (512, 6144), (512, 2048), (64, 2048))
        for (one,) in [launches(rows, 128, features)]
    }
    assert list(sizes.values()) == [(t.m, t.n) for t in WITH_TMA]


def test_a_persistent_grid_has_no_more_programs_than_are_resident() -> None:
    (one,) = launches(4096, 128, 8192)
    assert one.grid == (HOPPER.multiprocessors,)


def test_one_row_has_programs_for_every_multiprocessor() -> None:
    for features in (768, 2048, 3072, 8192, 128256):
        for target in TARGETS.values():
            (one,) = launches(1, 64, features, target.name)
            assert one.programs >= min(features // 2, 3 * target.multiprocessors)


def test_descriptors_only_where_the_target_and_the_strides_allow() -> None:
    def tma(*arguments: object, **keywords: object) -> object:
        return constant(launches(*arguments, **keywords)[0], "TMA")  # type: ignore[arg-type]  # as `launches`

    assert tma(64, 128, 64) and tma(64, 128, 64, "cuda:100")
    assert not tma(64, 128, 64, "cuda:80") and not tma(64, 128, 64, "hip:gfx942")
    assert not tma(64, 129, 64) and not tma(64, 128, 64, dtype=F32)
    whole = tensor(8, 64)
    assert has_descriptor(whole, whole[:, 8:]) and not has_descriptor(whole[:, 1:])
    assert not has_descriptor(whole.t()) and not has_descriptor(whole[:0])
    assert not has_descriptor(torch.zeros(8, 60, dtype=BF16)), "120 bytes a row"
    assert not has_descriptor(whole[:1].expand(8, -1)), "one row many times"


@pytest.mark.parametrize(("stride", "read_in_place"), [(1 << 15, True), (1 << 16, False)])
def test_columns_farther_apart_than_offsets_reach_are_brought_together(
    stride: int, read_in_place: bool
) -> None:
    """2^15 columns at 2^16 end at element 2^31, which 32 bits do not hold."""
    with torch_private.new_fake_mode():
        x = torch.empty_strided((1, 1 << 15), (1 << 31, stride), dtype=BF16)
        residual = torch.empty_strided((1, 1 << 15), (1 << 31, stride), dtype=BF16)
        weight = torch.empty(1 << 15, 1 << 15, dtype=BF16)
    arguments = (x, weight, None, None, *NO_NORM, None, False, residual)
    (one,) = launches_of(linear_triton.fused_linear, arguments, HOPPER)
    kinds = dict(one.signature)
    assert {kinds[n] for n in ("x_col_stride", "residual_col_stride")} == (
        {"i32"} if read_in_place else {"constexpr"}
    )


def test_another_number_of_rows_compiles_nothing_new() -> None:
    one, other = (dataclasses.replace(launches(m, 128, 64)[0], grid=()) for m in (3, 16))
    assert one == other


def test_quantized_fp32_is_multiplied_exactly_where_the_compiler_forgets_to() -> None:
    arguments = (tensor(20, 64, dtype=F32), tensor(8, 64, dtype=INT8), tensor(8, 1, dtype=F32), None)
    found = {
        name: constant(launches_of(linear_triton.linear_int8, arguments, target)[0], "PRECISION")
        for name, target in TARGETS.items()
    }
    assert found == {"cuda:80": "ieee", "cuda:90": "ieee", "cuda:100": "tf32x3", "hip:gfx942": "ieee"}
