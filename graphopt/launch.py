"""How a launcher starts a Triton kernel: run it, or, on fake tensors, only write down what would run.

One line serves the GPU, Triton's interpreter and compiling ahead of time, so that what is compiled and
counted without a GPU is what would be launched with one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch

from graphopt.targets import CPU, TARGETS, Target, target_of

Grid: TypeAlias = "tuple[int, ...]"


class Jitted(Protocol):
    """What is asked of a `triton.jit` function: its name, its parameters, `kernel[grid](...)`."""

    __name__: str
    arg_names: Sequence[str]

    def __getitem__(self, grid: Grid) -> Callable[..., object]: ...


ALIGNED = 16  # bytes of a pointer, or a factor of an int: what lets Triton load 16 bytes at once
INTERPRETED = "cuda:90"  # whose configurations the interpreter runs; a test may ask for another
# Launch options that one maker's compiler has and the other does not know.
CUDA_ONLY = frozenset({"maxnreg", "launch_pdl", "num_ctas"})
HIP_ONLY = frozenset({"waves_per_eu", "matrix_instr_nonkdim", "kpack"})
OPTIONS = frozenset({"num_warps", "num_stages", "launch_cooperative_grid"}) | CUDA_ONLY | HIP_ONLY

# As Triton's signatures spell them.
TYPES: dict[torch.dtype, str] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "u1",
}


@dataclass(frozen=True)
class Launch:
    """One launch, described: enough to compile it, nothing that needs a GPU.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs in each direction.
        signature: argument name -> type, as Triton writes it: "*fp16", "i32", "fp32", "constexpr".
        constants: argument name -> value of those that are compiled in.
        aligned: names of the pointers and ints that are multiples of 16.
        options: num_warps, num_stages, ...
    """

    kernel: Jitted
    grid: Grid
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, object], ...]

    @property
    def name(self) -> str:
        """The jit function's name."""
        return self.kernel.__name__

    @property
    def programs(self) -> int:
        """How many programs run."""
        return math.prod(self.grid)


@dataclass
class Recorder:
    """What launchers would launch for a target while `recording` is on."""

    target: Target
    launches: list[Launch] = field(default_factory=list)


_recorder: ContextVar[Recorder | None] = ContextVar("graphopt_recorder", default=None)
_target: ContextVar[Target | None] = ContextVar("graphopt_target", default=None)


@contextlib.contextmanager
def recording(target: Target) -> Iterator[Recorder]:
    """Launchers called inside, with fake tensors, launch nothing and are written down instead."""
    recorder = Recorder(target)
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


@contextlib.contextmanager
def configured_for(target: Target) -> Iterator[None]:
    """Launchers called inside choose their configurations for this target, whatever the device."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def current_target(x: torch.Tensor) -> Target:
    """Whose configurations a launcher should choose for this tensor."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.target
    forced = _target.get()
    if forced is not None:
        return forced
    name = target_of(x.device)
    return TARGETS[INTERPRETED if name == CPU else name]


def launch(kernel: Jitted, grid: Grid, *arguments: object, **keywords: object) -> None:
    """kernel[grid](*arguments, **keywords), with Triton's own keywords for options; no program, no launch.

    Args:
        kernel: a `triton.jit` function.
        grid: up to three sizes; ints, no function.
        arguments: its parameters that are not constexpr, in order. A tensor may be None.
        keywords: its constexpr parameters, and options as num_warps. An option that the target's compiler
            does not have is left out.
    """
    if 0 in grid:
        return
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(described(kernel, grid, arguments, _known(keywords, recorder.target)))
        return
    first = next(a for a in arguments if isinstance(a, torch.Tensor))
    with torch.cuda.device_of(first):  # Triton launches on the current device, whatever its arguments' is
        kernel[grid](*arguments, **_known(keywords, current_target(first)))


def _known(keywords: dict[str, object], target: Target) -> dict[str, object]:
    """The keywords without the options of the other maker's compiler."""
    foreign = CUDA_ONLY if target.is_hip else HIP_ONLY
    return {k: v for k, v in keywords.items() if k not in foreign}


def described(kernel: Jitted, grid: Grid, arguments: Sequence[object], keywords: dict[str, object]) -> Launch:
    """The launch as Triton would specialise it at run time.

    Source: `specialize_impl` in Triton's runtime: None and an int 1 are compiled in; pointers and ints that
    are multiples of 16 are marked. Those in `do_not_specialize` are neither.
    """
    names = kernel.arg_names
    free = [n for n in names if n not in keywords]
    if len(free) != len(arguments):
        raise TypeError(f"{kernel} takes {', '.join(free)}, but got {len(arguments)} arguments")
    values = dict(zip(free, arguments, strict=True))
    unspecialised = {p.name for p in getattr(kernel, "params", ()) if p.do_not_specialize}
    signature: list[tuple[str, str]] = []
    constants: list[tuple[str, object]] = []
    aligned: list[str] = []
    for name in names:
        value = keywords[name] if name in keywords else values[name]
        plain = name in unspecialised
        kind = "constexpr" if name in keywords else "i32" if plain and value == 1 else _type_of(value)
        signature.append((name, kind))
        if kind == "constexpr":
            constants.append((name, value))
        elif not plain and _is_aligned(value):
            aligned.append(name)
    options = tuple(sorted((k, v) for k, v in keywords.items() if k in OPTIONS))
    return Launch(kernel, grid, tuple(signature), tuple(constants), tuple(aligned), options)


def _type_of(value: object) -> str:
    """The signature's word for a run-time argument."""
    if isinstance(value, bool):
        return "u1"
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    if hasattr(value, "block_shape"):  # a TensorDescriptor: TMA where the target has it
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"  # type: ignore[attr-defined]  # has it
    raise TypeError(f"a kernel takes no {type(value).__name__} ({value!r})")


def _is_aligned(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        # A fake has no address; allocations are aligned, so that its offset decides.
        return int(value.storage_offset()) * value.element_size() % ALIGNED == 0
    return isinstance(value, int) and not isinstance(value, bool) and value % ALIGNED == 0
