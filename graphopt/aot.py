"""Compile recorded launches ahead of time, without a GPU, and read what the compilers made of them.

The one file that knows Triton's compiler and its tools. Supported: triton >= 3.6.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt import records
from graphopt.errors import GraphoptError
from graphopt.launch import ALIGNED, Launch
from graphopt.targets import Target

FORMAT = 1  # of a record on disk; raise it when `Compiled` or how it is read off changes
MESSAGE = 600  # characters of a compiler's message that an error keeps
TENSOR_MEMORY = 512  # columns a multiprocessor of sm_100 has (PTX ISA, tcgen05.alloc)

# What the assemblies call a product of matrices; the first of a target's own is in `Target.matrix`.
MATRIX = re.compile(r"\b(wgmma|tcgen05|mma\.sync|v_mfma)")
# 16 bytes or more a thread, from global memory: plain, asynchronous into shared memory, and by TMA.
WIDE_SASS = re.compile(r"(LDG|LDGSTS)(\.\w+)*\.(128|256)(\.|$)|UTMALDG|UBLKCP")
WIDE_AMD = re.compile(r"(global|buffer|flat)_load_(dwordx4|b128)")
LOCAL_SASS = re.compile(r"(LDL|STL)(\.|$)")
LOCAL_AMD = re.compile(r"scratch_(load|store)")
# A line of nvdisasm: address, perhaps a predicate, opcode. PTX and amdgcn: an opcode after a tab.
SASS_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
ASSEMBLY_LINE = re.compile(r"^\s+(?:@!?%\w+\s+)?([a-z][\w.:]*)", re.MULTILINE)


class CompileError(GraphoptError):
    """A launch that a target's compiler does not take; the message names kernel, target and its options."""


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one target, in numbers.

    Attributes:
        kernel, target: their names.
        num_warps, num_stages: what it was compiled with.
        registers: a thread's; on AMD the vector registers, accumulators included.
        stack: bytes of local memory a thread has, spilled registers included.
        spills: vector registers that AMD's compiler says it spilled; NVIDIA's are seen in `stack`.
        local_accesses: instructions that read or write local memory.
        shared: bytes of shared memory a program holds.
        tensor_memory: columns of sm_100's tensor memory a program holds.
        matrix: the matrix instructions in it: "mma.sync", "wgmma", "tcgen05", "v_mfma".
        wide_loads: instructions that load 16 bytes or more a thread from global memory.
        code: bytes of machine code.
    """

    kernel: str
    target: str
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    spills: int
    local_accesses: int
    shared: int
    tensor_memory: int
    matrix: tuple[str, ...]
    wide_loads: int
    code: int

    def has_matrix(self, target: Target) -> bool:
        """Whether products of matrices became the target's own instruction."""
        return target.matrix in self.matrix


def faults(compiled: Compiled, target: Target) -> tuple[str, ...]:
    """Why a compiled kernel would be slow or could not start: spills, local memory, too much shared."""
    limits = (
        ("spilled registers", compiled.spills, 0),
        ("bytes of stack", compiled.stack, 0),
        ("accesses of local memory", compiled.local_accesses, 0),
        ("bytes of shared memory", compiled.shared, target.shared_memory),
        ("columns of tensor memory", compiled.tensor_memory, TENSOR_MEMORY),
    )
    return tuple(f"{found} {what} > {most}" for what, found, most in limits if found > most)


def variant(launch: Launch) -> tuple[object, ...]:
    """What makes two launches one compiled kernel: all but their grid."""
    return (launch.kernel, launch.signature, launch.constants, launch.aligned, launch.options)


def compile_launch(launch: Launch, target: Target, cache: Path | None = None) -> Compiled:
    """Compile what a launch would run on a target, or read its record in the folder `cache`.

    Raises CompileError for what the compiler does not take, and where Triton interprets.
    """
    record = cache / f"{_key(launch, target)}.json" if cache is not None else None
    known = _read(record) if record is not None else None
    if known is not None:
        return known
    compiled = _compile(launch, target)
    if record is not None:
        records.write(record, dataclasses.asdict(compiled))
    return compiled


def default_cache() -> Path:
    """The folder for records of this user. Needs platformdirs; writing them needs filelock."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("graphopt")) / "kernels"


# -------------------------------------------------------------------------------------------- compiling


def build(launch: Launch, target: Target) -> None:
    """Compile into Triton's own cache of binaries, where the launch itself finds it later.

    Raises what `compile_launch` raises.
    """
    _built(launch, target)


def _compile(launch: Launch, target: Target) -> Compiled:
    """Compiled, and read."""
    read = _read_amd if target.is_hip else _read_nvidia
    return read(launch.name, target, _built(launch, target))


def _built(launch: Launch, target: Target) -> object:
    """Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(launch.kernel, "cache_key"):
        raise CompileError(
            f"{launch.name} is interpreted, not compiled; unset TRITON_INTERPRET before Triton is imported"
        )
    source = ASTSource(
        launch.kernel, dict(launch.signature), dict(launch.constants), _attributes(launch, target)
    )
    try:
        return triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=dict(launch.options),
        )
    except Exception as error:  # the compiler has no base class of its errors; many are plain RuntimeErrors
        what = f"{launch.name} does not compile for {target.name} with {dict(launch.options)}"
        raise CompileError(f"{what}: {type(error).__name__}: {_short(str(error))}") from error


def _short(message: str) -> str:
    """The start of a compiler's message; some end with all of the code."""
    return message if len(message) <= MESSAGE else f"{message[:MESSAGE]}..."


