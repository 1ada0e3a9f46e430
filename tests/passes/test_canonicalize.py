"""One spelling: what must become equal, what must stay different, and that not one bit changes."""

# ruff: noqa: E501  # the tables: one line for each spelling or two
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from graphopt import graph as g
from graphopt import torch_private
from graphopt.capture import Captured, capture
from graphopt.errors import CaptureRefused
from graphopt.passes.canonicalize import Canonicalize, canonicalize
from graphopt.passes.layout import dim_order
from graphopt.pipeline import Context, Pipeline
from tests.eager import compare
from tests.graphs import calls, targets

aten = torch.ops.aten
F = nn.functional
Program = Callable[..., object]


def canonical(program: Program, *inputs: object) -> Captured:
    """Captured and canonicalised."""
    captured = capture(program, *inputs)
    canonicalize(captured.gm)
    return captured


def structure(program: Program, *inputs: object) -> str:
    return g.fingerprint(canonical(program, *inputs).gm.graph)


def data(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    if dtype.is_floating_point:
        x = torch.randn(shape).to(dtype)
        if x.numel() > 8:
            x.view(-1)[:6] = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf")])
        return x
    return torch.randint(0, 2 if dtype == torch.bool else 9, shape).to(dtype)


# ------------------------------------------------------------------------------------------ one spelling each

FLOATS = (torch.float32, torch.bfloat16)
X = ((2, 3, 4),)
XX = ((2, 3, 4), (2, 3, 4))
SAME: list[tuple[str, tuple[tuple[int, ...], ...], tuple[torch.dtype, ...], list[Program]]] = [
    ("reshape", X, FLOATS, [
        lambda x: x.reshape(6, 4) + 1, lambda x: x.view(6, 4) + 1, lambda x: x.flatten(0, 1) + 1,
        lambda x: x.view(-1, 4) + 1, lambda x: x.unsqueeze(0).reshape(6, 4) + 1, lambda x: x.view_as(x.new_empty(6, 4)) + 1,
        lambda x: x.view(24).view(6, 4) + 1, lambda x: x.unflatten(1, (3, 1)).squeeze(2).flatten(0, 1) + 1,
    ]),
    ("no reshape", X, FLOATS, [
        lambda x: x + 1, lambda x: x.view(x.shape) + 1, lambda x: x.unsqueeze(1).squeeze(1) + 1,
        lambda x: x.contiguous() + 1, lambda x: x.clone() + 1, lambda x: x.detach() + 1, lambda x: x.expand(2, 3, 4) + 1,
        lambda x: x.expand_as(x) + 1, lambda x: x.to(x.dtype) + 1, lambda x: x.type_as(x) + 1, lambda x: x[:] + 1,
        lambda x: x[..., 0:4] + 1, lambda x: x.transpose(0, 1).transpose(1, 0) + 1, lambda x: x.permute(0, 1, 2) + 1,
        lambda x: F.dropout(x, 0.3, training=False) + 1, lambda x: x * 1 + 1, lambda x: x / 1 + 1, lambda x: x**1 + 1,
        lambda x: x - 0 + 1, lambda x: torch.cat([x], 0) + 1, lambda x: x.reshape(24).reshape(2, 3, 4) + 1,
    ]),
    ("permute", X, FLOATS, [
        lambda x: x.transpose(1, 2) + 1, lambda x: x.transpose(-1, -2) + 1, lambda x: x.mT + 1, lambda x: x.permute(0, 2, 1) + 1,
        lambda x: x.swapaxes(1, 2) + 1, lambda x: x.movedim(1, 2) + 1, lambda x: x.moveaxis(-1, 1) + 1,
        lambda x: x.permute(2, 0, 1).permute(1, 0, 2) + 1, lambda x: x.movedim((1, 2), (2, 1)) + 1,
    ]),
    ("t", ((3, 4),), FLOATS, [lambda x: x.t() + 1, lambda x: x.T + 1, lambda x: x.mT + 1, lambda x: x.transpose(0, 1) + 1]),
    ("expand", ((2, 1, 4),), FLOATS, [
        lambda x: x.expand(2, 3, 4) + 1, lambda x: x.expand(-1, 3, -1) + 1, lambda x: torch.broadcast_to(x, (2, 3, 4)) + 1,
        lambda x: x.expand_as(x.new_empty(2, 3, 4)) + 1,
    ]),
    ("slice", X, FLOATS, [
        lambda x: x[..., :2] + 1, lambda x: x[:, :, :2] + 1, lambda x: x.narrow(-1, 0, 2) + 1, lambda x: x.split(2, -1)[0] + 1,
        lambda x: x.chunk(2, 2)[0] + 1, lambda x: x.split([2, 2], -1)[0] + 1, lambda x: x[..., :-2] + 1,
        lambda x: x.tensor_split(2, -1)[0] + 1, lambda x: x[..., -4:2] + 1,
    ]),
    ("the second half", X, FLOATS, [
        lambda x: x[..., 2:] + 1, lambda x: x[..., -2:] + 1, lambda x: x[..., 2:4] + 1, lambda x: x.chunk(2, -1)[1] + 1,
        lambda x: x.split(2, 2)[-1] + 1, lambda x: x[..., 2:99] + 1, lambda x: x.narrow(2, 2, 2) + 1,
    ]),
    ("select", X, FLOATS, [
        lambda x: x[:, -1] + 1, lambda x: x[:, 2] + 1, lambda x: x.select(1, -1) + 1, lambda x: x.select(-2, 2) + 1,
        lambda x: x.unbind(1)[2] + 1, lambda x: x.unbind(-2)[-1] + 1,
    ]),
    ("cast", X, FLOATS, [
        lambda x: x.double() + 1, lambda x: x.to(torch.float64) + 1, lambda x: x.to(dtype=torch.double) + 1,
        lambda x: x.type(torch.float64) + 1, lambda x: x.to("cpu", torch.float64) + 1, lambda x: x.to(torch.float64, copy=True) + 1,
    ]),
    ("softmax", X, FLOATS, [
        lambda x: F.softmax(x, -1, dtype=torch.float32), lambda x: torch.softmax(x, 2, dtype=torch.float32),
        lambda x: x.float().softmax(dim=-1), lambda x: F.softmax(x.to(torch.float32), dim=2),
    ]),
    ("square", X, (*FLOATS, torch.int64, torch.uint8), [lambda x: x * x, lambda x: x.pow(2), lambda x: x**2, lambda x: x.square()]),
    ("rsqrt", X, FLOATS, [lambda x: x.rsqrt(), lambda x: x.pow(-0.5), lambda x: x**-0.5]),
    ("sqrt", X, FLOATS, [lambda x: x.sqrt(), lambda x: x.pow(0.5), lambda x: x**0.5]),
    ("cube", X, FLOATS, [lambda x: x**3, lambda x: x.pow(3.0)]),
    ("subtract a literal", X, (*FLOATS, torch.int64), [lambda x: x - 3, lambda x: x + -3, lambda x: x.sub(3), lambda x: torch.subtract(x, 3)]),
    ("subtract from a literal", X, FLOATS, [lambda x: 1.0 - x, lambda x: torch.rsub(x, 1.0), lambda x: -x + 1.0]),
    ("subtract", XX, (*FLOATS, torch.int64), [lambda x, y: x - y, lambda x, y: torch.rsub(y, x), lambda x, y: x.add(y, alpha=-1), lambda x, y: x.sub(y)]),
    ("divide", XX, FLOATS, [lambda x, y: x / y, lambda x, y: torch.true_divide(x, y), lambda x, y: x.div(y)]),
    ("multiply", XX, (*FLOATS, torch.int64), [lambda x, y: x * y, lambda x, y: torch.multiply(x, y), lambda x, y: x.mul(y)]),
    ("at most", XX, (*FLOATS, torch.int64), [lambda x, y: x <= y, lambda x, y: y >= x, lambda x, y: torch.ge(y, x), lambda x, y: x.less_equal(y)]),
    ("below", XX, FLOATS, [lambda x, y: x < y, lambda x, y: y > x, lambda x, y: torch.greater(y, x)]),
    ("above a literal", X, FLOATS, [lambda x: x > 0.5, lambda x: torch.gt(x, 0.5), lambda x: x.greater(0.5)]),
    ("and", XX, (torch.bool,), [lambda x, y: x & y, lambda x, y: torch.logical_and(x, y), lambda x, y: x.bitwise_and(y)]),
    ("or", XX, (torch.bool,), [lambda x, y: x | y, lambda x, y: torch.logical_or(x, y), lambda x, y: x.bitwise_or(y)]),
    ("xor", XX, (torch.bool,), [lambda x, y: x ^ y, lambda x, y: torch.logical_xor(x, y)]),
    ("not", X, (torch.bool,), [lambda x: ~x, lambda x: torch.logical_not(x), lambda x: x.bitwise_not()]),
    ("matmul", ((3, 4), (4, 5)), FLOATS, [lambda x, y: x @ y, lambda x, y: torch.mm(x, y), lambda x, y: torch.matmul(x, y)]),
    ("batched matmul", ((2, 3, 4), (2, 4, 5)), FLOATS, [lambda x, y: x @ y, lambda x, y: torch.bmm(x, y)]),
    ("linear", ((3, 4), (4, 5), (5,)), FLOATS, [lambda x, w, b: torch.addmm(b, x, w), lambda x, w, b: F.linear(x, w.t(), b)]),
    ("cat", XX, FLOATS, [lambda x, y: torch.cat([x, y], 2), lambda x, y: torch.concat((x, y), -1), lambda x, y: torch.cat([x.new_empty(0), x, y], -1)]),
    ("mean", X, FLOATS, [lambda x: x.mean(-1, keepdim=True), lambda x: x.mean((2,), True), lambda x: torch.mean(x, dim=[-1], keepdim=True)]),
    ("variance", X, FLOATS, [lambda x: x.var(-1, unbiased=False), lambda x: x.var(2, correction=0), lambda x: torch.var(x, dim=(-1,), unbiased=False)]),
    ("attention", ((1, 2, 3, 4),) * 3, FLOATS, [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v), lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.5),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False),
    ]),
    ("negative dims", X, FLOATS, [lambda x: x.cumsum(1).amax(0), lambda x: x.cumsum(-2).amax(-3)]),
    ("integers plus nothing", X, (torch.int64,), [lambda x: x * 2, lambda x: (x + 0) * 2, lambda x: (x - 0) * 2, lambda x: x * 2 + 0]),
]  # fmt: skip


