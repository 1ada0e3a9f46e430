"""Registers and shared memory of compiled kernels: `python -m tests.kernels_compile.golden` writes them.

The file is kept so that a change of a kernel shows what it costs on hardware that is not at hand.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import TypeAlias

import triton

from graphopt.aot import Compiled
from graphopt.targets import TARGETS
from tests.kernel_check import TRITON_KERNELS
from tests.kernels_compile.variants import compiled

FILE = Path(__file__).with_name("golden.json")
AGAIN = "if that is meant: python -m tests.kernels_compile.golden"

# label of a variant -> [registers, bytes of shared memory]
Numbers: TypeAlias = "dict[str, list[int]]"


def measured(kernel: str, target: str) -> Numbers:
    """The numbers of one kernel on one target, compiled now; nothing of what does not compile."""
    made = compiled(kernel, TARGETS[target])
    return {label: [c.registers, c.shared] for label, c in made.items() if isinstance(c, Compiled)}


def stored() -> tuple[str, dict[str, dict[str, Numbers]]]:
    """The version of Triton that the kept numbers are of, and kernel -> target -> numbers."""
    kept = json.loads(FILE.read_text())
    return kept["triton"], kept["kernels"]


def text(kernels: dict[str, dict[str, Numbers]]) -> str:
    """The file: a line for each variant."""
    blocks = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(target)}: {{\n{_lines(n)}\n  }}" for target, n in targets.items())
        + "\n }"
        for name, targets in kernels.items()
    ]
    version = json.dumps(triton.__version__)
    return f'{{"triton": {version}, "kernels": {{\n' + ",\n".join(blocks) + "\n}}\n"


def _lines(numbers: Numbers) -> str:
    return ",\n".join(f"   {json.dumps(label)}: {json.dumps(pair)}" for label, pair in numbers.items())


def main() -> None:
    """Compile everything on all cores and write the file."""
    names = [k.name for k in TRITON_KERNELS]
    pairs = [(name, target) for name in names for target in TARGETS]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        numbers = dict(zip(pairs, pool.starmap(measured, pairs, chunksize=1), strict=True))
    FILE.write_text(text({name: {target: numbers[name, target] for target in TARGETS} for name in names}))


if __name__ == "__main__":
    main()
