"""Linear layers on CPU, by oneDNN and MKL through torch."""

from __future__ import annotations

from torch.nn import functional as F

from graphopt.kernel import Case, Kernel, Tensor, never

CASES = (
    Case("tidy", (Tensor((2, 8, 64)), Tensor((32, 64), scale=0.125), Tensor((32,)))),
    Case("ugly", (Tensor((3, 7, 51)), Tensor((123, 51), scale=0.14), None)),
    Case("one row", (Tensor((1, 1, 64)), Tensor((96, 64), scale=0.125), None)),
    Case("4096 rows", (Tensor((4096, 16)), Tensor((8, 16), scale=0.25), Tensor((8,)))),
    Case("sliced", (Tensor((2, 5, 24), layout="sliced"), Tensor((10, 24), scale=0.2), Tensor((10,)))),
    Case("part of a merged weight", (Tensor((2, 5, 24)), Tensor((10, 24), layout="sliced", scale=0.2), None)),
    Case("one column", (Tensor((2, 5, 24)), Tensor((1, 24), scale=0.2), None)),
    Case("no rows", (Tensor((0, 5, 24)), Tensor((10, 24)), Tensor((10,)))),
)

KERNELS = (Kernel("linear", "linear_torch", F.linear, never, "cpu", CASES, CASES),)