@pytest.mark.parametrize("row", SAME, ids=lambda row: row[0])
def test_spellings_become_one(row: tuple) -> None:
    """All give the graph of the first, which is a fixed point, and each gives eager's result bit for bit."""
    _, shapes, dtypes, spellings = row
    for dtype in dtypes:
        inputs = tuple(data(shape, dtype) for shape in shapes)
        want = structure(spellings[0], *inputs)
        for i, spelling in enumerate(spellings):
            captured = canonical(spelling, *inputs)
            found = g.fingerprint(captured.gm.graph)
            assert found == want, (
                f"spelling {i}, {dtype}:\n{captured.gm.graph}\nbut the first:\n{canonical(spellings[0], *inputs).gm.graph}"
            )
            canonicalize(captured.gm)
            assert g.fingerprint(captured.gm.graph) == found, f"spelling {i} is not a fixed point"
            compare(spelling, captured, inputs, layout=False)


# ------------------------------------------------------------------------------------- what must stay
# different

DIFFERENT: list[tuple[str, tuple[tuple[int, ...], ...], Program, Program]] = [
    ("division and multiplication", X, lambda x: x / 3.0, lambda x: x * (1 / 3.0)),
    ("adding zero to floats: -0.0 becomes 0.0", X, lambda x: x + 0.0, lambda x: x),
    ("adding the integer zero to floats", X, lambda x: (x + 0) * 2, lambda x: x * 2),
    ("powers", X, lambda x: x**1.5, lambda x: x**2),
    ("a float power of integers", X, lambda x: (x > 0).long() ** 2.0, lambda x: (x > 0).long() ** 2),
    ("matmul operands", ((3, 3), (3, 3)), lambda x, y: x @ y, lambda x, y: y @ x),
    ("difference operands", XX, lambda x, y: x - y, lambda x, y: y - x),
    ("alpha of floats is one rounding", XX, lambda x, y: torch.add(x, y, alpha=0.1), lambda x, y: x + 0.1 * y),
    ("permutations", X, lambda x: x.permute(1, 2, 0) + 0.0, lambda x: x.permute(2, 0, 1) + 0.0),
    ("softmax dims", X, lambda x: x.softmax(-1), lambda x: x.softmax(-2)),
    ("a cast there and back", X, lambda x: x.half().float(), lambda x: x.clone()),
    ("biased and unbiased variance", X, lambda x: x.var(-1), lambda x: x.var(-1, unbiased=False)),
    ("booleans and integers", X, lambda x: (x > 0) & (x < 1), lambda x: (x > 0).long() & (x < 1).long()),
    ("steps", X, lambda x: x[..., ::2] * 2, lambda x: x[..., :2] * 2),
    ("causal attention", ((1, 2, 3, 4),), lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
     lambda q: F.scaled_dot_product_attention(q, q, q)),
]  # fmt: skip


