"""Key/value cache updates on CPU: one append or one indexed copy (which lowering writes in place)."""

from __future__ import annotations

import torch

from graphopt.kernel import Case, Kernel, Tensor, never


def cache_update(cache: torch.Tensor, new: torch.Tensor, position: torch.Tensor | None) -> torch.Tensor:
    """cache [B, H, L, D] with new [B, H, S, D] appended, or written at the rows position [S]."""
    if position is None:
        return torch.cat((cache, new), -2)
    return torch.index_copy(
        cache, -2, position if position.dtype == torch.int64 else position.to(torch.int64), new
    )


def _case(
    name: str, cache: tuple[int, ...], rows: int, index: torch.dtype | None = torch.int64, layout: str = ""
) -> Case:
    new = Tensor((*cache[:2], rows, cache[3]), layout=layout or "contiguous")
    position = None if index is None else Tensor((rows,), index, below=max(1, cache[2]))
    return Case(name, (Tensor(cache), new, position))


CASES = (
    _case("tidy", (2, 4, 16, 8), 3),
    _case("ugly", (3, 1, 7, 5), 7),
    _case("one row", (1, 2, 9, 16), 1, layout="transposed"),
    _case("int32", (1, 2, 9, 16), 2, torch.int32),
    _case("appended", (2, 2, 5, 8), 3, None, "transposed"),
    _case("appended to nothing", (2, 2, 0, 8), 3, None),
    _case("nothing new", (2, 2, 5, 8), 0),
)

KERNELS = (Kernel("cache_update", "cache_update_torch", cache_update, never, "cpu", CASES, CASES),)
