"""The update of a key or value cache, as a pure function; `lowering` writes in place again."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ops.define import op, require_rank, require_size

INDEX_DTYPES = (torch.int64, torch.int32)


def _check(cache: Tensor, new: Tensor, position: Tensor | None) -> None:
    """Raise ValueError for what does not fit together."""
    require_rank("cache_update", 4, cache=cache, new=new)
    for dim, what in ((0, "batch"), (1, "number of heads"), (3, "head_dim")):
        require_size("cache_update", f"{what} of new", new.shape[dim], cache.shape[dim])
    if new.dtype != cache.dtype:
        raise ValueError(f"cache_update: new is {new.dtype}; it must be {cache.dtype}, as the cache")
    if position is None:
        return
    require_rank("cache_update", 1, position=position)
    require_size("cache_update", "size of position", position.shape[0], new.shape[-2])
    if position.dtype not in INDEX_DTYPES:
        raise ValueError(f"cache_update: position is {position.dtype}; it must be int64 or int32")


def _cache_update_fake(cache: Tensor, new: Tensor, position: Tensor | None) -> Tensor:
    _check(cache, new, position)
    if position is not None:
        return torch.empty_like(cache)
    batch, heads, length, head_dim = cache.shape
    return cache.new_empty((batch, heads, length + new.shape[2], head_dim))


@op(fake=_cache_update_fake)
def cache_update(cache: Tensor, new: Tensor, position: Tensor | None) -> Tensor:
    """The cache with `new` appended (position None) or written at the rows `position`.

    cache [B, H, L, D], new [B, H, S, D], position int [S] with distinct values in [0, L)
    -> [B, H, L + S, D] appended, else [B, H, L, D].

    Source: DynamicCache and StaticCache in transformers.
    Raises ValueError where ranks, sizes or dtypes do not fit, IndexError for a position outside of the cache
    (on real tensors).
    """
    _check(cache, new, position)
    if position is None:
        return torch.cat((cache, new), -2)
    return cache.index_copy(-2, position.to(torch.int64), new)
