"""Compiling without a GPU: what is read off the binaries, the gates, and the cache of records."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from graphopt import aot, records
from graphopt.aot import Compiled, CompileError, compile_launch, faults, variant
from graphopt.launch import Launch, described
from graphopt.recorded import launches_of
from graphopt.targets import TARGETS, Target
from tests import sample_kernels

ALL = pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
HOPPER = TARGETS["cuda:90"]
FINE = Compiled("k", "cuda:90", 4, 2, 32, 0, 0, 0, 1024, 0, (), 1, 512)


def relu_launch(size: int = 4096, dtype: torch.dtype = torch.bfloat16, target: Target = HOPPER) -> Launch:
    (one,) = launches_of(sample_kernels.relu, (torch.empty(size, dtype=dtype),), target)
    return one


def product_launch(target: Target, dtype: torch.dtype = torch.bfloat16, **options: int) -> Launch:
    a, b = torch.empty(256, 512, dtype=dtype), torch.empty(384, 512, dtype=dtype)
    (one,) = launches_of(lambda a, b: sample_kernels.product(a, b, **options), (a, b), target)
    return one


# ---------------------------------------------------------------------------------------------- reading


@ALL
def test_a_pointwise_kernel_is_compiled_and_read(target: Target) -> None:
    made = compile_launch(relu_launch(target=target), target)
    assert (made.kernel, made.target, made.num_warps) == ("_relu", target.name, 4)
    assert 4 <= made.registers <= 64 and made.code > 100
    assert (made.stack, made.spills, made.local_accesses, made.shared) == (0, 0, 0, 0)
    assert made.wide_loads >= 1 and made.matrix == ()  # 2048 bf16 over 128 or 256 threads: 16 bytes each
    assert not made.has_matrix(target) and faults(made, target) == ()


@ALL
def test_unaligned_rows_load_no_16_bytes(target: Target) -> None:
    a = torch.empty(4096 + 1, dtype=torch.bfloat16)[1:]
    (launch,) = launches_of(sample_kernels.relu, (a,), target)
    assert "x_ptr" not in launch.aligned
    assert compile_launch(launch, target).wide_loads == 0


@ALL
def test_a_product_in_half_precision_uses_the_matrix_instruction(target: Target) -> None:
    made = compile_launch(product_launch(target), target)
    assert made.has_matrix(target), made.matrix
    assert made.wide_loads > 0 and 0 < made.shared <= target.shared_memory
    assert faults(made, target) == ()


def test_an_exact_product_in_fp32_does_not() -> None:
    made = compile_launch(product_launch(HOPPER, torch.float32, block=32), HOPPER)
    assert made.matrix == ()


@pytest.mark.parametrize("name", ["cuda:80", "hip:gfx942"])
def test_a_tile_too_large_for_its_registers_spills_and_is_seen(name: str) -> None:
    target = TARGETS[name]
    few = {"num_warps": 1} if target.is_hip else {"num_warps": 4, "maxnreg": 64}
    made = compile_launch(product_launch(target, block=128, **few), target)
    assert made.stack > 0 and made.local_accesses > 0
    assert any("bytes of stack > 0" in f for f in faults(made, target))


def test_each_limit_has_its_fault() -> None:
    assert faults(FINE, HOPPER) == ()
    broken = {
        "spills": "1 spilled registers > 0",
        "stack": "1 bytes of stack > 0",
        "local_accesses": "1 accesses of local memory > 0",
    }
    for field, reason in broken.items():
        assert faults(dataclasses.replace(FINE, **{field: 1}), HOPPER) == (reason,)
    assert faults(dataclasses.replace(FINE, shared=232449), HOPPER) == (
        "232449 bytes of shared memory > 232448",
    )
    assert faults(dataclasses.replace(FINE, tensor_memory=1024), HOPPER) == (
        "1024 columns of tensor memory > 512",
    )


def test_opcodes_are_read_off_both_layouts_of_sass() -> None:
    text = (
        "        /*0000*/                   LDC R1, c[0x0][0x28] ;\n"
        "        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;\n"
        "        /*0020*/         {         STL.64 [R1], R2 ;\n"
        "        /*0030*/             @!UP0 LDGSTS.E.BYPASS.LTC128B.128 [R9], [R2.64] ;\n"
        "        /*0040*/                   LDG.E.LTC128B R4, [R2.64] ;\n"
    )
    opcodes = aot.SASS_LINE.findall(text)
    assert opcodes == ["LDC", "LDG.E.128", "STL.64", "LDGSTS.E.BYPASS.LTC128B.128", "LDG.E.LTC128B"]
    wide = [o for o in opcodes if aot.WIDE_SASS.match(o)]
    assert wide == ["LDG.E.128", "LDGSTS.E.BYPASS.LTC128B.128"]
    assert [o for o in opcodes if aot.LOCAL_SASS.match(o)] == ["STL.64"]


def test_what_does_not_compile_is_an_error_that_says_with_what() -> None:
    bad = dataclasses.replace(relu_launch(), options=(("num_warps", 3),))
    with pytest.raises(CompileError, match=r"_relu does not compile for cuda:90 with {'num_warps': 3}"):
        compile_launch(bad, HOPPER)


def test_an_interpreted_function_is_refused() -> None:
    class Interpreted:
        __name__ = "_k"

    bad = dataclasses.replace(relu_launch(), kernel=Interpreted())
    with pytest.raises(CompileError, match="_k is interpreted, not compiled; unset TRITON_INTERPRET"):
        compile_launch(bad, HOPPER)


def test_launches_that_differ_in_their_grid_are_one_variant() -> None:
    assert variant(relu_launch(4096)) == variant(relu_launch(8192))
    assert variant(relu_launch(4096)) != variant(relu_launch(4097))
    assert variant(relu_launch(4096)) != variant(relu_launch(4096, torch.float16))


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_binary_is_the_one_that_a_launch_looks_for(
    target: Target, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own launch, with a driver that only says which device there is, finds it in its cache."""

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget(target.backend, target.arch, target.warp_size)

        def get_current_device(self) -> int:
            return 100 + list(TARGETS).index(target.name)  # none whose kernels are known already

        def get_current_stream(self, device: int) -> int:
            return 0

    x = torch.empty(123, 64, dtype=dtype)
    options = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
    arguments = (x, x.view(-1)[1:], x, 123, 1, 64, 64, 64, 1)
    ahead = aot._built(described(sample_kernels._product, (1, 1), arguments, options), target)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())  # to reset it would ask for a device
    then = sample_kernels._product.warmup(*arguments, grid=(1, 1), **options)
    assert then.hash == ahead.hash  # type: ignore[attr-defined]  # a CompiledKernel


