"""Make autocast's casts explicit: what autocast casts below the tracer becomes `to` nodes, and its regions
mean nothing any more.

Torch's policy is not copied. Each call that may be cast is run on fakes under autocast, and then without it
for each hypothesis of what was cast; the one under which the very same operators run on the very same values
is the right one. Where there is none, the program is refused.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.errors import CaptureRefused

DEVICE = "cpu"  # the one device type whose autocast is understood
ENTER, EXIT = "_enter_autocast", "_exit_autocast"

# Operators whose kernels call matrix products, found by comparing PyTorch's own samples of every operator;
# and those that compute by themselves in spite of such a name.
_MADE_OF_OTHERS = re.compile("_|linalg_|affine_grid_generator")
_PLAIN = frozenset({"_unsafe_view", "_reshape_alias", "linalg_vector_norm", "linalg_cross"})
_INSTEAD = "convert the model with model.to(dtype) instead"


def ambient() -> torch.dtype | None:
    """The dtype that autocast around the current call lowers to; None where it is off."""
    return torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else None


def refuse_other_ambient(kinds: set[str]) -> None:
    """Refuse autocast around the call on a device type whose autocast is not understood."""
    for kind in kinds - {DEVICE, "meta"}:
        if torch.is_autocast_enabled(kind):
            raise CaptureRefused(
                f"autocast to {torch.get_autocast_dtype(kind)} on {kind} is on around the call; {_INSTEAD}"
            )


def region(
    device: str, dtype: torch.dtype | None = None, enabled: bool = True, cache: bool | None = None
) -> torch.autocast:
    """The region that a recorded graph enters, without a cache: fakes would stay in it."""
    del cache
    if enabled and device != DEVICE:
        raise CaptureRefused(f"a region runs under autocast({device!r}, {dtype}); {_INSTEAD}")
    return torch.autocast(device, dtype, enabled=enabled, cache_enabled=False)


@contextlib.contextmanager
def within(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to a dtype, without a cache; off for None."""
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None, cache_enabled=False):
        yield


def outside(run: Callable[..., object]) -> Callable[..., object]:
    """A program whose casts are explicit, for calls under autocast: nothing is cast twice."""

    def run_without_autocast(*args: object) -> object:
        with within(None):
            return run(*args)

    return run_without_autocast


