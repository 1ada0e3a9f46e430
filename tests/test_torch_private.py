"""Each private API of torch that we reach does what we need of it: the first file to fail on a new torch."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from graphopt import torch_private as p

aten = torch.ops.aten


def in_backend(
    function, *args: object, dynamic: bool | None = None, look=lambda gm, examples: None
) -> list[object]:
    """What `look` returns inside a Dynamo backend, for each graph."""
    seen: list[object] = []

    def backend(gm: fx.GraphModule, examples: list[object]) -> object:
        seen.append(look(gm, examples))
        return gm.forward

    torch.compiler.reset()
    torch.compile(function, backend=backend, dynamic=dynamic)(*args)  # type: ignore[call-overload]
    return seen


def test_fake_modes() -> None:
    plain, symbolic = p.new_fake_mode(), p.new_fake_mode(symbolic=True)
    with plain:
        fake = torch.empty(2, 3)
    assert isinstance(fake, p.FakeTensor) and plain.shape_env is None and symbolic.shape_env is not None
    assert p.fake_mode_of([3, torch.ones(2), fake]) is plain and p.fake_mode_of([torch.ones(2)]) is None
    assert isinstance(torch.ones(2, 3) + fake, p.FakeTensor)  # real tensors may join in


def test_faked() -> None:
    mode, base = p.new_fake_mode(), torch.randn(4, 3)
    with mode:
        known = torch.empty(1)
    a, b, c, number = p.faked([base, base.t(), known, 7], mode)
    assert isinstance(a, p.FakeTensor) and b.stride() == (1, 3) and c is known and number == 7
    assert a.untyped_storage()._cdata == b.untyped_storage()._cdata


def test_fake_like() -> None:
    with p.new_fake_mode() as mode:
        x = torch.empty(4, 6, dtype=torch.bfloat16)[:, 1:3].t()
    y = p.fake_like(x)
    assert isinstance(y, p.FakeTensor) and y.fake_mode is mode
    assert (y.shape, y.stride(), y.dtype, y.device) == (x.shape, x.stride(), x.dtype, x.device)
    assert y.untyped_storage()._cdata != x.untyped_storage()._cdata


def test_symbolic_numbers() -> None:
    mode = p.new_fake_mode(symbolic=True)
    one, same, other = (
        p.symbolic_int(mode, "a", 1),
        p.symbolic_int(mode, "b", 4),
        p.symbolic_int(mode, "c", 4),
    )
    assert all(isinstance(s, torch.SymInt) for s in (one, same, other))
    assert same.node.expr != other.node.expr and one.node.expr.free_symbols  # neither duck-shaped nor special
    eps = p.symbolic_float(mode, "eps", 1e-5)
    assert isinstance(eps, torch.SymFloat) and p.hint(eps) == 1e-5 and p.hint(same) == 4
    with pytest.raises(AssertionError, match="symbolic=True"):
        p.symbolic_int(p.new_fake_mode(), "a", 4)


def test_equalities_and_expressions() -> None:
    mode = p.new_fake_mode(symbolic=True)
    a, b = p.symbolic_int(mode, "a", 4), p.symbolic_int(mode, "b", 4)
    assert p.equalities(mode) == () and p.equalities(p.new_fake_mode()) == ()
    assert p.learn_equal(a, b) and p.learn_equal(3, 3) and not p.learn_equal(3, 4)
    assert len(p.equalities(mode)) == 1
    assert a.node.expr == b.node.expr


def test_specialise() -> None:
    mode = p.new_fake_mode(symbolic=True)
    eps = p.symbolic_float(mode, "eps", 0.5)
    p.specialise(eps, 0.5)
    assert len(p.equalities(mode)) == 1
    with pytest.raises(RuntimeError, match=r"is 0.5, not 0.25"):
        p.specialise(eps, 0.25)


def test_no_dispatch_of() -> None:
    mode = p.new_fake_mode(symbolic=True)
    size = p.symbolic_int(mode, "a", 4)
    with p.no_dispatch_of(mode):
        assert isinstance(torch.empty(size), p.FakeTensor)
        assert bool(size == 4)
    assert p.equalities(mode) == ()
    with p.no_dispatch_of(p.new_fake_mode()):
        assert isinstance(torch.empty(2), p.FakeTensor)


def test_trace_is_pre_dispatch_and_without_gradients() -> None:
    mode = p.new_fake_mode()
    weight = nn.Parameter(torch.randn(3, 4))
    fakes = p.faked([torch.randn(2, 4), weight], mode)

    def program(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        w.add_(1)  # into a leaf that requires grad
        return nn.functional.silu(nn.functional.linear(x, w))

    gm = p.trace(program, fakes, mode)
    called = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert called == [aten.add_.Tensor, aten.linear.default, aten.silu.default]
    assert all(isinstance(n.meta["val"], p.FakeTensor) for n in gm.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("name", ["dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"])
def test_a_dropout_that_drops_nothing_is_its_argument(name: str) -> None:
    """As in eager; torch's own Python kernel of `aten.dropout` clones."""
    op, mode = getattr(aten, name).default, p.new_fake_mode()
    x = torch.randn(2, 3)
    assert op(x, 0.1, False).data_ptr() == op(x, 0.0, True).data_ptr() == x.data_ptr()
    fakes = p.faked([x], mode)
    gm = p.trace(lambda x: (op(x, 0.1, False), op(x, 0.0, True), op(x, 0.1, True)), fakes, mode)
    *_, output = gm.graph.nodes
    idle, never, on = output.args[0]
    assert idle is never and idle.op == "placeholder" and on.target is op