def _attributes(launch: Launch, target: Target) -> dict[tuple[int, ...], list[list[object]]]:
    """Per argument what Triton may assume of it at run time.

    Spelled as Triton's own launch spells it, nothing included, since its cache goes by the spelling. AMD's
    backend also marks pointers into less than 2 GB (`tt.pointer_range`), and loads those by buffer
    instructions. A record has no sizes: every pointer is taken for such a one.
    """
    constants = dict(launch.constants)
    all_marked = tuple(int(n) for n in _version().split(".")[:2]) >= (3, 7)
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for i, (name, kind) in enumerate(launch.signature):
        marks: list[list[object]] = []
        if name in launch.aligned:
            marks.append(["tt.divisibility", ALIGNED])
        if target.is_hip and kind.startswith("*"):
            marks.append(["tt.pointer_range", 32])
        if kind == "constexpr":
            marked = all_marked or isinstance(constants[name], str)
        else:
            marked = kind not in ("fp32", "u1") and not kind.startswith("tensordesc")
        if marked:
            attributes[(i,)] = marks
    return attributes


def _common(name: str, target: Target, made: object) -> dict[str, object]:
    """What Triton itself says of a compiled kernel."""
    metadata = made.metadata  # type: ignore[attr-defined]  # a CompiledKernel
    return {
        "kernel": name,
        "target": target.name,
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
        "shared": metadata.shared,
        "tensor_memory": getattr(metadata, "tmem_size", None) or 0,
    }


def _read_nvidia(name: str, target: Target, made: object) -> Compiled:
    """Registers and memory as cuobjdump tells them, instructions as nvdisasm does."""
    assembly: Mapping[str, str | bytes] = made.asm  # type: ignore[attr-defined]  # a CompiledKernel
    usage = dict(re.findall(r"([A-Z]+):(\d+)", _tool("cuobjdump", "-res-usage", binary=assembly["cubin"])))
    opcodes = _sass(assembly["cubin"])
    return Compiled(
        **_common(name, target, made),  # type: ignore[arg-type]  # as `_common` says
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]) + int(usage["LOCAL"]),
        spills=0,
        local_accesses=_count(LOCAL_SASS, opcodes),
        matrix=_matrix(assembly["ptx"]),
        wide_loads=_count(WIDE_SASS, opcodes),
        code=16 * sum(opcodes.values()),  # every instruction since Volta
    )


def _read_amd(name: str, target: Target, made: object) -> Compiled:
    """The metadata and instructions in the assembler's text."""
    text = made.asm["amdgcn"]  # type: ignore[attr-defined]  # a CompiledKernel
    opcodes = Counter(ASSEMBLY_LINE.findall(text))

    def field(word: str) -> int:
        return max(int(n) for n in re.findall(rf"{word}[:=]?\s+(?:= )?(\d+)", text))

    return Compiled(
        **_common(name, target, made),  # type: ignore[arg-type]  # as `_common` says
        registers=field(r"\.vgpr_count"),  # the unified file: accumulators are counted in it
        stack=field(r"\.private_segment_fixed_size"),
        spills=field(r"\.vgpr_spill_count"),
        local_accesses=_count(LOCAL_AMD, opcodes),
        matrix=_matrix(text),
        wide_loads=_count(WIDE_AMD, opcodes),
        code=field("codeLenInByte"),
    )


def _matrix(text: str | bytes) -> tuple[str, ...]:
    """The matrix instructions in a text of PTX or amdgcn."""
    assert isinstance(text, str)
    return tuple(sorted({m for op in set(ASSEMBLY_LINE.findall(text)) for m in MATRIX.findall(op)}))


def _count(pattern: re.Pattern[str], opcodes: Mapping[str, int]) -> int:
    """How many of the instructions are what the pattern says."""
    return sum(n for opcode, n in opcodes.items() if pattern.match(opcode))


def _sass(cubin: str | bytes) -> Counter[str]:
    """Opcode -> how often, of a binary for NVIDIA."""
    # Data flow is only for comments; without it 0.13 s instead of 0.2.
    opcodes = Counter(SASS_LINE.findall(_tool("nvdisasm", "-ndf", "-c", binary=cubin)))
    if not opcodes:
        raise CompileError("nvdisasm printed no instruction; its format is another one, see SASS_LINE")
    return opcodes


def _tool(name: str, *options: str, binary: str | bytes) -> str:
    """What one of the binary tools in Triton's wheel prints of a cubin."""
    from triton import knobs

    assert isinstance(binary, bytes)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, *options, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(
            f"{name} failed with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


# ------------------------------------------------------------------------------------------ the cache


def _key(launch: Launch, target: Target) -> str:
    """A name for all that the record depends on."""
    parts = (
        FORMAT,
        _version(),
        _environment(),
        getattr(launch.kernel, "cache_key", launch.name),
        launch.signature,
        [
            (name, type(value).__name__, getattr(value, "cache_key", str(value)))
            for name, value in launch.constants
        ],
        launch.aligned,
        launch.options,
        dataclasses.astuple(target),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def _version() -> str:
    import triton

    return str(triton.__version__)


def _environment() -> tuple[tuple[str, str], ...]:
    """The settings of this process that change what Triton's compiler makes."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return tuple(sorted(get_cache_invalidating_env_vars().items()))


def _read(record: Path) -> Compiled | None:
    """A record that is whole and of this form."""
    fields: dict[str, Any] = records.read(record) or {}
    try:
        return Compiled(**{**fields, "matrix": tuple(fields["matrix"])})
    except (TypeError, KeyError):
        return None
