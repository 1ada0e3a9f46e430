"""Turn a plain PyTorch function into an operator `graphopt::<name>` whose meaning, fake and fallback it is.

Importing an op's file registers the op with torch: the one registration that importing does, safe to repeat.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar, cast, overload

import torch

from graphopt.torch_private import OpOverload, same_schema

NAMESPACE = "graphopt"

P = ParamSpec("P")
R = TypeVar("R")


class Op(Protocol[P, R]):
    """An operator as Python sees it: call it like its reference; the call goes through torch's dispatcher."""

    __name__: str
    reference: Callable[P, R]  # the plain function; call it to see the aten operators inside
    overload: OpOverload  # torch.ops.graphopt.<name>.default: the target of a graph's node

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


@overload
def op(reference: Callable[P, R]) -> Op[P, R]: ...


@overload
def op(
    *, fake: Callable[..., R] | None = None, writes: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Op[P, R]]: ...


def op(
    reference: Callable[P, R] | None = None,
    *,
    fake: Callable[..., R] | None = None,
    writes: tuple[str, ...] = (),
) -> Op[P, R] | Callable[[Callable[P, R]], Op[P, R]]:
    """def name(x: Tensor, eps: float) -> Tensor  ->  torch.ops.graphopt.name, called as name(x, eps=1e-6).

    The reference serves every device. It must return tensors that share no memory with its inputs
    (torch.library's contract; `tests/test_ops.py` checks it) and must not branch on a size or scalar that may
    be symbolic. Tracing records one node. An eager call has the gradients of its reference.

    It serves fake and meta tensors too, unless `fake` says in less what comes out (checks, shapes, dtypes,
    strides): attention with symbolic sizes is traced in 55 ms through its reference, 6 ms through its fake.
    A fake has of the reference's parameters those that it reads. `writes` names the arguments that the
    reference changes in place: only lowering makes such calls.

    Raises ValueError where the signature has no operator schema, where the name has another schema already,
    and where the fake reads what the reference has not.
    """
    if reference is None:
        return lambda function: _public(function, _by_name(function, fake) if fake else function, writes)
    return _public(reference, reference, ())


def _public(reference: Callable[P, R], fake: Callable[..., R], writes: tuple[str, ...]) -> Op[P, R]:
    """The callable that users see."""
    target = _registered(reference.__name__, reference, fake, writes)

    @functools.wraps(reference)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return target(*args, **kwargs)

    public = cast("Op[P, R]", call)
    public.reference = reference
    public.overload = target
    return public


def _by_name(reference: Callable[P, R], fake: Callable[..., R]) -> Callable[P, R]:
    """fake(x, weight)  ->  called as reference(x, weight, eps): it gets the arguments that it names."""
    signature, read = inspect.signature(reference), tuple(inspect.signature(fake).parameters)
    if unknown := [name for name in read if name not in signature.parameters]:
        known = ", ".join(signature.parameters)
        raise ValueError(f"the fake of {reference.__name__} reads {unknown[0]!r}; the op has {known}")

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return fake(*(given.arguments[name] for name in read))

    return call


def schema_of(reference: Callable[..., object], writes: tuple[str, ...] = ()) -> str:
    """The operator schema of an annotated function: `(Tensor x, Scalar eps) -> Tensor`.

    A float is declared as Scalar: torch burns a SymFloat in (adds a guard) where the schema says float, and
    keeps it where it says Scalar. An int becomes a SymInt.
    """
    schema = torch.library.infer_schema(reference, mutates_args=writes)
    return re.sub(r"\bfloat(\??) ", r"Scalar\1 ", schema)


def _registered(
    name: str, reference: Callable[..., object], fake: Callable[..., object], writes: tuple[str, ...]
) -> OpOverload:
    """The overload of that name, registered now unless an earlier import of the same file did it."""
    qualified = f"{NAMESPACE}::{name}"
    schema = schema_of(reference, writes)
    packet = getattr(getattr(torch.ops, NAMESPACE), name, None)
    if packet is None:
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        # "default" is CompositeExplicitAutograd: every device, and no decomposition while tracing.
        torch.library.impl(qualified, "default", reference)
        # Fall through, or a backward pass warns at each op that it has no autograd kernel.
        torch.library.impl(qualified, "Autograd", torch.library.fallthrough_kernel)
        torch.library.register_fake(qualified, fake)
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
    elif not same_schema(packet.default, qualified + schema):
        raise ValueError(
            f"{packet.default._schema} is registered already and {qualified}{schema} differs; "
            "give the op another name, or restart Python if you edited its signature"
        )
    return packet.default


# ----------------------------------------------------------------------------------- what references share


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which references compute: fp32 for half precision and fp32, fp64 for fp64.

    They round once, at the end, so that an op is never less exact than any spelling that it stands for.
    """
    return torch.promote_types(dtype, torch.float32)


def differ(a: int, b: int) -> bool:
    """Whether two sizes are known to differ. A symbolic size counts as fitting: a check adds no guard."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def require_floating(op_name: str, **tensors: torch.Tensor) -> None:
    """Raise ValueError unless each tensor is of a floating dtype."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{op_name}: {name} is {tensor.dtype}; it must be floating")


def require_rank(op_name: str, rank: int, **tensors: torch.Tensor) -> None:
    """Raise ValueError unless each tensor has that many dimensions."""
    for name, tensor in tensors.items():
        if tensor.dim() != rank:
            raise ValueError(f"{op_name}: {name} has {tensor.dim()} dimensions; it must have {rank}")


def require_size(op_name: str, what: str, size: int, expected: int) -> None:
    """Raise ValueError where a size is known to differ from what it must be; `what` names the dimension."""
    if differ(size, expected):
        raise ValueError(f"{op_name}: {what} is {size}; it must be {expected}")
