"""Every GPU kernel compiled for every target at the shapes it must accept: no spills, and as expected."""

from __future__ import annotations

import pytest
import triton

from graphopt.aot import Compiled, CompileError, faults
from graphopt.targets import TARGETS
from tests.kernel_check import TRITON_KERNELS
from tests.kernels_compile import golden
from tests.kernels_compile.variants import compiled, jit_names, of

EACH = [pytest.param(name, t, id=f"{name}-{t}") for name in jit_names() for t in TARGETS]


@pytest.mark.parametrize(("name", "target"), EACH)
def test_kernel_passes_the_gates(name: str, target: str) -> None:
    wrong: list[str] = []
    expected = {what for k in TRITON_KERNELS for jit, what in k.expects if jit == name}
    halves: list[Compiled] = []
    for v in of(name, TARGETS[target]):
        made = compiled(name, TARGETS[target])[v.label]
        if isinstance(made, CompileError):
            wrong.append(f"{v.label}: {made}")
            continue
        wrong += [f"{v.label}: {fault}" for fault in faults(made, TARGETS[target])]
        if v.is_half:
            halves.append(made)
            wrong += [f"{v.label}: no {what}" for what in expected if not has(made, what)]
    if "matrix" in expected and not any(c.has_matrix(TARGETS[target]) for c in halves):
        wrong.append(f"no variant uses {TARGETS[target].matrix}")
    assert not wrong, f"{name} on {target}:\n" + "\n".join(wrong)


def has(made: Compiled, what: str) -> bool:
    """Whether a kernel in half precision has what is expected of it.

    A product of few rows may use an older instruction: wgmma takes 64 rows and more, tcgen05 128.
    """
    return bool(made.matrix) if what == "matrix" else made.wide_loads > 0


@pytest.mark.parametrize(("name", "target"), EACH)
def test_registers_and_shared_memory_are_the_kept_ones(name: str, target: str) -> None:
    version, kernels = golden.stored()
    if version != triton.__version__:  # other compilers allocate otherwise; the gates hold for all
        return
    kept = kernels.get(name, {}).get(target, {})
    found = golden.measured(name, target)
    changed = [
        f"{label}: registers, shared memory {kept.get(label, 'none')} -> {found.get(label, 'none')}"
        for label in {**kept, **found}
        if kept.get(label) != found.get(label)
    ]
    assert not changed, f"{name} on {target}; {golden.AGAIN}\n" + "\n".join(changed)


def test_no_number_is_kept_of_a_kernel_that_is_gone() -> None:
    assert set(golden.stored()[1]) <= set(jit_names()), golden.AGAIN


def test_the_file_reads_as_it_was_written() -> None:
    version, kernels = golden.stored()
    if version == triton.__version__:
        assert golden.FILE.read_text() == golden.text(kernels)
