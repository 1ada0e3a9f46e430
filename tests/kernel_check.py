"""Run a GPU kernel between canaries and hold it against its op's reference: on a GPU, or interpreted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from graphopt import ops
from graphopt.accuracy import judge
from graphopt.defaults import KERNELS
from graphopt.graph import set_val
from graphopt.kernel import GPU, Case, Kernel
from tests.graphs import Builder

GPU_KERNELS = tuple(k for k in KERNELS if k.target == GPU)
TRITON_KERNELS = tuple(k for k in GPU_KERNELS if k.name.endswith("_triton"))  # the others call libraries

MARGIN = 4096  # elements before and behind each buffer: two of the largest blocks that kernels store
INTEGER_CANARY = 97  # no NaN among integers: a number that no case holds as a position or a code
FACTORIES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
FILLED = ("zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "ones", "ones_like")


def op_of(kernel: Kernel) -> ops.Op:
    """The op that a kernel implements."""
    found = getattr(ops, kernel.op)
    assert isinstance(found.overload, torch._ops.OpOverload)
    return found


# ---------------------------------------------------------------------------------------------- canaries


@dataclass(frozen=True)
class Guarded:
    """A tensor in the middle of a buffer of canaries.

    Attributes:
        tensor: the view that a kernel is given.
        buffer: all of it, one-dimensional.
        before: the buffer's bytes when it was made.
        outside: which elements of the buffer are none of the tensor's.
    """

    tensor: torch.Tensor
    buffer: torch.Tensor
    before: torch.Tensor
    outside: torch.Tensor

    def is_whole(self) -> bool:
        """Whether no canary changed."""
        return not self._changed()[self.outside].any()

    def is_unchanged(self) -> bool:
        """Whether nothing changed, the tensor included."""
        return not self._changed().any()

    def _changed(self) -> torch.Tensor:
        differs = bits(self.buffer) != self.before
        return differs.reshape(self.buffer.numel(), -1).any(-1)


def bits(buffer: torch.Tensor) -> torch.Tensor:
    """The bytes of a one-dimensional tensor: NaNs of one pattern are equal there."""
    return buffer.view(torch.uint8)


def canary(dtype: torch.dtype) -> float | int | bool:
    """What stands outside of tensors of a dtype."""
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype is torch.bool else INTEGER_CANARY


def guarded(tensor: torch.Tensor, keep: bool = True) -> Guarded:
    """A tensor's values, with its strides and alignment, between canaries; without `keep`, canaries too."""
    steps = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    span = sum(steps) + 1 if tensor.numel() else 0
    start = MARGIN + tensor.storage_offset()
    buffer = torch.full(
        (start + span + MARGIN,), canary(tensor.dtype), dtype=tensor.dtype, device=tensor.device
    )
    view = buffer.as_strided(tensor.shape, tensor.stride(), start)
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside.as_strided(tensor.shape, tensor.stride(), start).fill_(False)
    if keep:
        copy_once(view, tensor)
    return Guarded(view, buffer, bits(buffer).clone(), outside)


def copy_once(into: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values, also into a tensor that is expanded: what repeats is written once."""
    once = tuple(slice(0, 1) if s == 0 else slice(None) for s in into.stride())
    into[once].copy_(values[once])


@dataclass
class Allocations(TorchFunctionMode):
    """Whatever a launcher allocates stands between canaries; what it does not fill is NaN."""

    made: list[Guarded] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name not in (*FACTORIES, *FILLED) or not isinstance(result, torch.Tensor) or not result.numel():
            return result
        with torch._C.DisableTorchFunctionSubclass():
            self.made.append(guarded(result, keep=name in FILLED))
        return self.made[-1].tensor


# ----------------------------------------------------------------------------------------------- running


def tensors(value: object) -> Iterator[torch.Tensor]:
    """The tensors of a result."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)


def moved(value: object, change: Callable[[torch.Tensor], torch.Tensor]) -> object:
    """A result with its tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return tuple(moved(v, change) for v in value) if isinstance(value, tuple | list) else value


def own(tensor: torch.Tensor, at: str = "cpu") -> torch.Tensor:
    """A copy on a device."""
    return tensor.detach().to(at, copy=True)


def raised(tensor: torch.Tensor, at: str = "cpu") -> torch.Tensor:
    """A copy on a device, in fp64 if floating."""
    return own(tensor, at).double() if tensor.is_floating_point() else own(tensor, at)


def written(op: ops.Op) -> tuple[int, ...]:
    """The positions of the arguments that an op changes in place."""
    arguments = op.overload._schema.arguments
    return tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def outcome(
    run: Callable[..., object], arguments: Sequence[object], places: Sequence[int]
) -> tuple[object, ...]:
    """What a call returns and what it wrote."""
    result = run(*arguments)
    return result, *(arguments[i] for i in places if i < len(arguments))


def check(
    launcher: Callable[..., object],
    op: ops.Op,
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    reference: str = "cpu",
) -> None:
    """Assert that a launcher computes what its op's reference does, reads and writes nothing else.

    The launcher runs on `device`, the reference on `reference`: large cases need a GPU for both.
    """
    made = case.make(dtype, device)
    places = written(op)
    oracle = outcome(op.reference, [moved(a, lambda t: raised(t, reference)) for a in made], places)
    eager = outcome(op.reference, [moved(a, lambda t: own(t, reference)) for a in made], places)
    inputs = [guarded(a) if isinstance(a, torch.Tensor) else None for a in made]
    given = [a if g is None else g.tensor for a, g in zip(made, inputs, strict=True)]
    with Allocations() as allocations:
        found = outcome(launcher, given, places)
    if device != "cpu":
        torch.cuda.synchronize()
    for i, g in enumerate(inputs):
        assert g is None or g.is_whole(), f"{case.name}: wrote outside of argument {i}"
        assert g is None or i in places or g.is_unchanged(), f"{case.name}: changed argument {i}"
    for i, g in enumerate(allocations.made):
        assert g.is_whole(), f"{case.name}: wrote outside of allocation {i}, {tuple(g.tensor.shape)}"
    read = {g.buffer.untyped_storage().data_ptr() for g in inputs if g is not None}
    for result in tensors(found[0]):
        assert result.device.type == torch.device(device).type, f"{case.name}: a result is on {result.device}"
        assert not result.numel() or result.untyped_storage().data_ptr() not in read, "a result is an input"
    verdict = judge(oracle, eager, moved(found, lambda t: own(t, reference)), dtype)
    assert verdict.ok, f"{case.name}: {verdict.reason}"


# ------------------------------------------------------------------------------------------------- nodes


def fake_node(kernel: Kernel, case: Case, dtype: torch.dtype) -> tuple[fx.Node, tuple[object, ...]]:
    """A node that calls a kernel's op on a case, and its arguments: fakes, whatever their size."""
    build = Builder()
    with build.mode:
        arguments = case.make(dtype)
    nodes: list[object] = []
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            node = build.graph.placeholder(f"arg{i}")
            set_val(node, argument)
            nodes.append(node)
        else:
            nodes.append(argument)
    return build.call(op_of(kernel).overload, *nodes), arguments


def refusal(kernel: Kernel, case: Case, dtype: torch.dtype) -> str | None:
    """Why a kernel does not run a case."""
    return kernel.refuses(fake_node(kernel, case, dtype)[0])