@pytest.mark.parametrize("row", DIFFERENT, ids=lambda row: row[0])
def test_what_differs_stays_different(row: tuple) -> None:
    _, shapes, one, other = row
    inputs = tuple(data(shape, torch.float32) for shape in shapes)
    assert structure(one, *inputs) != structure(other, *inputs)
    compare(one, canonical(one, *inputs), inputs, layout=False)
    compare(other, canonical(other, *inputs), inputs, layout=False)


@pytest.mark.parametrize(
    ("program", "target", "count"),
    [
        (lambda x: torch.zeros(3).fill_(1) + torch.zeros(3) + x[0, 0, :3], aten.zeros.default, 2),
        (lambda x: torch.rand(4) + torch.rand(4) + x, aten.rand.default, 2),
        (lambda x: F.dropout(x) + F.dropout(x), aten.dropout.default, 2),
        (lambda x: torch.arange(4) + torch.arange(4) + x, aten.arange.default, 1),
        (lambda x: x.exp() + x.exp(), aten.exp.default, 1),
        (lambda x: (x * 2).exp() + (x * 2.0).exp(), aten.exp.default, 2),  # 2 and 2.0 are two literals
        (lambda x: (x * 0.0).exp() + (x * -0.0).exp(), aten.exp.default, 2),  # and so are zeros of two signs
        (lambda x: torch.rand_like(x) * 0 + x, aten.rand_like.default, 1),  # moves the generator on
        (lambda x: (torch.rand(4), x)[1] + 1, aten.rand.default, 1),
        (lambda x: (x.exp(), x)[1] + 1, aten.exp.default, 0),
    ],
)
def test_what_is_merged_and_dropped(program: Program, target: object, count: int) -> None:
    x = data((2, 3, 4), torch.float32)
    captured = canonical(program, x)
    assert len(calls(captured.gm, target)) == count
    compare(program, captured, (x,), layout=False)


