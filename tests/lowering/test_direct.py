"""torch's bindings compute what the overloads do, with the same arguments, aliasing and symbolic sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx

from graphopt import graph as g
from graphopt.lowering.direct import OTHER, SAME, call_directly
from tests.graphs import Builder, targets

aten = torch.ops.aten

X, Y, INDEX = torch.randn(2, 3, 4), torch.rand(2, 3, 4), torch.tensor([[0], [2]])
B = X > 0
CALLS: dict[Callable[..., object], tuple[tuple[object, ...], dict[str, object]]] = {
    aten.addmm.default: ((X[0, :, :3], X[0], Y[0].T), {"beta": 1, "alpha": 2}),
    aten.amax.default: ((X, [-1], True), {}),
    aten.any.dim: ((B, -1, False), {}),
    aten.arange.default: (
        (5,),
        {"dtype": torch.int32, "layout": None, "device": torch.device("cpu"), "pin_memory": False},
    ),
    aten.arange.start: ((2, 5), {"dtype": None, "layout": None, "device": None, "pin_memory": None}),
    aten.argmax.default: ((X, -1, False), {}),
    aten.baddbmm.default: (
        (X, X, Y[:, :, 0:1].expand(2, 3, 4)[:, 0:1].expand(2, 4, 4)),
        {"beta": 2, "alpha": 0.5},
    ),
    aten.bmm.default: ((X, Y.mT), {}),
    aten.cat.default: (([X, Y], -1), {}),
    aten.clamp.default: ((X, None, 0.5), {}),
    aten.copy_.default: ((X.clone(), Y, False), {}),
    aten.cumsum.default: ((X, -1), {"dtype": None}),
    aten.embedding.default: ((X[0], INDEX, -1, False, False), {}),
    aten.expand.default: ((X[:, :1], [2, 3, 4]), {"implicit": False}),
    aten.full.default: (
        ([2, 3], 1.5),
        {"dtype": torch.float64, "layout": None, "device": None, "pin_memory": None},
    ),
    aten.gather.default: ((X, -1, INDEX.expand(2, 3).unsqueeze(-1)), {"sparse_grad": False}),
    aten.gelu.default: ((X,), {"approximate": "tanh"}),
    aten.index_copy.default: ((X, -1, torch.tensor([1]), Y[..., :1]), {}),
    aten.index_copy_.default: ((X.clone(), -1, torch.tensor([1]), Y[..., :1]), {}),
    aten.index_select.default: ((X, -1, torch.tensor([1, 3])), {}),
    aten.layer_norm.default: ((X, [4], X[0, 0], None, 1e-3, True), {}),
    aten.linear.default: ((X, Y[0], None), {}),
    aten.matmul.default: ((X, Y.mT), {}),
    aten.mean.dim: ((X, [-1], True), {"dtype": None}),
    aten.mm.default: ((X[0], Y[0].T), {}),
    aten.masked_fill.Scalar: ((X, B, -2.0), {}),
    aten.permute.default: ((X, [2, 0, 1]), {}),
    aten.pow.Tensor_Scalar: ((X, 2), {}),
    aten.reshape.default: ((X, [6, 4]), {}),
    aten.scaled_dot_product_attention.default: (
        (X[None], Y[None], Y[None], None, 0.0, True),
        {"scale": 0.3, "enable_gqa": False},
    ),
    aten.select.int: ((X, -2, 1), {}),
    aten.slice.Tensor: ((X, -2, 1, 3, 1), {}),
    aten.softmax.int: ((X, -1, None), {}),
    aten.stack.default: (([X, Y], -1), {}),
    aten.sum.dim_IntList: ((X, [-2, -1], False), {"dtype": torch.float64}),
    aten.to.dtype: ((X, torch.bfloat16, False, False, None), {}),
    aten.where.ScalarOther: ((B, X, -1.0), {}),
    aten.where.self: ((B, X, Y), {}),
    aten.zeros.default: (
        ([2, 3],),
        {"dtype": torch.int32, "layout": None, "device": None, "pin_memory": None},
    ),
}
UNARY = ("abs", "cos", "erf", "exp", "log", "neg", "relu", "rsqrt", "sigmoid", "silu", "sin", "sqrt", "tanh")
CALLS |= {getattr(aten, name).default: ((Y + 0.1,), {}) for name in UNARY}
CALLS |= {getattr(aten, name).Tensor: ((X, Y), {}) for name in ("add", "mul", "div", "sub", "eq", "le", "lt")}
CALLS |= {getattr(aten, name).Scalar: ((X, 0.25), {}) for name in ("eq", "ge", "gt", "le", "lt", "ne")}
CALLS |= {getattr(aten, f"logical_{name}").default: ((B, Y > 0.5), {}) for name in ("and", "or")}
CALLS[aten.logical_not.default] = ((B,), {})


def graph_of(target: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> tuple:
    """A graph that makes one call, and the tensors that it is given."""
    build, tensors = Builder(), []

    def node(value: object) -> object:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            with build.among_inputs():
                placeholder = build.graph.placeholder(f"x{len(tensors)}")
            g.set_val(placeholder, build.mode.from_tensor(value, static_shapes=True))
            return placeholder
        return [node(v) for v in value] if isinstance(value, list) else value

    return build.done(build.call(target, *(node(a) for a in args), **kwargs)), tensors


@pytest.mark.parametrize("target", [*SAME, *OTHER], ids=str)
def test_the_binding_computes_the_same(target: Callable[..., object]) -> None:
    assert target in CALLS, f"give an example call of {target}"
    args, kwargs = CALLS[target]
    gm, tensors = graph_of(target, args, kwargs)
    (expected,) = gm(*(t.clone() for t in tensors))
    assert call_directly(gm.graph) == 1
    assert targets(gm) != [target]
    gm.recompile()
    inputs = [t.clone() for t in tensors]
    (found,) = gm(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.stride() == expected.stride()
    aliases = any(found.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in inputs)
    assert (
        aliases == any(a.alias_info is not None for a in g.schema_arguments(target))
        or target is aten.to.dtype
    )


@pytest.mark.parametrize("alpha", [1, 2])
def test_alpha_is_kept_where_it_matters(alpha: int) -> None:
    gm, tensors = graph_of(aten.add.Tensor, (X, Y), {"alpha": alpha})
    call_directly(gm.graph)
    gm.recompile()
    torch.testing.assert_close(gm(*tensors)[0], X + alpha * Y)
    assert ("alpha" in gm.code) == (alpha != 1)


def test_symbolic_slices_and_shapes() -> None:
    build = Builder()
    s = build.size("s", 4)
    x = build.input("x", 2, s, 6)
    end = build.call(operator.sub, s, 1)
    part = build.call(aten.slice.Tensor, x, -2, 0, end, 1)
    gm = build.done(build.call(aten.reshape.default, part, [2, end, 3, 2]))
    call_directly(gm.graph)
    gm.recompile()
    value = torch.randn(2, 5, 6)
    assert torch.equal(gm(5, value)[0], value[:, :4].reshape(2, 4, 3, 2))


def test_a_size_one_dimension_and_a_step() -> None:
    for args in ((X, -1, 0, 4, 2), (X, -3, 1, 2, 1), (X, -1)):
        gm, tensors = graph_of(aten.slice.Tensor, args, {})
        (expected,) = gm(*tensors)
        call_directly(gm.graph)
        gm.recompile()
        assert torch.equal(gm(*tensors)[0], expected)


def test_what_has_no_binding_stays() -> None:
    for target, args in (
        (aten.to.dtype, (X, torch.float64, False, True, None)),
        (aten.slice.Tensor, (X, 0, 0, 1, 1)),
    ):
        gm, _ = graph_of(target, args, {})
        assert call_directly(gm.graph) == 0 and targets(gm) == [target]
    assert isinstance(gm, fx.GraphModule)