def test_trace_inside_a_backend_keeps_apart() -> None:
    """A pattern may be traced while Dynamo compiles a model: two fake modes at once."""

    def look(gm: fx.GraphModule, examples: list[object]) -> int:
        mode = p.new_fake_mode()
        return len(p.trace(lambda x: x * 2, p.faked([torch.ones(3)], mode), mode).graph.nodes)

    assert in_backend(lambda x: x + 1, torch.ones(3), look=look) == [3]


@pytest.mark.parametrize("dynamic", [False, True])
def test_backend_fakes(dynamic: bool) -> None:
    def look(gm: fx.GraphModule, examples: list[object]) -> tuple[object, ...]:
        mode, fakes = p.backend_fakes(examples)
        tensors = [f for f in fakes if isinstance(f, torch.Tensor)]
        assert all(f.fake_mode is mode for f in tensors) and len(fakes) == len(examples)
        gm = p.trace(lambda *values: fx.Interpreter(gm).run(*values), fakes, mode)  # lifted floats survive it
        return tuple(type(s) for f in tensors for s in f.shape if f.dim() == 2)

    found = in_backend(lambda x, eps: x * eps, torch.randn(3, 4), 0.25, dynamic=dynamic, look=look)
    assert found == [(torch.SymInt,) * 2 if dynamic else (int, int)]


def test_dynamo_source() -> None:
    def look(gm: fx.GraphModule, examples: list[object]) -> list[str]:
        return [p.dynamo_source(n) for n in gm.graph.nodes if n.op == "placeholder"]

    (sources,) = in_backend(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2), look=look)
    assert any("_modules['0']" in s and s.endswith("_parameters['weight']") for s in sources), sources
    graph = fx.Graph()
    assert p.dynamo_source(graph.placeholder("x")) == ""


def test_kinds_of_targets_and_values() -> None:
    assert p.is_higher_order(torch.ops.higher_order.cond) and not p.is_higher_order(aten.add.Tensor)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert p.is_traceable_subclass(nested) and not p.is_traceable_subclass(torch.ones(2))
    assert not p.is_traceable_subclass(nn.Parameter(torch.ones(2))) and not p.is_traceable_subclass(3)
    assert isinstance(aten.add.Tensor, p.OpOverload) and not isinstance(aten.add, p.OpOverload)


def test_trees() -> None:
    flat, spec = p.tree_flatten(((1, [2, None]), {"a": 3}))
    assert isinstance(spec, p.TreeSpec) and p.tree_unflatten([x for x in flat], spec) == (
        (1, [2, None]),
        {"a": 3},
    )


def test_recompile_limit_reached() -> None:
    messages: list[str] = []

    def backend(gm: fx.GraphModule, examples: list[object]) -> object:
        messages.append(p.recompile_limit_reached())
        return gm.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in (2, 3, 4):
            compiled(torch.ones(n))
    assert [bool(m) for m in messages] == [False, True] and "compilation 2 of 2" in messages[1]
    assert p.recompile_limit_reached() == ""


def test_outputs_need_gradients() -> None:
    look = lambda gm, examples: p.outputs_need_gradients(gm)
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    with torch.no_grad():
        assert in_backend(model, x, look=look) == [False]
    assert in_backend(model, x, look=look) == [True]
    assert in_backend(lambda y: y + 1, x, look=look) == [False]