def test_an_empty_tensor_in_a_cat_counts_where_it_decides_the_dtype() -> None:
    x = data((3,), torch.bfloat16)
    program = lambda a: torch.cat([torch.empty(0), a]) * 2
    compare(program, canonical(program, x), (x,), layout=False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool], ids=str)
def test_integers_and_booleans(dtype: torch.dtype) -> None:
    x = data((3, 4), dtype)
    programs: list[Program] = [
        lambda a: a * a,
        lambda a: a / 2,
        lambda a: a * 1.0,
        lambda a: a + 1,
        lambda a: a**2,
        lambda a: a / 1,
    ]
    if dtype != torch.bool:
        programs += [
            lambda a: a - 3,
            lambda a: 3 - a,
            lambda a: torch.add(a, a, alpha=3),
            lambda a: torch.sub(a, a, alpha=2),
        ]
    for program in programs:
        compare(program, canonical(program, x), (x,), layout=False)


# -------------------------------------------------------------------------------------------- symbolic sizes


def with_symbols(program: Program, *shapes: tuple[object, ...]) -> fx.GraphModule:
    """The canonical graph of a program on fakes; a size given as a name is symbolic."""
    mode = torch_private.new_fake_mode(symbolic=True)
    names = sorted({s for shape in shapes for s in shape if isinstance(s, str)})
    sizes = {n: torch_private.symbolic_int(mode, n, 5 + 2 * i) for i, n in enumerate(names)}
    with mode:
        inputs = [torch.empty([sizes.get(s, s) for s in shape]) for shape in shapes]  # type: ignore[call-overload]
    return canonical(program, *inputs).gm


