"""Whether a model is the one that was saved: its weights by name, their shapes and ties, configuration."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from graphopt.errors import ArtifactError
from graphopt.manifest import Place


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by all its names, buffers outside the state dict included."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def check_names(model: nn.Module, places: Mapping[str, Place]) -> None:
    """The model has the weights that were saved, no more and no less, of the same shapes and dtypes."""
    named = dict(named_tensors(model))
    for text, names in (
        ("the model lacks", places.keys() - named.keys()),
        ("saved was no", named.keys() - places.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ArtifactError(f"{text} {shown}; build it from the same configuration")
    for name, x in named.items():
        place = places[name]
        if (tuple(x.shape), str(x.dtype)) != (place.shape, place.dtype):
            raise ArtifactError(
                f"{name} is {list(x.shape)} {x.dtype} in the model and {list(place.shape)} {place.dtype} "
                "as saved; build it from the same configuration"
            )


def check_ties(model: nn.Module, places: Mapping[str, Place]) -> None:
    """Names that are one tensor in the model are one as saved, and the reverse for parameters."""
    named = dict(named_tensors(model))
    first: dict[int, str] = {}
    for name, x in named.items():
        other = first.setdefault(id(x), name)
        if places[other] != places[name]:
            raise ArtifactError(
                f"{other} and {name} are one weight in the model and two as saved; build it from the same "
                "configuration"
            )
    at: dict[Place, str] = {}
    for name, place in places.items():
        if place.block is None or 0 in place.shape or not isinstance(named[name], nn.Parameter):
            continue
        other = at.setdefault(place, name)
        if named[other] is not named[name] and not _shared(named[other], named[name]):
            raise ArtifactError(
                f"{other} and {name} are one weight as saved and two in the model; build it from the same "
                "configuration"
            )


def _shared(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors lie in the same memory; on meta they may."""
    return one.device.type == "meta" or one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()


# Entries of a configuration that no result depends on.
_NO_RESULT = frozenset({"transformers_version", "architectures", "use_cache", "return_dict"})


def config_of(model: nn.Module) -> dict[str, object] | None:
    """What a model says of its configuration, as far as JSON holds it, but for where it came from."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if not callable(to_dict):
        return None
    said = json.loads(json.dumps(to_dict(), default=str))
    return {k: v for k, v in said.items() if not k.startswith("_") and k not in _NO_RESULT}


def compare_configs(saved: Mapping[str, object] | None, given: Mapping[str, object] | None) -> None:
    """Warn where the model's configuration is another than the saved one's: results may be others then."""
    if not isinstance(saved, dict) or given is None:
        return
    changed = sorted(k for k in saved.keys() | given.keys() if saved.get(k) != given.get(k))
    if changed:
        shown = "; ".join(f"{k} is {given.get(k)!r}, saved was {saved.get(k)!r}" for k in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        warnings.warn(f"the model's configuration differs from the saved one's: {shown}{more}", stacklevel=3)