def make_explicit(gm: fx.GraphModule, around: torch.dtype | None, mode: torch_private.FakeTensorMode) -> None:
    """linear(x, w) under autocast to bf16 -> linear(to(x, bf16), to(w, bf16)).

    Args:
        gm: recorded with autocast really on, so that its abstract values are those under it.
        around: what `ambient()` was.

    Raises:
        CaptureRefused: what autocast does to a call cannot be said by casts of its arguments.
    """
    active = [around]
    for node in list(gm.graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == ENTER:
            device, dtype, enabled = node.args[:3]  # as torch.autocast says them: no default is left
            region(device, dtype, enabled)
            active.append(active[-1] if device != DEVICE else dtype if enabled else None)
        elif name == EXIT:
            active.pop()
        elif active[-1] is not None and isinstance(node.target, torch_private.OpOverload):
            _cast_arguments(gm, node, active[-1], mode)


def _cast_arguments(
    gm: fx.GraphModule, node: fx.Node, lower: torch.dtype, mode: torch_private.FakeTensorMode
) -> None:
    """Put the casts before one call."""
    operator = node.target
    assert isinstance(operator, torch_private.OpOverload)
    values = {n: _value(gm, n, mode) for n in node.all_input_nodes}
    dtypes = {n: v.dtype for n, v in values.items() if isinstance(v, torch.Tensor) and _is_eligible(v)}
    lists = [v for v in values.values() if isinstance(v, (list, tuple))]
    if (not dtypes and not lists) or _is_left_alone(operator):
        return
    log = torch_private.OperatorLog()

    def run(target: torch.dtype | None, autocast: torch.dtype | None) -> object:
        def call(*given: object) -> object:
            named = dict(zip(values, given, strict=True))
            if target is not None:
                named.update((n, named[n].to(target)) for n in dtypes)  # type: ignore[attr-defined]  # a tensor
            args, kwargs = fx.map_arg((node.args, node.kwargs), named.__getitem__)  # type: ignore[arg-type]  # values
            return operator(*args, **kwargs)

        # On fresh fakes: the operator may write, and one made under inference mode hides what it is made of.
        with torch.inference_mode(False), torch_private.no_dispatch_of(mode), torch.no_grad():
            given = [torch_private.tree_map(_blank, v) for v in values.values()]
            with within(autocast):
                return log.of(call, given)

    expected = run(None, lower)
    listed = torch_private.has_kernel(operator, "AutocastCPU")
    if not listed:  # below its kernel, autocast is off
        for op in log.ran:
            _check_kernel(op)
    widest = functools.reduce(torch.promote_types, dtypes.values(), torch.bool)
    mixed = len(set(dtypes.values())) > 1  # the likely one first: torch logs calls that fail on fakes
    likely = (lower, None) if listed or mixed else (None, lower)
    hypotheses = (*likely, torch.float32, widest) if not g.is_mutable(operator) else (None,)
    for target in dict.fromkeys(hypotheses):
        try:
            found = run(target, None)
        except RuntimeError:  # dtypes that do not go together
            continue
        if found == expected:
            _insert(node, [n for n, dtype in dtypes.items() if target not in (None, dtype)], target, mode)
            return
    raise CaptureRefused(f"autocast to {lower} casts inside {operator}, where no argument is; {_INSTEAD}")


def _insert(
    node: fx.Node, taken: Sequence[fx.Node], dtype: torch.dtype | None, mode: torch_private.FakeTensorMode
) -> None:
    """f(x) -> f(to(x, dtype)), with the provenance of the call."""
    assert isinstance(node.graph.owning_module, fx.GraphModule)
    for argument in taken:
        value = _value(node.graph.owning_module, argument, mode)
        with node.graph.inserting_before(node):
            cast = node.graph.call_function(torch.ops.aten.to.dtype, (argument, dtype))
        cast.meta.update(node.meta)
        with torch_private.no_dispatch_of(mode), torch.no_grad(), within(None):
            g.set_val(cast, value.to(dtype))  # type: ignore[attr-defined]  # a tensor
        node.replace_input_with(argument, cast)


def _value(gm: fx.GraphModule, node: fx.Node, mode: torch_private.FakeTensorMode) -> object:
    """A node's abstract value; that of a constant as a fake."""
    if node.op != "get_attr" or g.val(node) is not None:
        return g.val(node)
    return torch_private.faked([getattr(gm, str(node.target))], mode)[0]


def _is_eligible(value: torch.Tensor) -> bool:
    """Whether autocast may cast a tensor; it leaves fp64 alone."""
    return value.is_floating_point() and value.dtype != torch.float64 and value.device.type == DEVICE


def _is_left_alone(op: torch_private.OpOverload) -> bool:
    """Whether autocast does nothing to a call: torch has no cast for the operator, and it is not made of
    others.

    Raises:
        CaptureRefused: the operator's kernel is not known to be free of casts.
    """
    if any(torch_private.has_kernel(op, key) for key in ("AutocastCPU", "CompositeImplicitAutograd")):
        return False
    _check_kernel(op)
    return True


def _check_kernel(op: torch_private.OpOverload) -> None:
    """Refuse an operator whose kernel calls others, or may: autocast reaches into it, and no log shows it."""
    plain = torch.Tag.core in op.tags or op.overloadpacket.__name__ in _PLAIN
    if op.namespace != "aten" or (_MADE_OF_OTHERS.match(op.overloadpacket.__name__) and not plain):
        raise CaptureRefused(f"autocast may cast inside the kernel of {op}; {_INSTEAD}")


def _blank(value: object) -> object:
    """A fake like another one, for an operator in place to write to."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
