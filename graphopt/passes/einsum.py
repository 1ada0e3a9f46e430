"""einsum as the product that torch makes of it: permute and reshape around one matmul."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from graphopt import graph as g

if TYPE_CHECKING:
    from graphopt.passes.speller import Speller

aten = torch.ops.aten


@dataclass(frozen=True)
class Equation:
    """The labels of one or two operands, and of the result; "..." stands as labels of its own."""

    operands: tuple[str, ...]
    result: str


def equation_of(text: str, ranks: Sequence[int]) -> Equation | None:
    """An equation with its ellipses spelt out; None where it has no product of two tensors, or a diagonal.

    "...qd,...kd->...qk" of ranks 4 and 4 has the operands "01qd", "01kd" and the result "01qk".
    """
    left, arrow, right = text.replace(" ", "").partition("->")
    operands = left.split(",")
    if len(operands) != len(ranks) or len(ranks) > 2:
        return None
    hidden = [rank - len(o.replace("...", "")) for o, rank in zip(operands, ranks, strict=True)]
    if any(n and "..." not in o for o, n in zip(operands, hidden, strict=True)) or max(hidden) > 9:
        return None
    most = max(hidden)
    spelt = [o.replace("...", _digits(most - n, most)) for o, n in zip(operands, hidden, strict=True)]
    if not arrow:
        letters = "".join(spelt)
        right = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1 and c.isalpha()))
    result = right.replace("...", _digits(0, most))
    if any(len(set(labels)) < len(labels) for labels in (*spelt, result)):
        return None
    return Equation(tuple(spelt), result)


def _digits(start: int, end: int) -> str:
    return "".join(map(str, range(start, end)))


def einsum(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> fx.Node:
    """einsum("bqhd,bkhd->bhqk", q, k) -> matmul(permute(q), permute(k)); of one operand -> permute

    The factors of `sumproduct_pair` (aten/src/ATen/native/Linear.cpp), so that not one bit changes. What
    broadcasts, sums one operand alone, takes diagonals or has more operands stays an einsum.
    """
    text, tensors = args[:2]
    parsed = equation_of(text, [g.rank(x) for x in tensors])
    if parsed is None:
        return s.generic(node, args, kwargs)
    if len(tensors) == 1:
        (labels,) = parsed.operands
        if sorted(labels) != sorted(parsed.result):
            return s.generic(node, args, kwargs)
        order = [labels.index(c) for c in parsed.result]
        return s.permute(tensors[0], order, g.val(node), node)
    x, y = parsed.operands
    shared = [c for c in x if c in y]
    batch = [c for c in parsed.result if c in shared]
    summed = [c for c in shared if c not in parsed.result]
    rows = [c for c in parsed.result if c in x and c not in y]
    columns = [c for c in parsed.result if c in y and c not in x]
    alone = len(x) - len(batch) - len(rows) - len(summed), len(y) - len(batch) - len(columns) - len(summed)
    sizes = [dict(zip(labels, g.shape(t), strict=True)) for labels, t in zip((x, y), tensors, strict=True)]
    broadcast = any(not g.same_size(sizes[0][c], sizes[1][c]) for c in shared)
    if not summed or any(alone) or broadcast or g.dtype(tensors[0]) != g.dtype(tensors[1]):
        return s.generic(node, args, kwargs)
    known = sizes[1] | sizes[0]

    def factor(t: fx.Node, labels: str, groups: Sequence[Sequence[str]]) -> fx.Node:
        """A tensor as [*batch, first group, second group]."""
        value = g.tensor(t)
        assert value is not None
        order = [labels.index(c) for group in (batch, *groups) for c in group]
        value = value.permute(order)
        t = s.permute(t, order, value, node)
        # One product is a batch of one, as it is in torch: a product of matrices sums in another order.
        outer = [known[c] for c in batch] or [1]
        value = value.new_empty([*outer, *(math.prod(known[c] for c in group) for group in groups)])
        return s.reshape(t, value, node)

    first, second = factor(tensors[0], x, (rows, summed)), factor(tensors[1], y, (summed, columns))
    value = g.val(node)
    assert isinstance(value, torch.Tensor)
    flat = value.new_empty([*g.shape(first)[:-1], g.shape(second)[-1]])
    product = s.emit(aten.matmul.default, (first, second), {}, flat, node)
    found = [*batch, *rows, *columns]
    wide = value.new_empty([known[c] for c in found])
    product = s.reshape(product, wide, node)
    return s.permute(product, [found.index(c) for c in parsed.result], value, node)
