"""Every door gives one kind of graph: weights named and bound at each call, provenance on every node."""

import copy

import pytest
import torch
from torch import fx, nn

from graphopt import graph as g
from graphopt import torch_private
from graphopt.aliasing import writes
from graphopt.capture import Captured, capture, from_dynamo
from graphopt.errors import CaptureRefused, WeightError
from graphopt.passes.canonicalize import canonicalize
from tests.eager import as_eager, falls_back

aten = torch.ops.aten


class Block(nn.Module):
    """A little of everything: tied weights, a constant buffer, a written buffer, a plain tensor attribute."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width, bias=False)])
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(width))
        self.register_buffer("table", torch.rand(width), persistent=False)
        self.register_buffer("count", torch.zeros(width))
        self.plain = torch.rand(width)

    def forward(self, ids: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        h = self.embed(ids) * self.scale + self.table + self.plain
        for layer in self.layers:
            h = torch.relu(layer(h))
        self.count.add_(h.sum((0, 1)))
        h = h + self.count
        return self.head(h if bias is None else h + bias)


def ids(batch: int = 2, length: int = 3) -> torch.Tensor:
    return torch.arange(batch * length).reshape(batch, length) % 11


def by_dynamo(model: object, *args: object, dynamic: bool | None = None, **kwargs: object) -> Captured:
    """What `from_dynamo` gives for the first graph of a model."""
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, examples: list[object]) -> object:
        found.append(from_dynamo(gm, examples))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)  # type: ignore[call-overload]
    return found[0]


def weights(captured: Captured) -> dict[tuple[str, ...], fx.Node]:
    return {g.weight_names(n): n for n in g.placeholders(captured.gm.graph) if g.is_weight(n)}


def kinds(captured: Captured) -> list[object]:
    """The calls, without what only some doors record."""
    canonicalize(captured.gm)
    return [n.target for n in captured.gm.graph.nodes if n.op == "call_function"]


def same(got: object, want: torch.Tensor) -> None:
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------- the doors


def test_all_doors_give_one_graph() -> None:
    model = Block().eval()
    doors = [
        by_dynamo(model, ids()),
        by_dynamo(model, ids(), dynamic=False),
        capture(torch.export.export(model, (ids(),), strict=False)),
        capture(torch.export.export(model, (ids(),), strict=False).run_decompositions({})),
        capture(model, ids()),
    ]
    first, *others = [kinds(door) for door in doors]
    assert first.count(aten.linear.default) == 3 and first[-1] is aten.copy_.default
    assert [o == first for o in others[:1] + others[3:]] == [True, True]
    assert others[1] == first


@pytest.mark.parametrize("dynamic", [None, True])
def test_dynamo_names(dynamic: bool | None) -> None:
    captured = by_dynamo(Block(), ids(), dynamic=dynamic)
    names = {name for group in weights(captured) for name in group}
    assert names == {"embed.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "scale", "table"}
    tensors = [
        n for n in g.placeholders(captured.gm.graph) if g.is_tensor(n) and g.rank(n)
    ]  # no lifted floats
    inputs = [n for n in tensors if not g.is_weight(n)]
    assert len(inputs) == 3  # ids, the written buffer and the plain attribute


def test_compiled_twice_over_names_lose_orig_mod() -> None:
    inner = Block()
    inner.layers[0] = torch.compile(inner.layers[0], backend="eager")
    captured = by_dynamo(nn.Sequential(inner), ids())
    names = [name for group in weights(captured) for name in group]
    assert "0.layers.0.weight" in names and not any("_orig_mod" in name for name in names)
    assert not any("_orig_mod" in g.module_path(n) for n in captured.gm.graph.nodes)


def test_tied_weights_have_all_names() -> None:
    found = weights(capture(Block(), ids()))
    assert ("embed.weight", "head.weight") in found
    assert found["embed.weight", "head.weight"].name == "embed_weight"
    assert len(found["embed.weight", "head.weight"].users) == 2


def test_mark_dynamic_marks_one_size() -> None:
    x = torch.randn(4, 6)
    torch._dynamo.mark_dynamic(x, 0)
    captured = by_dynamo(nn.Linear(6, 5), x)
    (linear,) = [n for n in captured.gm.graph.nodes if n.target is aten.linear.default]
    assert isinstance(g.shape(linear)[0], torch.SymInt) and g.shape(linear)[1] == 5


def test_everything_is_symbolic_under_dynamic() -> None:
    captured = by_dynamo(lambda x: x * x.shape[0], torch.randn(4, 6), dynamic=True)
    (mul,) = [n for n in captured.gm.graph.nodes if n.target is aten.mul.Tensor]
    assert all(isinstance(s, torch.SymInt) for s in g.shape(mul))


def test_exported_with_dynamic_shapes() -> None:
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        nn.Linear(6, 5), (torch.randn(4, 6),), dynamic_shapes=({0: batch},), strict=False
    )
    captured = capture(program)
    for n in (2, 7):
        x = torch.randn(n, 6)
        same(captured(x), program.module()(x))
    assert any(
        isinstance(g.val(n), torch.Tensor) and isinstance(g.shape(n)[0], torch.SymInt)
        for n in captured.gm.graph.nodes
    )


@pytest.mark.parametrize("functionalised", [False, True])
def test_an_exported_program_writes_its_buffers_and_inputs(functionalised: bool) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(x)
            x.mul_(2)
            return x + self.seen

    model = Counter()
    program = torch.export.export(model, (torch.ones(3),), strict=False)
    captured = capture(program.run_decompositions({}) if functionalised else program)
    assert not weights(captured) and any(writes(n) for n in captured.gm.graph.nodes)
    x = torch.tensor([1.0, 2.0, 3.0])
    same(captured(x), torch.tensor([3.0, 6.0, 9.0]))
    same(captured(x), torch.tensor([7.0, 14.0, 21.0]))
    same(x, torch.tensor([4.0, 8.0, 12.0]))


def test_a_module_gives_its_results_and_takes_keywords() -> None:
    model, bias = Block().eval(), torch.randn(8)
    captured = capture(model, ids(), bias=bias)
    other = copy.deepcopy(model)
    same(captured(ids(), bias=bias + 1), other(ids(), bias=bias + 1))
    same(model.count, other.count)
    with pytest.raises(CaptureRefused, match="called with arguments of structure"):
        captured(ids())


def test_keywords_may_come_in_any_order() -> None:
    def program(*, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a - b

    one, two = torch.tensor([5.0]), torch.tensor([3.0])
    same(capture(program, a=one, b=two)(b=two, a=one), one - two)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_module_without_bytes_is_captured_and_loaded_later(kind: str) -> None:
    if kind == "meta":
        with torch.device("meta"):
            model, example = Block(), torch.zeros(2, 3, dtype=torch.long)
    else:
        with torch_private.new_fake_mode():
            model, example = Block(), torch.zeros(2, 3, dtype=torch.long)
    captured = capture(model, example)
    real = Block()
    assert weights(captured).keys() == weights(capture(real, ids())).keys()
    linear = [n for n in captured.gm.graph.nodes if n.target is aten.linear.default]
    assert [tuple(g.shape(n)) for n in linear] == [(2, 3, 8), (2, 3, 8), (2, 3, 11)]


def test_a_meta_model_runs_once_its_weights_are_there() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    captured = capture(model, torch.empty(2, 4, device="meta"))
    real = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    model.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(2, 4)
    same(captured(x), real(x))


def test_a_function_of_nested_arguments() -> None:
    def program(pair: tuple[torch.Tensor, dict[str, torch.Tensor]], factor: float) -> dict[str, object]:
        x, rest = pair
        return {"sum": x + rest["y"], "list": [x * factor, None, 3]}

    x, y = torch.randn(2), torch.randn(2)
    captured = capture(program, (x, {"y": y}), 2.0)
    got = captured((y, {"y": y}), 2.0)
    same(got["sum"], y + y)
    assert got["list"][1:] == [None, 3] and not weights(captured)


def test_a_function_that_enters_modes() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.inference_mode():
            return x @ x

    captured = capture(program, torch.eye(2))
    assert [n.target for n in captured.gm.graph.nodes if n.op == "call_function"] == [aten.matmul.default]


# -------------------------------------------------------------------------------------- bound at each call


def test_changed_and_replaced_weights_are_seen() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    captured = capture(model, x)
    with torch.no_grad():
        model.weight.mul_(3)
    same(captured(x), model(x))
    model.weight = nn.Parameter(torch.randn(2, 3))
    model.bias = nn.Parameter(torch.randn(2))
    same(captured(x), model(x))
    model.load_state_dict(nn.Linear(3, 2).state_dict())
    same(captured(x), model(x))


def test_replaced_buffers_and_attributes_are_seen() -> None:
    model = Block().eval()
    captured = capture(model, ids())
    model.count, model.scale, model.table, model.plain = (
        torch.ones(8),
        torch.rand(8),
        torch.rand(8),
        torch.rand(8),
    )
    other = copy.deepcopy(model)
    same(captured(ids()), other(ids()))
    same(model.count, other.count)


def test_a_weight_that_is_gone_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    captured = capture(model, torch.randn(1, 3))
    del model[0].weight
    with pytest.raises(
        WeightError, match=r"weight '0.weight' is gone from the model; capture the model again"
    ):
        captured(torch.randn(1, 3))


def test_the_graph_owns_no_weight() -> None:
    captured = capture(Block(), ids())
    assert not list(captured.gm.parameters()) and not list(captured.gm.buffers())
    assert not [n for n in captured.gm.graph.nodes if n.op == "get_attr"]


def test_a_buffer_that_is_written_is_an_input_through_any_view() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("direct", "through_a_view", "with_out", "assigned", "read", "by_name"):
                self.register_buffer(name, torch.zeros(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.direct.add_(x)
            self.through_a_view.t()[1:].mul_(2)
            torch.add(x, 1, out=self.with_out)
            self.assigned[0] = x[1]
            torch.clamp_(self.by_name, 0, 1)
            return x + self.read.t_().t_() if False else x + self.read

    for captured in (capture(Model(), torch.ones(2, 3)), by_dynamo(Model(), torch.ones(2, 3))):
        assert [names for names in weights(captured)] == [("read",)]


# ---------------------------------------------------------------------------------------------- provenance


@pytest.mark.parametrize("door", [by_dynamo, capture])
def test_module_path_and_source_line_on_nearly_every_call(door) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x).view(-1, 4)
            return x

    captured = door(Net(), torch.randn(2, 4))
    nodes = [n for n in captured.gm.graph.nodes if n.op == "call_function"]
    without = [n for n in nodes if not g.source(n)]
    assert len(without) <= 1, without
    assert [g.module_path(n) for n in nodes if n.target is aten.linear.default] == [
        f"blocks.{i}.0" for i in range(3)
    ]
    gelu = next(n for n in nodes if n.target is aten.gelu.default)
    assert g.module_path(gelu) == "blocks.0.1" and ".py:" in g.source(gelu)
    add = next(n for n in nodes if n.target is aten.add.Tensor)
    assert g.module_path(add) == "" and "x = x + block(x).view(-1, 4)" in g.source(add)


def test_canonical_nodes_keep_provenance() -> None:
    captured = capture(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), torch.randn(2, 4))
    canonicalize(captured.gm)
    nodes = [n for n in captured.gm.graph.nodes if n.op == "call_function"]
    assert [g.module_path(n) for n in nodes] == ["0", "1"] and all(g.source(n) for n in nodes)


# ------------------------------------------------------------------------------------------------- refusals


def conditional(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,))


def autocast_inside(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.nn.functional.bilinear(x, x, x.expand(2, 4, 4))


def branches(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.sum() > 0 else x - 1


class AsModule(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.function(*args)


@pytest.mark.parametrize("wrap", [lambda f: f, AsModule], ids=["function", "module"])
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (conditional, "higher-order operator 'cond' is not supported"),
        (autocast_inside, r"kernel of aten._trilinear.default; convert the model with model.to\(dtype\)"),
        (branches, r"torch.export cannot trace it|tracing failed"),
        (lambda x: torch.complex(x, x).conj().imag, "complex64, which no pass understands"),
        (lambda x: torch.fft.fft(x), r"an output \(.*\) has dtype torch.complex64"),
        (lambda x: x.to_sparse().to_dense(), "sparse|tracing failed|cannot trace"),
    ],
)  # fmt: skip
def test_refused_with_the_reason(program, reason: str, wrap) -> None:
    with pytest.raises(CaptureRefused, match=reason) as error:
        capture(wrap(program), torch.eye(4))
    assert error.value.reason and "\n" not in error.value.reason


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.eye(3).to_sparse(), "an input has layout torch.sparse_coo; only torch.strided is supported"),
        (torch._empty_affine_quantized((3, 3), scale=0.1, dtype=torch.qint8), "quantized dtype torch.qint8"),
        (
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "tensor subclass, NestedTensor",
        ),
    ],
)
def test_refused_inputs(value: torch.Tensor, reason: str) -> None:
    with pytest.raises(CaptureRefused, match=reason):
        capture(lambda x: x * 2, value)


def test_flex_attention_is_refused() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 2, 16, 16)
    with pytest.raises(CaptureRefused, match=r"flex_attention|cannot trace"):
        capture(AsModule(flex_attention), q, q, q)


def scanned(x: torch.Tensor) -> torch.Tensor:
    """A sum of pairs that is vmapped over the rows, as generic scans do."""
    return torch.vmap(lambda a, b: (a + b) * a.sum(-1, keepdim=True), (0, None), 1)(x[:, ::2], x[0, 1::2])


def vmapped_twice(x: torch.Tensor) -> torch.Tensor:
    inner = torch.vmap(lambda a, b: a * b + 1, (None, 0))
    return torch.vmap(inner, (0, None))(x, x).sum(-1) + x


def vmapped_and_written(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    torch.vmap(lambda row: row.mul_(2))(y)
    return y + x


@pytest.mark.parametrize("program", [scanned, vmapped_twice, vmapped_and_written])
@pytest.mark.parametrize("dynamic", [None, True])
def test_what_vmap_batches_becomes_operators(program, dynamic: bool | None) -> None:
    as_eager(program, torch.randn(4, 4), dynamic=dynamic, strict=False)


def test_vmap_behind_the_door_of_export() -> None:
    x = torch.randn(4, 4)
    exported = torch.export.export(AsModule(vmapped_twice), (x,))
    assert torch.equal(capture(exported)(x), vmapped_twice(x))


@pytest.mark.parametrize("program", [scanned, vmapped_twice])
def test_what_vmap_batches_keeps_its_provenance(program) -> None:
    dynamo = by_dynamo(program, torch.randn(4, 4))
    calls = [n for n in dynamo.gm.graph.nodes if n.op == "call_function"]
    assert not any("vmap" in str(n.target) or "batch_dim" in str(n.target) for n in calls)
    assert all("test_capture.py" in g.source(n) for n in calls)


def test_vmap_under_autocast() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda a: torch.softmax(a @ a, -1))(x)

    with torch.autocast("cpu", torch.bfloat16):
        as_eager(program, torch.randn(2, 4, 4), strict=False)


def test_a_vmap_that_fails_leaves_no_level_open() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda a: torch.complex(a, a).conj())(x).abs()

    falls_back(program, torch.randn(3, 2), why="complex64")
    assert torch.equal(torch.vmap(lambda a: a + 1)(torch.zeros(2)), torch.ones(2))


def test_derivatives_are_refused_by_name() -> None:
    falls_back(
        torch.func.grad(lambda x: (x * x).sum()), torch.randn(3), why="a derivative is taken (torch.func.grad"
    )


def test_batch_norm_in_training_mode_is_refused() -> None:
    with pytest.raises(CaptureRefused, match=r"updates its running statistics; call model.eval\(\)"):
        capture(nn.BatchNorm1d(4).train(), torch.randn(3, 4))
    capture(nn.BatchNorm1d(4).eval(), torch.randn(3, 4))


def test_a_tensor_that_the_tracer_loses_is_refused() -> None:
    with pytest.raises(CaptureRefused):
        capture(lambda x: torch.tensor(x.tolist()) + x, torch.ones(2))
