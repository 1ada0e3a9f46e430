"""The table of operators that a mask is read through; anything else is a leaf."""

from __future__ import annotations

import torch

from graphopt.masks import arithmetic as a
from graphopt.masks import views as v
from graphopt.masks.expression import Rule
from graphopt.masks.term import all_of, any_of, negate

ROWS: tuple[tuple[str, Rule], ...] = (
    ("lt.Tensor lt.Scalar", a.comparison(lambda x, y, space: a.compared(y, x, 1, space))),
    ("le.Tensor le.Scalar", a.comparison(lambda x, y, space: a.compared(y, x, 0, space))),
    ("gt.Tensor gt.Scalar", a.comparison(lambda x, y, space: a.compared(x, y, 1, space))),
    ("ge.Tensor ge.Scalar", a.comparison(lambda x, y, space: a.compared(x, y, 0, space))),
    ("eq.Tensor eq.Scalar", a.comparison(a.equal)),
    ("ne.Tensor ne.Scalar", a.comparison(lambda x, y, space: negate(a.equal(x, y, space)))),
    ("logical_and.default", a.logic(all_of)),
    ("logical_or.default", a.logic(any_of)),
    ("logical_xor.default", a.logic(a.exclusive)),
    ("logical_not.default bitwise_not.default", a.logical_not),
    ("bitwise_and.Tensor bitwise_and.Scalar __and__.Tensor __and__.Scalar", a.logic(all_of, bools_only=True)),
    ("bitwise_or.Tensor bitwise_or.Scalar __or__.Tensor __or__.Scalar", a.logic(any_of, bools_only=True)),
    ("bitwise_xor.Tensor bitwise_xor.Scalar __xor__.Tensor", a.logic(a.exclusive, bools_only=True)),
    ("add.Tensor add.Scalar", a.add),
    ("sub.Tensor sub.Scalar", a.sub),
    ("rsub.Tensor rsub.Scalar", a.rsub),
    ("mul.Tensor mul.Scalar", a.mul),
    ("neg.default", a.neg),
    ("abs.default", a.absolute),
    ("floor_divide.default floor_divide.Scalar div.Tensor_mode div.Scalar_mode", a.floor_divide),
    ("clamp_min.default", a.clamp_min),
    ("to.dtype to.device to.dtype_layout to.other _to_copy.default type_as.default", a.to_dtype),
    ("clone.default alias.default contiguous.default detach.default lift_fresh_copy.default", a.to_dtype),
    ("where.self where.ScalarOther where.ScalarSelf where.Scalar", a.where),
    ("masked_fill.Scalar masked_fill.Tensor", a.masked_fill),
    ("tril.default", a.triangle(1)),
    ("triu.default", a.triangle(-1)),
    ("full.default new_full.default full_like.default", v.filled("fill_value")),
    ("scalar_tensor.default", v.filled("s")),
    ("ones.default new_ones.default ones_like.default", v.filled(None, 1.0)),
    ("zeros.default new_zeros.default zeros_like.default", v.filled(None, 0.0)),
    ("arange.default arange.start arange.start_step", v.arange),
    ("reshape.default view.default _unsafe_view.default unsqueeze.default", v.reshape),
    ("squeeze.default squeeze.dim squeeze.dims", v.reshape),
    ("permute.default transpose.int", v.permute),
    ("expand.default", v.expand),
    ("slice.Tensor", v.slice_),
    ("select.int", v.select),
    ("index.Tensor", v.index_tensor),
    ("gather.default", v.gather),
    ("index_select.default", v.index_select),
    ("diff.default", v.diff),
    ("cumsum.default", v.cumsum),
)


def _overload(name: str) -> object:
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


RULES: dict[object, Rule] = {_overload(name): rule for names, rule in ROWS for name in names.split()}
RULES["get_attr"] = v.constant  # a node's op where it is no call
