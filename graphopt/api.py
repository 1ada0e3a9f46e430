"""What users call besides `torch.compile`: optimize, enable, disable, refresh."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, TypeVar

import torch

from graphopt import backend, torch_private
from graphopt.defaults import pipeline
from graphopt.errors import WeightError
from graphopt.options import Options
from graphopt.ownership import Owned, alone, is_stand_in, keep

M = TypeVar("M", bound=torch.nn.Module)

# Torch's own 8 are few for `generate` (batch sizes, beams, kinds of caches), and what was released cannot run
# eagerly then.
RECOMPILE_LIMIT = 64


class Enabled(contextlib.AbstractContextManager["Enabled"]):
    """What `enable` returns: leaving it as a context manager takes that `enable` back, and those after it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._stance = torch.compiler.set_stance("default", force_backend=backend.Forced(options))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self in _enabled:
            disable()

    def _take_back(self) -> None:
        self._stance.__exit__(None, None, None)  # restores what was forced before

    def __repr__(self) -> str:
        return f"Enabled({self.options})"


_enabled: list[Enabled] = []  # innermost last; process-wide, as torch's own stance is


def enable(**options: object) -> Enabled:
    """Send every `torch.compile` in this process to graphopt: a library's, HF `generate`, `generate_batch`.

    `with graphopt.enable(merge=False): ...` limits it to a block; enabling twice nests. All threads are
    included. These options stand in for those of a `torch.compile(..., options=...)`: torch forwards none.

    Raises:
        OptionError: an unknown option or value; nothing is changed then.
    """
    enabled = Enabled(Options.parse(options))
    _enabled.append(enabled)
    return enabled


def disable() -> None:
    """Take the innermost `enable` back; does nothing if there is none."""
    if _enabled:
        _enabled.pop()._take_back()


def optimize(model: M, *, release: bool = True, **options: object) -> M:
    """Compile a model in place, own its weights, and return it: same interface, `generate()` works.

    Its graphs (prefill, decode, a new length) share their prepared weights, and as each is prepared at the
    first call, the originals are released: one layout a weight is in memory. A parameter whose values stand
    in a prepared form as they are (merged Q, K, V) becomes a view of it and may be read and written as ever;
    one that is packed or sliced keeps its shape and dtype and reads as NaN. What would need its values then
    (gradients, a graph that is refused, `state_dict`, a copy) is a `WeightError`; `load_state_dict` and a new
    parameter bring values back; `graphopt.save` keeps what there is. Gradients of parameters are switched
    off. Weights that share their memory with others, and parameters that are assigned later, stay as they
    are: somebody else may hold them. Again with the same options, it takes such new parameters too, and does
    nothing else. An encoder, which `generate` calls past its model, is compiled for that too.

    Args:
        release: False keeps the originals besides what is prepared of them.
        options: see `graphopt.options.Options`.

    Raises:
        OptionError: an unknown option or value, or too few processes for `shard`; nothing is changed then.
        WeightError: other options than before, for a model whose weights were released.
    """
    owned = Owned(Options.parse(options), release)
    pipeline(owned.options)  # errors now rather than at the first call
    backend.mesh_of(owned.options.shard)
    before = backend.STORE.owners.of(model)
    if before == owned and model._compiled_call_impl is not None:
        if release and backend.STORE.owners.take(alone(model)):  # new parameters
            backend.STORE.look_again()
        return model
    if before is not None and _forms(before) != _forms(owned):
        for name, p in model.named_parameters():
            if is_stand_in(p):
                raise WeightError(
                    f"weight {name} was released under other options ({before.options}); reload the model to "
                    "optimize it with these"
                )
        backend.STORE.refresh(model.parameters())
    own(model, owned)
    ours = {"guard_filter_fn": _without_moving_weights} if release else {}
    more = torch_private.more_compilations(RECOMPILE_LIMIT)
    parts: list[torch.nn.Module] = [model, *called_alone(model)]
    for part in parts:
        part.compile(backend="graphopt", options={**options, **ours}, **more)
    return model


def called_alone(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The parts that transformers' `generate` calls past the model: what `get_encoder()` gives, if a part.

    Inside a call of the model they are compiled as a piece of it; uncompiled, one could not be called by
    itself any more once its weights are packed.
    """
    find = getattr(model, "get_encoder", None)
    part = find() if callable(find) and not _needs_arguments(find) else None
    inside = any(part is m for m in model.modules()) and part is not model
    return [part] if inside and isinstance(part, torch.nn.Module) else []


def _needs_arguments(function: Callable[..., object]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def own(model: torch.nn.Module, owned: Owned) -> None:
    """Take over a model's parameters."""
    model.requires_grad_(False)
    if owned.release:
        keep(model)
    backend.STORE.owners.add(model, owned)


def _forms(owned: Owned) -> Options:
    """The options that may have an effect on prepared weights."""
    plain = Options()
    return dataclasses.replace(
        owned.options,
        strict=plain.strict,
        expect=plain.expect,
        verify=plain.verify,
        verify_seconds=plain.verify_seconds,
        verify_mebibytes=plain.verify_mebibytes,
    )


def _without_moving_weights(guards: Sequence[_Guard]) -> list[bool]:
    """Torch compiles anew when a parameter's strides change; those of a weight do when it is released.

    What else its guard looks at (shape, dtype) is looked at when the weight is prepared.
    """
    skips = backend.STORE.owners.skips_guard
    return [not (guard.guard_type == "TENSOR_MATCH" and skips(guard.value)) for guard in guards]


class _Guard(Protocol):
    """What torch tells of a guard."""

    guard_type: str
    value: object


def refresh(model: torch.nn.Module | None = None) -> None:
    """Prepare weights anew at the next call: after writes that leave no trace (`p.data.mul_()`, numpy views).

    Args:
        model: whose weights changed; None for all models. What is the only form of a released weight stays.
    """
    backend.STORE.refresh(None if model is None else (*model.parameters(), *model.buffers()))


def weight_bytes(model: torch.nn.Module) -> int:
    """The memory of a model's parameters, buffers and what was prepared of them, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    mine = set(map(id, tensors))
    tensors += [e.value for sources, e in backend.STORE.entries() if mine.issuperset(map(id, sources))]
    storages = [x.untyped_storage() for x in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())