# ------------------------------------------------------------------------------------------------ cache


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were compiled and not read."""
    seen: list[str] = []

    def counted(launch: Launch, target: Target) -> Compiled:
        seen.append(launch.name)
        return FINE

    monkeypatch.setattr(aot, "_compile", counted)
    return seen


def test_a_record_is_read_the_second_time(tmp_path: Path, compilations: list[str]) -> None:
    made = [compile_launch(relu_launch(n), HOPPER, tmp_path) for n in (4096, 8192)]
    assert made == [FINE, FINE] and compilations == ["_relu"]
    assert len(list(tmp_path.glob("*.json"))) == 1 and not list(tmp_path.glob("*.partial"))


def test_without_a_folder_nothing_is_kept(compilations: list[str]) -> None:
    compile_launch(relu_launch(), HOPPER)
    compile_launch(relu_launch(), HOPPER)
    assert compilations == ["_relu", "_relu"]


def test_whatever_changes_the_code_changes_the_key(tmp_path: Path, compilations: list[str]) -> None:
    launch = relu_launch()
    others = [
        (launch, HOPPER),
        (launch, TARGETS["cuda:100"]),
        (launch, dataclasses.replace(HOPPER, shared_memory=1)),
        (dataclasses.replace(launch, options=(("num_warps", 8),)), HOPPER),
        (dataclasses.replace(launch, aligned=()), HOPPER),
        (dataclasses.replace(launch, constants=(("FAULT", ""), ("BLOCK", 512))), HOPPER),
        (dataclasses.replace(launch, constants=(("FAULT", "1"), ("BLOCK", 1024))), HOPPER),
        (dataclasses.replace(launch, constants=(("FAULT", 1), ("BLOCK", 1024))), HOPPER),
        (relu_launch(dtype=torch.float16), HOPPER),
        (dataclasses.replace(launch, kernel=sample_kernels._product), HOPPER),
    ]
    for one, target in others:
        compile_launch(one, target, tmp_path)
    assert len(compilations) == len(others)


def test_another_version_of_the_compiler_or_the_format_is_another_key(
    tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_launch(relu_launch(), HOPPER, tmp_path)
    monkeypatch.setattr(aot, "_version", lambda: "9.9.9")
    compile_launch(relu_launch(), HOPPER, tmp_path)
    monkeypatch.setattr(aot, "FORMAT", aot.FORMAT + 1)
    compile_launch(relu_launch(), HOPPER, tmp_path)
    assert len(compilations) == 3


def test_a_damaged_record_is_compiled_again_and_mended(tmp_path: Path, compilations: list[str]) -> None:
    compile_launch(relu_launch(), HOPPER, tmp_path)
    (record,) = tmp_path.glob("*.json")
    whole = record.read_text()
    stored = json.loads(whole)
    fewer = {k: v for k, v in stored["fields"].items() if k != "shared"}
    without = {
        "fields": fewer,
        "sum": stored["sum"],
    }
    resummed = {**without, "sum": records.checksum(fewer)}
    damaged = [
        "",
        whole[: len(whole) // 2],
        "[]",
        "null",
        '{"fields": 3, "sum": ""}',
        whole.replace('"registers": 32', '"registers": 16'),
        json.dumps(without),
        json.dumps(resummed),
    ]
    for n, text in enumerate(damaged, start=2):
        assert text != whole
        record.write_text(text)
        assert compile_launch(relu_launch(), HOPPER, tmp_path) == FINE
        assert len(compilations) == n and record.read_text() == whole
    record.write_bytes(b"\xff\xfe\x00")
    assert compile_launch(relu_launch(), HOPPER, tmp_path) == FINE


def test_a_record_is_what_was_compiled(tmp_path: Path) -> None:
    target = TARGETS["cuda:80"]
    made = compile_launch(product_launch(target), target, tmp_path)
    assert compile_launch(product_launch(target), target, tmp_path) == made


def test_a_folder_that_cannot_be_written_costs_only_time(
    tmp_path: Path, compilations: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert compile_launch(relu_launch(), HOPPER, tmp_path / "file" / "kernels") == FINE
    assert "is not kept in" in caplog.text


def test_a_lock_that_is_held_costs_only_time(
    tmp_path: Path,
    compilations: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import filelock

    monkeypatch.setattr(records, "LOCK_SECONDS", 0.01)
    with filelock.FileLock(tmp_path / "lock"), caplog.at_level(logging.WARNING):
        assert compile_launch(relu_launch(), HOPPER, tmp_path) == FINE
    assert "is not kept in" in caplog.text and not list(tmp_path.glob("*.json"))


def test_the_default_folder_is_the_users() -> None:
    assert aot.default_cache().name == "kernels" and "graphopt" in str(aot.default_cache())