def test_inductor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends import registry

    monkeypatch.setattr(registry, "lookup_backend", lambda name: lambda gm, examples: (name, gm, examples))
    gm = fx.symbolic_trace(nn.ReLU())
    assert p.inductor(gm, (1,)) == ("inductor", gm, [1])


def test_trace_artifact() -> None:
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    logger, keep = logging.getLogger("torch.__trace"), Keep(logging.DEBUG)
    level = logger.level
    logger.addHandler(keep)
    logger.setLevel(logging.DEBUG)
    try:
        p.trace_artifact("graphopt_listing", "x = add(y)")
    finally:
        logger.removeHandler(keep)
        logger.setLevel(level)
    assert any("graphopt_listing" in json.dumps(getattr(r, "metadata", {}), default=str) for r in records)


def test_steers_dynamo() -> None:
    exceptions = torch._dynamo.exc
    assert p.steers_dynamo(exceptions.SkipFrame("")) and p.steers_dynamo(exceptions.RestartAnalysis())
    failed = exceptions.BackendCompilerFailed.__new__(
        exceptions.BackendCompilerFailed
    )  # made differently by version
    assert not p.steers_dynamo(ValueError("")) and not p.steers_dynamo(failed)


def test_lazy_modules_make_their_code_when_it_is_needed() -> None:
    graph = fx.symbolic_trace(nn.ReLU()).graph
    gm = p.lazy_module(nn.Module(), graph)
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(gm(x), x.relu())
    with graph.inserting_before(next(n for n in graph.nodes if n.op == "output")) as _:
        last = graph.call_function(torch.neg, (next(n for n in reversed(graph.nodes) if n.op != "output"),))
    next(n for n in graph.nodes if n.op == "output").args = (last,)
    gm.recompile()
    p.compile_now(gm)
    assert torch.equal(gm.forward(x), -x.relu()) and "neg" in gm.code


def test_operators_run() -> None:
    x = torch.ones(2, 3)
    names = [str(o) for o in p.operators_run(lambda: x.t() @ x)]
    assert names == ["aten.t.default", "aten.mm.default"] and p.operators_run(lambda: None) == ()


def test_same_schema() -> None:
    assert p.same_schema(aten.relu.default, "aten::relu(Tensor self) -> Tensor")
    assert not p.same_schema(aten.relu.default, "aten::relu(Tensor self, int dim) -> Tensor")


def test_no_new_guards() -> None:
    mode = p.new_fake_mode(symbolic=True)
    size, other = p.symbolic_int(mode, "n", 7), p.symbolic_int(mode, "m", 9)
    assert size == 7  # a guard as any
    with p.no_new_guards(mode):
        assert size == 7, "known already"
        with p.no_dispatch_of(mode):
            assert other != 7, "looking is no guard"
    with pytest.raises(RuntimeError, match="guard"), p.no_new_guards(mode):
        assert other == 9
    with p.no_new_guards(p.new_fake_mode()):
        assert torch.ones(2).sum() == 2, "nothing is symbolic"


def test_every_function_is_tested_here() -> None:
    text = Path(__file__).read_text()
    public = [
        name
        for name, value in vars(p).items()
        if callable(value) and getattr(value, "__module__", "") == p.__name__
    ]
    missing = [n for n in public if not n.startswith("_") and f"p.{n}(" not in text]
    assert not missing, f"no test calls {missing}"


def test_importing_it_leaves_dynamo_out() -> None:
    code = "import sys, graphopt.torch_private; print({'torch._dynamo', 'sympy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_has_kernel() -> None:
    assert p.has_kernel(aten.linear.default, "AutocastCPU") and p.has_kernel(aten.cat.default, "AutocastCPU")
    assert not p.has_kernel(aten.add.Tensor, "AutocastCPU")
    assert p.has_kernel(aten.einsum.default, "CompositeImplicitAutograd")
    assert not p.has_kernel(aten.bmm.default, "CompositeImplicitAutograd")


