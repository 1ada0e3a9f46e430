"""Launches written down instead of run: as Triton would specialise them, for the target that is asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.tools.tensor_descriptor import TensorDescriptor

from graphopt import torch_private
from graphopt.errors import OptionError
from graphopt.launch import configured_for, current_target, described, launch, recording
from graphopt.recorded import launches_of
from graphopt.targets import TARGETS, target_of
from tests import sample_kernels

HOPPER, AMD = TARGETS["cuda:90"], TARGETS["hip:gfx942"]
X = torch.zeros(64, 64, dtype=torch.bfloat16)


@triton.jit
def _one(x, BLOCK: tl.constexpr):
    tl.store(x, 0.0)


@triton.jit(do_not_specialize=["n"])
def _plain(x, n, BLOCK: tl.constexpr):
    tl.store(x, n)


ARGUMENTS = {
    "aligned": X,
    "not aligned": X.view(-1)[1:],
    "aligned part": X.view(-1)[8:],
    "bool tensor": X.bool(),
    "uint8 tensor": X.to(torch.uint8),
    "int64 tensor": X.long(),
    "zero": 0,
    "one": 1,
    "multiple": 48,
    "odd": 17,
    "negative": -5,
    "last i32": 2**31 - 1,
    "first i64": 2**31,
    "first i32": -(2**31),
    "true": True,
    "false": False,
    "float": 1.0,
    "none": None,
    "descriptor": TensorDescriptor.from_tensor(X, [16, 32]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_is_described_as_triton_specialises_it(name: str) -> None:
    value = ARGUMENTS[name]
    kind, mark = native_specialize_impl(CUDABackend, value, False, True, True)
    found = described(_one, (1,), (value,), {"BLOCK": 16})
    assert dict(found.signature) == {"x": kind, "BLOCK": "constexpr"}
    assert found.aligned == (("x",) if mark == "D" else ())
    compiled_in = {"x": mark} if kind == "constexpr" else {}
    assert dict(found.constants) == {**compiled_in, "BLOCK": 16}


@pytest.mark.parametrize("value", [1, 16, 17, 2**31])
def test_an_unspecialised_int_stays_one_variant(value: int) -> None:
    found = described(_plain, (1,), (X, value), {"BLOCK": 16})
    kind, _ = native_specialize_impl(CUDABackend, value, False, False, False)
    assert dict(found.signature)["n"] == kind and found.aligned == ("x",)


def test_what_no_kernel_takes_is_an_error() -> None:
    with pytest.raises(TypeError, match="a kernel takes no str"):
        described(_one, (1,), ("text",), {"BLOCK": 16})
    with pytest.raises(TypeError, match="takes x, but got 2 arguments"):
        described(_one, (1,), (X, 3), {"BLOCK": 16})


def test_launches_are_written_down_in_order_and_nothing_is_read() -> None:
    def both(x: torch.Tensor) -> torch.Tensor:
        return sample_kernels.relu(sample_kernels.product(x, x))

    first, second = launches_of(both, (torch.empty(300, 64),), HOPPER)
    assert (first.name, first.grid, first.programs) == ("_product", (3, 3), 9)
    assert second.name == "_relu" and second.grid == (44,)
    assert dict(second.signature)["n"] == "i32" and dict(second.constants)["BLOCK"] == 2048
    assert first.options == (("maxnreg", None), ("num_stages", 2), ("num_warps", 8))


def test_no_program_no_launch() -> None:
    assert launches_of(sample_kernels.product, (torch.empty(0, 64), torch.empty(8, 64)), HOPPER) == ()


def test_fakes_are_taken_as_they_are_and_need_no_memory() -> None:
    mode = torch_private.new_fake_mode()
    with mode:
        fake = torch.empty(1 << 20, 1 << 14)
    (one,) = launches_of(sample_kernels.relu, (fake,), HOPPER)
    assert dict(one.signature)["n"] == "i64" and one.grid == (1 << 23,)


def test_strides_and_offsets_reach_the_launch() -> None:
    wide = torch.empty(8, 130)
    (one,) = launches_of(sample_kernels.product, (wide.narrow(1, 65, 64), torch.empty(8, 64)), HOPPER)
    assert "a_ptr" not in one.aligned and "b_ptr" in one.aligned
    assert "a_row_stride" not in one.aligned and "b_row_stride" in one.aligned


def test_the_other_makers_options_are_left_out() -> None:
    options = {"num_warps": 4, "waves_per_eu": 2, "launch_pdl": True, "maxnreg": 64}
    found = {}
    for target in (HOPPER, AMD):
        with recording(target) as recorder:
            launch(_one, (1,), X, BLOCK=16, **options)
        found[target.name] = dict(recorder.launches[0].options)
    assert found == {
        "cuda:90": {"num_warps": 4, "launch_pdl": True, "maxnreg": 64},
        "hip:gfx942": {"num_warps": 4, "waves_per_eu": 2},
    }


def test_recording_ends_where_it_began() -> None:
    with recording(AMD):
        assert current_target(X) is AMD
        with recording(HOPPER):
            assert current_target(X) is HOPPER
        assert current_target(X) is AMD
    assert current_target(X).name == "cuda:90"
    with configured_for(AMD):
        assert current_target(X) is AMD
    with pytest.raises(ZeroDivisionError), recording(AMD):
        raise ZeroDivisionError
    assert current_target(X).name == "cuda:90"


def device_with(monkeypatch: pytest.MonkeyPatch, major: int, minor: int, shared: int) -> torch.device:
    found = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    return torch.device("cuda:7")


@pytest.mark.parametrize(
    ("capability", "shared", "target"),
    [((8, 0), 166912, "cuda:80"), ((9, 0), 232448, "cuda:90"), ((10, 3), 232448, "cuda:100")],
)
def test_the_newest_target_that_a_device_can_run_serves_it(
    capability: tuple[int, int], shared: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert target_of.__wrapped__(device_with(monkeypatch, *capability, shared)) == target
    assert target_of.__wrapped__(device_with(monkeypatch, 12, 0, 166912)) == "cuda:80"


@pytest.mark.parametrize(
    ("capability", "shared", "reason"),
    [
        ((7, 0), 98304, "has compute capability 7.0 < 8.0, the least served"),
        ((8, 9), 101376, "has 101376 bytes of shared memory < 166912, the least served"),
        ((12, 0), 101376, "has 101376 bytes of shared memory < 166912, the least served"),
    ],
)
def test_a_device_that_no_target_serves_is_an_error(
    capability: tuple[int, int], shared: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match=f"device cuda:7 {reason}"):
        target_of.__wrapped__(device_with(monkeypatch, *capability, shared))
