"""What int8 keeps of a weight: half a step of error at most, in every dtype; and what has no int8 form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import ops, torch_private
from graphopt.kernels.linear_int8 import HALF_ROWS, linear_int8
from graphopt.ops import quantized
from graphopt.ops.quantized import dequantized
from tests.op_cases import BF16, DTYPES, F16, F32, F64
from tests.tensors import rand
from tests.tolerances import HALF_A_STEP, INT8_IN_BF16, close

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = [(8, 128, 64), (5, 51, 3), (3, 24, 24), (7, 6, 1), (1, 1, 1), (0, 6, 2), (4, 0, 2)]  # N, K, group


def round_trip(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weight, scales, and what they stand for in fp64."""
    scales = ops.scales_int8(weight, group)
    packed = ops.pack_int8(weight, scales)
    return packed, scales, dequantized(packed, scales.double())


def missed(weight: Tensor, group: int) -> Tensor:
    """The error of each weight, in steps."""
    _, scales, kept = round_trip(weight, group)
    steps = scales.double().repeat_interleave(group, 1)
    return (kept - weight.double()).abs() / torch.where(steps == 0, 1.0, steps)


@every_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_weight_is_missed_by_half_a_step_at_most(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, k, group = size
    weight = rand(n, k, dtype=dtype)
    packed, scales, _ = round_trip(weight, group)
    assert packed.dtype == torch.int8 and packed.shape == (n, k) and packed.is_contiguous()
    assert scales.dtype == dtype and scales.shape == (n, k // group)
    assert (missed(weight, group) <= HALF_A_STEP).all()


@every_dtype
def test_the_largest_of_each_group_is_127_steps(dtype: torch.dtype) -> None:
    packed, _, _ = round_trip(rand(6, 64, dtype=dtype), 16)
    assert (packed.reshape(6, 4, 16).abs().amax(-1).int() >= 126).all() and packed.min() >= -127
    packed, _, _ = round_trip(torch.tensor([[1.0, -1.0, 0.5, 0.0]], dtype=dtype), 4)
    assert packed.tolist() in ([[127, -127, 64, 0]], [[127, -127, 63, 0]])


@every_dtype
def test_a_group_of_zeros_has_scale_0_and_stays_zeros(dtype: torch.dtype) -> None:
    weight = torch.cat([torch.zeros(2, 8, dtype=dtype), rand(2, 8, dtype=dtype)], 1)
    packed, scales, kept = round_trip(weight, 8)
    assert (scales[:, 0] == 0).all() and (packed[:, :8] == 0).all() and (kept[:, :8] == 0).all()
    assert (scales[:, 1] > 0).all()


@given(st.integers(-24, 15), st.integers(1, 63), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_fp16_weights_of_any_size_are_not_clipped(exponent: int, group: int, seed: int) -> None:
    weight = torch.randn((3, 2 * group), generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight = weight.clamp(-65504, 65504).half()
    scales = ops.scales_int8(weight, group)
    largest = weight.reshape(3, 2, group).abs().amax(-1)
    assert ((scales > 0) == (largest > 0)).all()  # a scale that became 0 would lose the group
    assert (missed(weight, group) <= HALF_A_STEP).all()


@given(st.sampled_from([F32, BF16, F64]), st.integers(-60, 60), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_groups_do_not_see_each_other(dtype: torch.dtype, exponent: int, seed: int) -> None:
    one, two = torch.randn((2, 4, 16), generator=torch.Generator().manual_seed(seed)).to(dtype)
    both = torch.cat([one, two * 2.0**exponent], 1)
    packed, scales, _ = round_trip(both, 16)
    alone, scale, _ = round_trip(one, 16)
    assert torch.equal(packed[:, :16], alone) and torch.equal(scales[:, :1], scale)
    rows, _, _ = round_trip(torch.cat([one, two]), 16)
    assert torch.equal(rows[:4], alone)  # so parts of a concatenation may be packed one by one


def test_strided_weights_are_packed_as_their_copies() -> None:
    wide = rand(130, 96)
    for weight in (wide.T, wide[:, 16:80], wide[::2], wide[:1].expand(5, 96)):
        group = 2 if weight.shape[1] % 8 else 8
        (one, scale, _), (two, other, _) = round_trip(weight, group), round_trip(weight.contiguous(), group)
        assert torch.equal(one, two) and torch.equal(scale, other) and one.is_contiguous()


@pytest.mark.parametrize("turned", [False, True])
def test_packing_by_tiles_changes_nothing(monkeypatch: pytest.MonkeyPatch, turned: bool) -> None:
    weight = rand(64, 50).T if turned else rand(50, 64)
    scales = ops.scales_int8(weight, 16)
    whole = ops.pack_int8(weight, scales)
    for tile in (1, 64, 640, 700):
        monkeypatch.setattr(quantized, "TILE", tile)
        packed = ops.pack_int8(weight, scales)
        assert torch.equal(packed, whole) and packed.is_contiguous()


# ------------------------------------------------------------------------------------------------- the linear


@every_dtype
@pytest.mark.parametrize("rows", [(), (1,), (HALF_ROWS - 1,), (HALF_ROWS,), (2, 3), (0,)], ids=str)
def test_the_reference_and_the_kernel_are_a_linear_on_what_is_kept(
    rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, bias = rand(*rows, 96, dtype=dtype), rand(40, dtype=dtype)
    packed, scales, kept = round_trip(rand(40, 96, dtype=dtype) / 10, 32)
    for added in (bias, None):
        expected = x.double() @ kept.T + (0 if added is None else added.double())
        found = ops.linear_int8(x, packed, scales, added)
        close(found, expected, dtype)
        assert found.dtype == dtype and found.shape == (*rows, 40)
        fast = linear_int8(x, packed, scales, added)
        assert fast.dtype == dtype and fast.shape == found.shape and fast.is_contiguous()
        if dtype == BF16 and x.numel() >= HALF_ROWS * 96:
            torch.testing.assert_close(fast.double(), expected, **INT8_IN_BF16)
        else:
            close(fast, expected, dtype)


@pytest.mark.parametrize("scale_dtype", [F32, F64, F16])
def test_scales_of_another_dtype_than_x(scale_dtype: torch.dtype) -> None:
    for dtype in DTYPES:
        x, weight = rand(20, 32, dtype=dtype), rand(6, 32, dtype=scale_dtype) / 6
        packed, scales, kept = round_trip(weight, 8)
        for found in (ops.linear_int8(x, packed, scales, None), linear_int8(x, packed, scales, None)):
            assert found.dtype == dtype
            expected = x.double() @ kept.T
            if dtype == BF16:
                torch.testing.assert_close(found.double(), expected, **INT8_IN_BF16)
            else:
                close(found, expected, F32 if dtype == F64 else dtype)  # lower scales give an fp32 weight


def test_a_step_too_few_or_swapped_groups_would_be_seen() -> None:
    x = rand(3, 96)
    packed, scales, kept = round_trip(rand(40, 96), 32)
    for wrong_packed, wrong_scales in ((packed, scales.flip(1)), (packed.flip(0), scales), (-packed, scales)):
        with pytest.raises(AssertionError):
            close(linear_int8(x, wrong_packed, wrong_scales, None), x.double() @ kept.T, F32)


def test_a_call_holds_one_tile_of_the_weight() -> None:
    packed, scales, _ = round_trip(rand(1024, 2048), 64)
    x = rand(2, 2048)
    with torch.profiler.profile(profile_memory=True) as seen:
        linear_int8(x, packed, scales, None)
    largest = max(abs(e.cpu_memory_usage) for e in seen.events())
    assert largest <= 2**20 + 2**16, f"{largest} bytes at once; the weight in fp32 has {1024 * 2048 * 4}"


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_dtype
def test_what_is_not_finite_has_no_int8_form(value: float, dtype: torch.dtype) -> None:
    weight = rand(6, 16, dtype=dtype)
    weight[4, 9] = value
    with pytest.raises(ValueError, match="scales_int8: row 4 of the weight has NaN or infinity"):
        ops.scales_int8(weight, 8)


def test_tensors_without_data_are_not_looked_at() -> None:
    assert ops.scales_int8(torch.empty(4, 8, device="meta"), 4).shape == (4, 2)
    with torch_private.new_fake_mode():
        assert ops.scales_int8.reference(torch.empty(4, 8), 4).shape == (4, 2)


E8, S8 = torch.empty(4, 8, dtype=torch.int8), torch.ones(4, 2)
ERRORS = [
    (lambda: ops.scales_int8(E8, 4), "scales_int8: weight is torch.int8; it must be floating"),
    (lambda: ops.scales_int8(torch.ones(4, 8), 3), "scales_int8: group 3 does not divide K 8"),
    (lambda: ops.scales_int8(torch.ones(4, 8), 0), "scales_int8: group 0 does not divide K 8"),
    (lambda: ops.scales_int8(torch.ones(8), 4), "scales_int8: weight has 1 dimensions; it must have 2"),
    (
        lambda: ops.pack_int8(torch.ones(4, 8), torch.ones(3, 2)),
        "pack_int8: rows of scales is 3; it must be 4",
    ),
    (lambda: ops.pack_int8(torch.ones(4, 8), torch.ones(4, 3)), "pack_int8: 3 groups do not divide K 8"),
    (lambda: ops.pack_int8(torch.ones(4, 8), torch.ones(4, 0)), "pack_int8: 0 groups do not divide K 8"),
    (
        lambda: ops.linear_int8(torch.ones(8), E8.float(), S8, None),
        "packed is torch.float32; it must be int8",
    ),
    (lambda: ops.linear_int8(torch.ones(7), E8, S8, None), "last size of x is 7; it must be 8"),
    (lambda: ops.linear_int8(torch.ones(()), E8, S8, None), "x has 0 dimensions; it must have at least 1"),
    (lambda: ops.linear_int8(torch.ones(8), E8, S8, torch.ones(3)), "size of bias is 3; it must be 4"),
    (lambda: ops.linear_int8(torch.ones(8), E8, S8[:3], None), "rows of scales is 3; it must be 4"),
    (
        lambda: ops.linear_int8(torch.ones(8), E8, S8.int(), None),
        "scales is torch.int32; it must be floating",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_each_guard_names_value_and_limit(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]  # a lambda
