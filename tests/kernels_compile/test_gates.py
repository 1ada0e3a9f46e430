"""Every GPU kernel compiled for every target at the shapes it must accept: no spills, and as expected."""

from __future__ import annotations

import json

import pytest
import triton

from graphopt.aot import Compiled, CompileError, faults
from graphopt.kernel import Kernel
from graphopt.targets import TARGETS
from tests.kernel_check import TRITON_KERNELS
from tests.kernels_compile import golden
from tests.kernels_compile.variants import Variant, compiled, of, variants

EACH = [pytest.param(k, t, id=f"{k.name}-{t}") for k in TRITON_KERNELS for t in TARGETS]
VERSION, KEPT = golden.stored()


@pytest.mark.parametrize(("kernel", "target"), EACH)
def test_kernel_passes_the_gates(kernel: Kernel, target: str) -> None:
    wrong: list[str] = []
    halves: dict[str, list[Compiled]] = {}
    for v in of(kernel.name, TARGETS[target]):
        made = compiled(kernel.name, TARGETS[target])[v.label]
        if isinstance(made, CompileError):
            wrong.append(f"{v.label}: {made}")
            continue
        wrong += [f"{v.label}: {fault}" for fault in faults(made, TARGETS[target])]
        if v.is_half:
            halves.setdefault(made.kernel, []).append(made)
            owed = expected(made.kernel) - ({"wide_loads"} if is_ragged(v) else set())
            wrong += [f"{v.label}: no {what}" for what in owed if not has(made, what)]
    for jit, of_it in halves.items():
        first = next(v.kernel for v in variants(TARGETS[target]) if v.launch.name == jit)
        owes = "matrix" in expected(jit) and kernel.name == first  # others may add small variants only
        if owes and not any(c.has_matrix(TARGETS[target]) for c in of_it):
            wrong.append(f"no variant of {jit} uses {TARGETS[target].matrix}")
    assert not wrong, f"{kernel.name} on {target}:\n" + "\n".join(wrong)


def expected(jit: str) -> set[str]:
    """What kernels expect of a jit function's code."""
    return {what for k in TRITON_KERNELS for name, what in k.expects if name == jit}


def is_ragged(variant: Variant) -> bool:
    """Whether rows begin anywhere: their length, K or N, is no multiple of 16."""
    lengths = {name for name, _ in variant.launch.signature if name in ("K", "N")}
    return not lengths <= set(variant.launch.aligned)


def has(made: Compiled, what: str) -> bool:
    """Whether a kernel in half precision has what is expected of it.

    A product of few rows may use an older instruction: wgmma takes 64 rows and more, tcgen05 128.
    """
    return bool(made.matrix) if what == "matrix" else made.wide_loads > 0


@pytest.mark.parametrize(("kernel", "target"), EACH)
def test_registers_and_shared_memory_are_the_kept_ones(kernel: Kernel, target: str) -> None:
    if triton.__version__ != VERSION:  # other compilers allocate otherwise; the gates hold for all
        return
    kept = KEPT.get(kernel.name, {}).get(target, {})
    found = golden.measured(kernel.name, target)
    changed = [
        f"{label}: registers, shared memory {kept.get(label, 'none')} -> {found.get(label, 'none')}"
        for label in {**kept, **found}
        if kept.get(label) != found.get(label)
    ]
    assert not changed, f"{kernel.name} on {target}; {golden.AGAIN}\n" + "\n".join(changed)


def test_only_rows_of_odd_length_are_ragged() -> None:
    seen = [
        (v.label, is_ragged(v)) for v in variants(TARGETS["cuda:90"]) if v.kernel == "fused_linear_triton"
    ]
    assert {label.partition(",")[0] for label, ragged in seen if ragged} == {"ragged"}


def test_no_number_is_kept_of_a_kernel_that_is_gone() -> None:
    assert set(KEPT) <= {k.name for k in TRITON_KERNELS}, golden.AGAIN


def test_the_file_is_as_it_was_written() -> None:
    if triton.__version__ == VERSION:
        assert golden.FILE.read_text() == golden.text(KEPT), golden.AGAIN


def test_numbers_are_read_as_they_were_written() -> None:
    numbers = {"a": {"cuda:80": {"one": [32, 0], 't"wo': [255, 65536]}, "cuda:90": {}}, "b": {}}
    assert json.loads(golden.text(numbers)) == {"triton": triton.__version__, "kernels": numbers}
