"""Eager's strides: in what order a dense value is stored, and which calls do nothing but lay out memory."""

from __future__ import annotations

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.aliasing import viewed

aten = torch.ops.aten

# Calls whose meaning depends on their input's strides: where one occurs, no layout change is dropped.
STRIDE_SENSITIVE = frozenset({aten.view.dtype})
# Calls that only lay out memory: dropped, but for the memory of an output that is not dense.
LAYOUTS = frozenset({aten.clone.default, aten.contiguous.default, aten._to_copy.default})


def dim_order(value: object) -> tuple[int, ...] | None:
    """The dimensions of a dense tensor from the slowest to the fastest; None where it is not dense or no
    tensor.
    """
    if not isinstance(value, torch.Tensor):
        return None
    sizes = [_hint(s) for s in value.shape]
    strides = [s for s in map(_hint, value.stride()) if s is not None]
    if None in sizes or len(strides) != value.dim():
        return tuple(range(value.dim())) if value.is_contiguous() else None
    order = sorted(range(value.dim()), key=lambda d: (-strides[d], d))
    expected = 1
    for d in reversed(order):
        if sizes[d] != 1 and strides[d] != expected:
            return None
        expected *= sizes[d] or 0
    return tuple(order)


def keep_copies_below_sparse_outputs(graph: fx.Graph) -> None:
    """Mark the copy below each returned view that is not dense: no order of dimensions says its strides."""
    for node in g.output_node(graph).all_input_nodes:
        if not g.is_tensor(node) or dim_order(g.val(node)) is not None:
            continue
        below: fx.Node | None = node
        while below is not None and below.target not in LAYOUTS:
            below = viewed(below)
        if below is not None:
            below.meta["keep"] = True


def _hint(size: g.Size) -> int | None:
    if isinstance(size, int):
        return size
    found = torch_private.hint(size)
    return None if found is None else int(found)