def test_one_node_for_each_size() -> None:
    def program(x, y):
        a = x.view(x.shape[0] * 4, -1)
        b = y.reshape(y.shape[0] * 4, x.shape[1] // 4)
        return a, b, x.shape[0] * 4, (x + y).view(x.size(0), 2, -1)

    gm = with_symbols(program, ("n", 8), ("n", 8))
    sizes = [g.expression(g.val(n)) for n in gm.graph.nodes if isinstance(g.val(n), torch.SymInt)]
    assert sizes and len(sizes) == len(set(sizes)), gm.graph
    x, y = torch.randn(5, 8), torch.randn(5, 8)
    for got, want in zip(gm(x, y), program(x, y), strict=True):
        assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


@pytest.mark.parametrize(
    "program",
    [
        lambda x: x[1:] * 2, lambda x: x[:-1] * 2, lambda x: x[-2:] * 2, lambda x: x[:-3, 1:] * 2, lambda x: x[-1] * 2,
        lambda x: x[:] * 2, lambda x: x[::2] * 2, lambda x: x[: x.shape[0] // 2] * 2, lambda x: x[x.shape[0] // 2 :] * 2,
        lambda x: x.narrow(0, 1, x.shape[0] - 2) * 2, lambda x: x.chunk(2, 1)[1] * 2, lambda x: x.transpose(0, 1)[:, -1] * 2,
        lambda x: torch.cat([x, x]).view(2, -1, 4) * 2, lambda x: x.unsqueeze(1).expand(-1, 3, -1).flatten(0, 1) * 2,
        lambda x: x.repeat_interleave(2, 0) * 2, lambda x: x.new_zeros(x.shape[0] + 1, 2), lambda x: x.view(-1)[x.shape[0] :] * 2,
    ],
)  # fmt: skip
def test_bounds_of_symbolic_sizes(program: Program) -> None:
    """One graph, right for other sizes than the example's."""
    gm = with_symbols(program, ("n", 4))
    for n in (5, 8, 11):
        x = torch.randn(n, 4)
        (got,) = gm(x) if isinstance(gm(x), (tuple, list)) else (gm(x),)
        assert torch.equal(got, program(x)), gm.graph


def test_a_size_is_literal_where_it_is_known() -> None:
    gm = with_symbols(lambda x: x.view(-1, x.shape[1] * 1), ("n", 8))
    (n,) = calls(gm, aten.reshape.default) or [None]
    assert n is None or n.args[1][1] == 8


# ---------------------------------------------------------------------------------------------- the whole
# form


def test_arguments_are_filled_in_by_schema() -> None:
    gm = canonical(lambda x: F.gelu(F.layer_norm(x, (4,))).sum(), data((2, 3, 4), torch.float32)).gm
    (norm,), (gelu,) = calls(gm, aten.layer_norm.default), calls(gm, aten.gelu.default)
    assert norm.args[1:] == ([4], None, None, 1e-05, True) and gelu.kwargs == {"approximate": "none"}


def test_no_layout_call_is_left() -> None:
    def program(x):
        y = x.contiguous().detach().clone().transpose(0, 1).contiguous()
        return (y.alias() if hasattr(y, "alias") else y) * 2

    gm = canonical(program, data((2, 3, 4), torch.float32)).gm
    assert targets(gm) == [aten.permute.default, aten.mul.Tensor]
    assert gm.meta["output_strides"] == ((0, 1, 2),)


def test_layout_stays_where_strides_are_read() -> None:
    def program(x):
        return x.t().contiguous().view(torch.int32).clone(), x.t().contiguous() * 2

    x = data((3, 4), torch.float32)
    captured = canonical(program, x)
    assert calls(captured.gm, aten.contiguous.default)
    compare(program, captured, (x,), layout=False)


STRIDED = [
    ((3, 4), (4, 1), None),  # the tensor itself
    ((4, 3), (1, 4), 0),  # its transpose
    ((2, 3), (4, 1), 1),
    ((5, 4), (2, 1), None),  # rows that overlap
    ((5, 4), (1, 2), 1),
    ((2, 3, 2), (4, 1, 2), None),
    ((3, 2, 4), (4, 0, 1), None),  # one that is repeated
    ((1, 3), (7, 5), 1),
    ((2,), (0,), 11),
    ((), (), 5),
]


@pytest.mark.parametrize(("sizes", "strides", "offset"), STRIDED)
@pytest.mark.parametrize("layout", [lambda x: x * 2, lambda x: (x * 2).t().contiguous(), lambda x: x.t() * 2])
def test_memory_is_read_as_eager_lays_it_out(
    sizes: tuple[int, ...], strides: tuple[int, ...], offset: int | None, layout: Callable
) -> None:
    def program(x):
        return layout(x).as_strided(sizes, strides, offset) + 1

    x = data((3, 4), torch.float32)
    captured = canonical(program, x)
    assert not calls(captured.gm, aten.as_strided.default) and not calls(captured.gm, aten.contiguous.default)
    compare(program, captured, (x,), layout=False)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (lambda x: x[:, :3].as_strided((2, 2), (4, 1)) * 2, r"strides \(4, 1\) and shape \(3, 3\)"),
        (lambda x: x.as_strided((2, 2), (1, 1), 0) * 2, "another call may pass a view that starts elsewhere"),
        (lambda x: x[:2].as_strided((3, 4), (4, 1)) * 2, "reads elements 0 to 11 of a tensor that has 8"),
        (
            lambda x: (x * 2)[1:].as_strided((2, 4), (4, 1), 0) * 2,
            "reads elements -4 to 3 of a tensor that has 8",
        ),
    ],
)
def test_memory_outside_of_the_tensor_is_refused(program: Callable, said: str) -> None:
    with pytest.raises(CaptureRefused, match=said):
        canonical(program, data((3, 4), torch.float32))


