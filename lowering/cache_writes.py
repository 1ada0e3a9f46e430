"""Make the writes of a layer's caches one call, with the rotation before them, and the lengths' advance one."""

from __future__ import annotations

from torch import fx


def group_cache_writes(graph: fx.Graph) -> int:
    """index_copy_(k_cache, ..), index_copy_(v_cache, ..) -> rope_write or cache_write; returns how many."""
    return 0


def advance_lengths(graph: fx.Graph) -> int:
    """add_(length, k) of each layer -> one _foreach_add_ at the end; returns how many went into it."""
    return 0
