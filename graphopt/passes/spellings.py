"""The table of spellings: how each way to write a thing becomes the one way that rules know.

Each entry of SPELLINGS takes the speller, the old node and its arguments (already canonical, by schema,
defaults filled in) and returns the canonical node. Everything here is exact: a spelling that changes a single
bit does not belong here.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import TYPE_CHECKING

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.passes.bounds import clamp, masked_fill
from graphopt.passes.einsum import einsum
from graphopt.passes.view_spellings import (
    Result,
    Spelling,
    as_strided,
    cast,
    expand,
    getitem,
    identity,
    narrow,
    permute,
    pieces,
    repeat_interleave,
    reshape,
    select,
    slice_,
    softmax,
    unbind,
    view_as_complex,
)
from graphopt.passes.views import EXPANDS, PERMUTATIONS, RESHAPES, overloads

if TYPE_CHECKING:
    from graphopt.passes.speller import Speller

aten = torch.ops.aten


# -------------------------------------------------------------------------------------------- arithmetic


def _known(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _times(y: object, alpha: object, value: object) -> tuple[object, bool]:
    """alpha * y, if that is exact: eager multiplies and adds with one rounding, two calls do not."""
    if alpha == 1:
        return y, True
    if not _known(alpha) or not _known(y) or not isinstance(value, torch.Tensor) or _rounds(value):
        return y, False
    return alpha * y, True  # type: ignore[operator]  # numbers


def _rounds(value: torch.Tensor) -> bool:
    """Whether arithmetic on a dtype rounds, and knows -0.0."""
    return value.is_floating_point() or value.is_complex()


def _unchanged(x: object, value: object) -> bool:
    return g.is_tensor(x) and isinstance(value, torch.Tensor) and g.dtype(x) == value.dtype  # type: ignore[arg-type]  # a node


def _zero(y: object) -> bool:
    """Whether a literal is 0 or +0.0: x - 0.0 is x, bit for bit; x - -0.0 is not."""
    return _known(y) and y == 0 and math.copysign(1, y) > 0


def add(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """add(x, 2, alpha=3) -> add(x, 6) on integers; adding an integer 0 to integers goes; alpha=-1 -> sub"""
    x, y = args[:2]
    value, alpha = g.val(node), kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    assert isinstance(value, torch.Tensor)
    y, exact = _times(y, alpha, value)
    if not exact and alpha == -1:
        return sub(s, node, (x, y), {"alpha": 1})
    if _zero(y) and _unchanged(x, value) and not _rounds(value):  # -0.0 + 0 is 0.0
        return x
    return s.emit(aten.add.Tensor, (x, y), {"alpha": 1 if exact else alpha}, value, node)


def sub(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """sub(x, 3) -> add(x, -3); sub(x, 0) -> x"""
    x, y = args[:2]
    value, alpha = g.val(node), kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    y, exact = _times(y, alpha, value)
    if exact and _zero(y) and _unchanged(x, value):
        return x
    if exact and _known(y) and g.dtype(node).is_signed:
        return s.emit(aten.add.Tensor, (x, -y), {"alpha": 1}, value, node)  # type: ignore[operator]  # a number
    return s.emit(aten.sub.Tensor, (x, y), {"alpha": 1 if exact else alpha}, value, node)


def rsub(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """rsub(x, 1) -> add(neg(x), 1); rsub(x, y) -> sub(y, x)"""
    x, y, alpha = (*args, 1)[:3]
    if alpha != 1:
        return s.generic(node, args, kwargs)
    if isinstance(y, fx.Node) and g.is_tensor(y):
        return s.emit(aten.sub.Tensor, (y, x), {"alpha": 1}, g.val(node), node)
    if g.tensor(x) is not None and g.dtype(x) == g.dtype(node):
        return s.emit(
            aten.add.Tensor,
            (s.emit(aten.neg.default, (x,), {}, g.val(x), node), y),
            {"alpha": 1},
            g.val(node),
            node,
        )
    return s.generic(node, args, kwargs)


def mul(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """mul(x, x) -> pow(x, 2); times 1 goes"""
    x, y = args[:2]
    if x is y and g.dtype(x) != torch.bool:  # a power of booleans is an integer
        return s.emit(aten.pow.Tensor_Scalar, (x, 2), {}, g.val(node), node)
    if _known(y) and y == 1 and g.is_tensor(x) and g.dtype(x) == g.dtype(node):
        return x
    return s.emit(aten.mul.Tensor, (x, y), {}, g.val(node), node)


def div(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """div.Scalar, true_divide -> div.Tensor; by 1 goes. A division stays one: x / 3 is not x * (1 / 3) in
    floats.
    """
    x, y = args[:2]
    if _known(y) and y == 1 and g.is_tensor(x) and g.dtype(x) == g.dtype(node):
        return x
    return s.emit(aten.div.Tensor, (x, y), {}, g.val(node), node)


def power(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """pow(x, 2.0), square -> pow(x, 2); pow(x, 0.5) -> sqrt; pow(x, -0.5) -> rsqrt; pow(x, 1) -> x"""
    x, exponent = (*args, 2)[:2]
    if not _known(exponent):
        return s.generic(node, args, kwargs)
    if exponent == 1 and g.dtype(x) == g.dtype(node):
        return x
    if exponent == 0.5:
        return s.emit(aten.sqrt.default, (x,), {}, g.val(node), node)
    if exponent == -0.5:
        return s.emit(aten.rsqrt.default, (x,), {}, g.val(node), node)
    same_dtype = g.dtype(x) == g.dtype(node)  # an integer tensor to a float power is a float tensor
    if isinstance(exponent, float) and exponent.is_integer() and same_dtype and g.dtype(x).is_floating_point:
        exponent = int(exponent)
    return s.emit(aten.pow.Tensor_Scalar, (x, exponent), {}, g.val(node), node)


def compare(
    scalar: torch_private.OpOverload, tensor: torch_private.OpOverload, swap: bool = False
) -> Spelling:
    """ge(x, y) -> le(y, x); with a number the .Scalar overload"""

    def spell(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
        x, y = args[:2]
        if not g.is_tensor(y):
            return s.emit(scalar, (x, y), {}, g.val(node), node)
        if swap:
            x, y = y, x
        return s.emit(tensor, (x, y), {}, g.val(node), node)

    return spell


def renamed(target: torch_private.OpOverload) -> Spelling:
    """torch.max(x, y) -> maximum(x, y)"""

    def spell(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
        return s.emit(target, args, {}, g.val(node), node)

    return spell


def logical(target: torch_private.OpOverload) -> Spelling:
    """`&`, bitwise_and, logical_and on booleans -> logical_and; on integers it stays bitwise"""

    def spell(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
        named_logical = "logical" in node.target._schema.name  # type: ignore[union-attr]  # an OpOverload
        if all(g.is_tensor(a) and g.dtype(a) == torch.bool for a in args) or named_logical:
            return s.emit(target, args, {}, g.val(node), node)
        return s.generic(node, args, kwargs)

    return spell


# ------------------------------------------------------------------------------------------ whole operators


def matmul(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """mm, bmm, matmul -> matmul"""
    return s.emit(aten.matmul.default, args[:2], {}, g.val(node), node)


def addmm(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """addmm(b, x, w) -> linear(x, w.T, b): what GPT-2's Conv1D calls; for a bias of one dimension only"""
    bias, x, w = args[:3]
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1 or g.rank(bias) != 1:
        return s.generic(node, args, kwargs)
    if not g.same_size(g.shape(bias)[0], g.shape(w)[1]) or g.dtype(bias) != g.dtype(x):
        return s.generic(node, args, kwargs)
    rows, columns = g.shape(w)
    flipped = s.permute(w, [1, 0], g.tensor(w).mT, node)  # type: ignore[union-attr]  # w is a tensor
    del rows, columns
    return s.emit(aten.linear.default, (x, flipped, bias), {}, g.val(node), node)