def test_operator_log() -> None:
    """Equal for what computes the same; a cast may change places with a view, and with nothing else."""
    log, mode = p.OperatorLog(), p.new_fake_mode()
    x, y = p.faked([torch.randn(3, 3), torch.randn(3, 3)], mode)

    def of(call) -> object:
        with mode, torch.no_grad():
            return log.of(call, (x, y))

    half = torch.bfloat16
    want = of(lambda x, y: x.to(half) @ y.to(half))
    with torch.autocast("cpu", half, cache_enabled=False):
        assert of(lambda x, y: x @ y) == want
    assert log.ran == {aten._to_copy.default, aten.mm.default}
    assert of(lambda x, y: x @ y) != want and of(lambda x, y: y.to(half) @ x.to(half)) != want
    assert of(lambda x, y: x.to(torch.float16) @ y.to(half).half()) != want
    moved = of(lambda x, y: x.t().to(half) + y)
    assert moved == of(lambda x, y: x.to(half).t() + y) and moved != of(lambda x, y: x.t() + y)
    assert of(lambda x, y: (x + y).to(half) * 2) != of(lambda x, y: (x.to(half) + y.to(half)) * 2)
    assert of(lambda x, y: x.to(half).float() + y) != of(lambda x, y: x + y)
    assert of(lambda x, y: x + 1) != of(lambda x, y: x + 2) and of(lambda x, y: x) != of(lambda x, y: y)
    assert of(lambda x, y: (x, y)) != of(lambda x, y: (y, x))


def test_the_backend_that_dynamo_traces_for() -> None:
    assert p.compiler_name() is None
    names: list[str | None] = []

    @torch.compiler.assume_constant_result
    def ask() -> bool:
        names.append(p.compiler_name())
        return True

    def function(x: torch.Tensor) -> torch.Tensor:
        x = x + 1 if ask() else x
        p.graph_break()
        return x

    for backend in ("eager", "graphopt"):
        torch.compile(function, backend=backend)(torch.ones(2))
    assert list(dict.fromkeys(names)) == ["eager", "graphopt"]  # traced again after the break


def test_trace_below_vmap_records_nothing_outside_and_leaves_no_level_open() -> None:
    inner: list[fx.GraphModule] = []

    def program(x: torch.Tensor) -> torch.Tensor:
        inner.append(p.trace_below_vmap(torch.vmap(lambda a: a.sin() @ a), [x]))
        return x + 1

    mode = p.new_fake_mode()
    outer = p.trace(program, p.faked([torch.ones(2, 3, 3)], mode), mode)
    assert [n.target for n in outer.graph.nodes if n.op == "call_function"] == [aten.add.Tensor]
    targets = [n.target for n in inner[0].graph.nodes if n.op == "call_function"]
    assert aten.sin.default in targets and aten.bmm.default in targets
    x = torch.rand(2, 3, 3)
    assert torch.allclose(inner[0](x), x.sin() @ x)

    def fails(x: torch.Tensor) -> torch.Tensor:
        return torch._C._functorch._vmap_increment_nesting(2, "error") / 0

    with pytest.raises(ZeroDivisionError):
        p.trace_below_vmap(fails, [torch.ones(2)])
    assert torch._C._functorch.maybe_current_level() is None


def test_why_a_graph_ends() -> None:
    """A part of a program says why and where it ends; the last one and a whole program say nothing."""
    ends: list[str | None] = []

    def backend(gm: fx.GraphModule, examples: object) -> object:
        ends.append(p.graph_end(gm))
        return gm.forward

    def chosen(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x * 2 > 0)[0] + 1

    torch.compiler.reset()
    torch.compile(chosen, backend=backend)(torch.ones(2))
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert len(ends) == 3 and ends[1:] == [None, None]
    assert ends[0] is not None and "output shape depends on input Tensor data" in ends[0]
    assert ends[0].startswith("Dynamic shape operator: ") and "test_torch_private.py:" in ends[0]
    assert ends[0].endswith("return torch.where(x * 2 > 0)[0] + 1)")


def test_more_compilations_are_arguments_of_compile() -> None:
    arguments = p.more_compilations(12)
    assert arguments in ({}, {"recompile_limit": 12})
    assert torch.compile(lambda x: x + 1, backend="eager", **arguments)(torch.ones(1)) == 2


def test_own_compilations_are_arguments_of_compile() -> None:
    arguments = p.own_compilations()
    assert arguments in ({}, {"isolate_recompiles": True})
    assert torch.compile(lambda x: x + 1, backend="eager", **arguments)(torch.ones(1)) == 2


def test_constant_while_tracing_is_not_traced() -> None:
    asked: list[int] = []

    def ask() -> bool:
        asked.append(1)  # Dynamo would refuse to trace a change of the outside
        return True

    answer = p.constant_while_tracing(ask)

    @torch.compile(backend="eager", fullgraph=True)
    def program(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if answer() else x - 1

    assert torch.equal(program(torch.ones(2)), torch.full((2,), 2.0)) and asked
