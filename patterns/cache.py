"""KV caches: written at positions (static caches) or grown by concatenation (dynamic caches)."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt import graph as g
from graphopt import ops
from graphopt.binding import Binding
from graphopt.rule import T, rule


def static_cache(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    """cache[:, :, position] = new"""
    return torch.index_copy(cache, 2, position, new)


def dynamic_cache(cache: Tensor, new: Tensor) -> Tensor:
    """cat([cache, new], length)"""
    return torch.cat([cache, new], dim=-2)


def _is_input(binding: Binding) -> str | None:
    """A cache that grows comes from outside; concatenating two computed tensors is something else."""
    node = binding.leaves["cache"]
    if g.is_weight(node):
        return f"{node} is a weight, so no cache"
    return (
        None if getattr(node, "op", "") == "placeholder" else f"{node} is no input of the graph, so no cache"
    )


RULES = (
    rule(
        static_cache,
        lambda cache, new, position: ops.cache_update(cache, new, position),
        cache=T("b h l d"),
        new=T("b h s d"),
        position=T("s", "int64"),
    ),
    rule(
        dynamic_cache,
        lambda cache, new: ops.cache_update(cache, new, None),
        guard=_is_input,
        cache=T("b h l d"),
        new=T("b h s d"),
    ),
)