def _is_order(x: object) -> bool:
    """Whether a value is a permutation: the indices that a sort returns."""
    if not isinstance(x, fx.Node) or x.target is not operator.getitem or x.args[1] != 1:
        return False
    return g.is_call(x.args[0], aten.sort.default)


def index_put(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """index_put(empty, [order], arange) -> argsort(order), where order is a sort's: its inverse"""
    into, indices, values, accumulate = args
    order = indices[0]
    if accumulate or len(indices) != 1 or not _is_order(order):
        return s.generic(node, args, kwargs)
    counted = g.is_call(values, aten.arange.default) or g.is_call(values, aten.arange.start)
    start = g.arg(values, "start") if g.is_call(values, aten.arange.start) else 0
    same = g.rank(order) == 1 and all(
        g.same_shape(g.shape(x), g.shape(order)) and g.dtype(x) == torch.int64 for x in (into, values)
    )
    if not counted or start != 0 or not same:
        return s.generic(node, args, kwargs)
    return s.emit(aten.argsort.default, (order, -1, False), {}, g.val(node), node)


def _empty(x: fx.Node, dim: int) -> bool:
    """Whether a tensor adds nothing to a concatenation: one of shape [0] may stand among any others."""
    size = g.shape(x)[dim] if g.rank(x) > 1 else g.shape(x)[0]
    return isinstance(size, int) and size == 0


def cat(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """cat([x, empty], dim) -> x: an empty cache of shape [0] is what a first call concatenates, and an empty
    rest what a rope of whole heads does
    """
    tensors, dim = args
    kept = [t for t in tensors if not _empty(t, dim)] or list(tensors[:1])
    if functools.reduce(torch.promote_types, map(g.dtype, kept)) != g.dtype(node):
        kept = list(tensors)  # the empty one decides the dtype
    if len(kept) == 1 and g.dtype(kept[0]) == g.dtype(node):
        return kept[0]
    rank = g.rank(kept[0])
    return s.emit(aten.cat.default, (kept, dim % rank - rank), {}, g.val(node), node)


def stack(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """stack(tensors, dim) with dim counted from the end of the result"""
    rank = g.rank(node)
    return s.emit(aten.stack.default, (list(args[0]), args[1] % rank - rank), {}, g.val(node), node)


def attention(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """scaled_dot_product_attention without a scale -> with 1 / sqrt(head_dim)"""
    size = g.shape(args[0])[-1]
    if g.rank(args[1]) > 1:
        torch_private.learn_equal(
            g.shape(args[1])[-2], g.shape(args[2])[-2]
        )  # the fake of SDPA does not check it
    if kwargs.get("scale") is None and isinstance(size, int) and size:
        kwargs = {**kwargs, "scale": 1.0 / math.sqrt(size)}
    return s.emit(aten.scaled_dot_product_attention.default, args, kwargs, g.val(node), node)


def variance(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """var.dim(x, dims, unbiased, keepdim) -> var.correction(x, dims, correction=0 or 1, keepdim)"""
    x, dims, unbiased, keepdim = args
    dims = [d % g.rank(x) - g.rank(x) for d in dims] if dims else None
    kwargs = {"correction": 1 if unbiased else 0, "keepdim": keepdim}
    return s.emit(aten.var.correction, (x, dims), kwargs, g.val(node), node)


def dropped(s: Speller, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> Result:
    """An assertion on dtype or layout that the trace has already checked"""
    return None


def _table() -> dict[object, Spelling]:
    table: dict[object, Spelling] = {operator.getitem: getitem}

    def row(spelling: Spelling, *names: str) -> None:
        table.update(dict.fromkeys(overloads(*names), spelling))

    row(
        identity,
        "clone",
        "contiguous",
        "detach",
        "detach_",
        "alias",
        "lift_fresh",
        "lift_fresh_copy",
        "positive",
    )
    row(dropped, "_assert_tensor_metadata")
    table.update(dict.fromkeys(RESHAPES, reshape))
    row(reshape, "view_copy", "unsqueeze_copy")
    table.update(dict.fromkeys(PERMUTATIONS, permute))
    table.update(dict.fromkeys(EXPANDS, expand))
    row(repeat_interleave, "repeat_interleave.self_int")
    row(slice_, "slice.Tensor")
    row(narrow, "narrow")
    row(select, "select.int")
    row(view_as_complex, "view_as_complex")
    row(as_strided, "as_strided")
    row(pieces, "split.Tensor", "split.sizes", "split_with_sizes", "chunk", "tensor_split.sections")
    row(unbind, "unbind.int")
    row(cast, "to.dtype", "to.device", "to.dtype_layout", "to.other", "type_as", "_to_copy")
    row(softmax, "softmax.int", "_softmax", "special_softmax")
    row(add, "add.Tensor", "add.Scalar")
    row(sub, "sub.Tensor", "sub.Scalar", "subtract.Tensor")
    row(rsub, "rsub.Tensor", "rsub.Scalar")
    row(mul, "mul.Tensor", "mul.Scalar", "multiply.Tensor")
    row(div, "div.Tensor", "div.Scalar", "true_divide.Tensor", "divide.Tensor")
    row(einsum, "einsum")
    row(renamed(aten.maximum.default), "max.other")
    row(renamed(aten.minimum.default), "min.other")
    row(power, "pow.Tensor_Scalar", "square")
    for name, opposite in (
        ("le", None),
        ("lt", None),
        ("eq", None),
        ("ne", None),
        ("ge", "le"),
        ("gt", "lt"),
    ):
        scalar = getattr(aten, name).Scalar
        tensor = getattr(aten, opposite or name).Tensor
        long = {
            "le": "less_equal",
            "lt": "less",
            "eq": "eq",
            "ne": "not_equal",
            "ge": "greater_equal",
            "gt": "greater",
        }[name]
        spelled = compare(scalar, tensor, swap=opposite is not None)
        row(spelled, f"{name}.Tensor", f"{name}.Scalar", f"{long}.Tensor", f"{long}.Scalar")
    row(logical(aten.logical_and.default), "__and__.Tensor", "bitwise_and.Tensor", "logical_and")
    row(logical(aten.logical_or.default), "__or__.Tensor", "bitwise_or.Tensor", "logical_or")
    row(logical(aten.logical_xor.default), "__xor__.Tensor", "bitwise_xor.Tensor", "logical_xor")
    row(logical(aten.logical_not.default), "bitwise_not", "logical_not")
    row(matmul, "matmul", "mm", "bmm")
    row(addmm, "addmm")
    row(masked_fill, "masked_fill.Scalar", "masked_fill.Tensor")
    row(clamp, "clamp")
    row(index_put, "index_put")
    row(cat, "cat", "concat", "concatenate")
    row(stack, "stack")
    row(attention, "scaled_dot_product_attention")
    row(variance, "var.dim")
    return table


SPELLINGS: dict[object, Spelling] = _table()
