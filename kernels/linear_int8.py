"""Linear layers on int8 weights on CPU: a tile of the weight at a time becomes floating and is multiplied."""

from __future__ import annotations

import torch

from graphopt.kernel import Case, Kernel, Tensor, never
from graphopt.ops.define import wide
from graphopt.ops.quantized import group_of

TILE = 1 << 18  # elements of the weight that are floating at a time: 1 MB in fp32, which stays in the cache
HALF_ROWS = 16  # of x, in bf16: below, filling a tile in fp32 is faster; above, multiplying in bf16 is


def linear_int8(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x @ (packed * scales)^T + bias, 128 rows of a 2048 wide weight at a time.

    In fp32 (fp64 for fp64), and in bf16 for many rows of x in bf16, as unquantized layers do.
    Milliseconds at 2048 x 2048, one thread of Zen 4, reference -> this: fp32 13 -> 0.7 (1 row), 23 -> 10
    (128 rows); bf16 2.1 -> 0.7, 11 -> 3.5. fp16 stays in fp32: its products are 4 times slower.
    """
    (n, k), groups = packed.shape, scales.shape[1]
    rows = x.reshape(x.shape[:-1].numel(), k)
    dtype = torch.promote_types(wide(x.dtype), wide(scales.dtype))
    if x.dtype == torch.bfloat16 and dtype == torch.float32 and rows.shape[0] >= HALF_ROWS:
        dtype = torch.bfloat16
    rows, factors = rows.to(dtype), scales.to(dtype).unsqueeze(-1)
    added = None if bias is None else bias.to(dtype)
    group, height = group_of("linear_int8", k, groups), max(1, TILE // max(k, 1))
    out = torch.empty((rows.shape[0], n), dtype=dtype)
    weight = torch.empty((min(height, n), k), dtype=dtype)
    for start in range(0, n, height):
        part = slice(start, min(start + height, n))
        tile = weight[: part.stop - start]
        tile.copy_(packed[part])
        tile.view(tile.shape[0], groups, group).mul_(factors[part])
        if added is None:
            torch.mm(rows, tile.t(), out=out[:, part])
        else:
            torch.addmm(added[part], rows, tile.t(), out=out[:, part])
    return out.to(x.dtype).view(*x.shape[:-1], n)


def _case(name: str, x: Tensor, rows: int, group: int, bias: bool) -> Case:
    """A call with random int8 weights and scales that give outputs near 1."""
    k = x.shape[-1]
    packed = Tensor((rows, k), torch.int8, below=128)
    scales = Tensor((rows, k // group), scale=1 / (64 * max(k, 1) ** 0.5))
    return Case(name, (x, packed, scales, Tensor((rows,)) if bias else None))


CASES = (
    _case("tidy", Tensor((2, 8, 128)), 32, 64, True),
    _case("ugly", Tensor((3, 7, 51)), 123, 3, False),
    _case("one row", Tensor((1, 1, 64)), 96, 64, False),
    _case("fifteen rows", Tensor((15, 64)), 10, 32, True),
    _case("sixteen rows", Tensor((16, 64)), 10, 32, True),
    _case("two tiles and a row", Tensor((3, 4096)), 2 * (TILE // 4096) + 1, 64, True),
    _case("a vector", Tensor((64,)), 10, 64, True),
    _case("sliced", Tensor((2, 5, 24), layout="sliced"), 10, 8, True),
    _case("transposed", Tensor((2, 5, 3, 24), layout="transposed"), 10, 8, False),
    _case("expanded", Tensor((2, 5, 24), layout="expanded"), 10, 8, True),
    _case("one column", Tensor((2, 5, 24)), 1, 24, False),
    _case("group of one", Tensor((2, 5, 24)), 10, 1, False),
    _case("no rows", Tensor((0, 5, 24)), 10, 8, True),
    _case("no columns", Tensor((2, 24)), 0, 8, True),
    _case("no inputs", Tensor((2, 0)), 10, 8, True),
)

KERNELS = (Kernel("linear_int8", "linear_int8_tiled", linear_int8, never, "cpu", CASES, CASES),)