@pytest.mark.parametrize(
    ("value", "order"),
    [
        (torch.empty(2, 3, 4), (0, 1, 2)),
        (torch.empty(2, 3, 4).permute(2, 0, 1), (1, 2, 0)),
        (torch.empty(2, 3, 4)[:, ::2], None),
        (torch.empty(2, 1, 4).expand(2, 3, 4), None),
        (torch.empty(()), ()),
        (3, None),
    ],
)
def test_order_of_dimensions(value: object, order: tuple[int, ...] | None) -> None:
    assert dim_order(value) == order


def test_every_node_has_a_value_and_a_name() -> None:
    gm = canonical(lambda x: x.split(2, -1)[1].float().mean(-1) + 1, data((2, 3, 4), torch.bfloat16)).gm
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert [g.val(n) is not None for n in nodes] == [True] * len(nodes)
    for node in nodes:
        value = node.target(
            *fx.node.map_arg(node.args, g.val), **node.kwargs
        )  # the recorded value is the real one
        assert value.shape == g.val(node).shape and value.dtype == g.val(node).dtype


def test_the_pass_says_what_it_is() -> None:
    step = Canonicalize()
    assert step.exactness == "bitwise" and "canonical" in step.provides and step == Canonicalize()
    program, x = (lambda a: a.contiguous() * a), data((3, 4), torch.float32)
    captured = capture(program, x)
    done, _ = Pipeline((step,)).run(captured, Context())
    assert targets(done.gm) == [aten.pow.Tensor_Scalar] and targets(captured.gm) != targets(done.gm)
