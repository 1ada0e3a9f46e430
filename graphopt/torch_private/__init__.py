"""The one door to torch's private APIs: each function says what it reaches, and `tests/test_torch_private.py`
tests it.

Supported: torch >= 2.11. Where the versions differ, the difference is handled here and nowhere else.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.fx.traceback
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from graphopt.torch_private.operators import OperatorLog, has_kernel, operators_run, same_schema

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

F = TypeVar("F", bound=Callable[..., object])

# Dynamo and the symbolic shapes (sympy) take 2 s to import: inside the functions that need them.

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "OperatorLog",
    "TreeSpec",
    "has_kernel",
    "operators_run",
    "same_schema",
    "tree_flatten",
    "tree_map",
    "tree_unflatten",
]


def new_fake_mode(*, symbolic: bool = False) -> FakeTensorMode:
    """A fake-tensor mode of our own; with `symbolic`, it can hold SymInts made by `symbolic_int`."""
    if not symbolic:
        return FakeTensorMode(allow_non_fake_inputs=True)
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def fake_mode_of(values: Sequence[object]) -> FakeTensorMode | None:
    """The mode of the first fake tensor among the values, or None."""
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


def fake_like(value: FakeTensor) -> FakeTensor:
    """Another fake tensor of the same sizes, strides, dtype and device, in memory of its own; nothing runs.

    `empty_like` costs ten times as much: it is dispatched. Sizes have to be numbers.
    """
    meta = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return FakeTensor(value.fake_mode, meta, value.device)


def faked(values: Sequence[object], mode: FakeTensorMode) -> list[object]:
    """The values with every real tensor as a fake of the same sizes and strides; tensors that alias still
    alias.
    """
    return [
        mode.from_tensor(v) if isinstance(v, torch.Tensor) and not isinstance(v, FakeTensor) else v
        for v in values
    ]


def symbolic_int(mode: FakeTensorMode, name: str, hint: int) -> torch.SymInt:
    """A fresh symbolic size. Not duck-shaped: two of one hint stay different, 0 and 1 are not special."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    env, source = _shape_env(mode), ConstantSource(name)
    symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
    return env.create_symintnode(symbol, hint=hint, source=source)  # type: ignore[return-value]  # a SymInt for dynamic dims


def symbolic_float(mode: FakeTensorMode, name: str, hint: float) -> torch.SymFloat:
    """A fresh symbolic float, as Dynamo makes one of a Python float under `dynamic=True`."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    env, source = _shape_env(mode), ConstantSource(name)
    symbol = env.create_unspecified_symbol(hint, source, DimDynamic.DYNAMIC)
    return env.create_symfloatnode(symbol, hint=hint, source=source)  # type: ignore[return-value]  # as above


def _shape_env(mode: FakeTensorMode) -> ShapeEnv:
    assert mode.shape_env is not None, "a symbolic number needs a mode made with symbolic=True"
    return mode.shape_env


def equalities(mode: FakeTensorMode) -> tuple[object, ...]:
    """The guards of the form `a == b` that running code under the mode has added."""
    env = mode.shape_env
    return tuple(g.expr for g in env.guards if g.expr.func.__name__ == "Equality") if env is not None else ()


def trace(function: Callable[..., object], fakes: Sequence[object], mode: FakeTensorMode) -> fx.GraphModule:
    """Record the pre-dispatch ATen calls of a function on fake tensors, keeping each Dynamo node's metadata.

    The one trace behind every door: Dynamo graphs, exported programs and patterns all come through here.
    Gradients are off: an in-place write to a parameter would be an error otherwise.
    """
    context = torch._guards.TracingContext.try_get()
    apart = (
        context is not None and context.fake_mode is not mode
    )  # a pattern, traced while Dynamo compiles a model
    outer = torch._guards.tracing(None) if apart else contextlib.nullcontext()
    with outer, mode, torch.no_grad(), torch.fx.traceback.preserve_node_meta():
        return make_fx(
            function,
            decomposition_table=_DROPOUTS,
            pre_dispatch=True,
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*fakes)


def _dropout(x: torch.Tensor, p: float, train: bool) -> object:
    """dropout(x, p, train) -> x, as eager does where it drops nothing; else it is recorded as it is.

    No schema declares the alias, and torch's Python kernel of `aten.dropout` returns a clone in its place: a
    write through the result would be lost to x. In place there is then nothing to write.
    """
    return x if not train or (not isinstance(p, torch.SymFloat) and p == 0) else NotImplemented


_DROPOUTS: dict[OpOverload, Callable[..., object]] = {
    getattr(torch.ops.aten, name).default: _dropout
    for base in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for name in (base, f"{base}_")
}


def trace_below_vmap(function: Callable[..., object], values: Sequence[object]) -> fx.GraphModule:
    """Record a function that enters `torch.vmap` as the ATen calls that run below it, as one graph.

    May be called while another trace is going on: that one records nothing of it. The tracer that looks
    before dispatch cannot see through vmap's wrapped tensors; this one looks after it, so composites come in
    pieces, and with autocast's casts. A level of vmap that an error leaves open is left.
    """
    functorch = torch._C._functorch
    outer = functorch.maybe_current_level() or 0
    try:
        with (
            disable_proxy_modes_tracing(),
            torch._C.DisableTorchFunction(),  # the outer trace's record of grad modes and autocast
            torch.fx.traceback.preserve_node_meta(),
        ):
            return make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
    finally:
        while (functorch.maybe_current_level() or 0) > outer:
            functorch._vmap_decrement_nesting()


def backend_fakes(examples: Sequence[object]) -> tuple[FakeTensorMode, list[object]]:
    """Inside a Dynamo backend: Dynamo's own fake mode and a fake (static or symbolic as Dynamo decided) for
    each input.

    `source=` matters: without it lifted floats under dynamic=True die at `item`; `meta["example_value"]`
    would mix fake modes.
    """
    context = torch._guards.TracingContext.get()
    mode = context.fake_mode
    assert mode is not None, "Dynamo has a fake mode when it calls a backend"
    fakes: list[object] = []
    for example in examples:
        if not isinstance(example, torch.Tensor):
            fakes.append(example)
            continue
        symbolic = context.tensor_to_context.get(example)
        fakes.append(
            mode.from_tensor(
                example,
                symbolic_context=symbolic,
                source=symbolic.tensor_source if symbolic else None,
                static_shapes=symbolic is None,
            )
        )
    return mode, fakes


def dynamo_source(placeholder: fx.Node) -> str:
    """How Dynamo spells where a placeholder comes from, as `L['self']._modules['fc']._parameters['weight']`;
    or ''.
    """
    grapharg = placeholder.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    if source is None:
        return ""
    name = source.name
    return name() if callable(name) else name  # a method up to torch 2.10, a property since


def is_higher_order(target: object) -> bool:
    """Whether a call's target is a higher-order operator (control flow, flex attention, checkpoint, ...)."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def is_traceable_subclass(value: object) -> bool:
    """Whether a value is a wrapper tensor subclass (DTensor, NestedTensor, quantized subclasses), which we
    refuse.
    """
    return torch.utils._python_dispatch.is_traceable_wrapper_subclass(value)


def recompile_limit_reached() -> str:
    """Inside a backend: a warning if Dynamo will not compile this function again (it then runs eagerly,
    silently).
    """
    compile_id = torch._guards.CompileContext.current_compile_id()
    limit = torch._dynamo.config.recompile_limit
    done = getattr(compile_id, "frame_compile_id", None)
    if done is None or done + 1 != limit:  # beyond it, torch counts by object (self, a closure) and goes on
        return ""
    return (
        f"this is compilation {done + 1} of {limit} of one function: from the next new shape on, torch runs "
        "it eagerly; compile with dynamic=True, or raise torch._dynamo.config.recompile_limit"
    )


RECOMPILE_LIMIT = (
    " (torch runs a function eagerly once it has compiled it torch._dynamo.config.recompile_limit times: "
    "raise that, or compile fewer shapes)"
)


def more_compilations(limit: int) -> dict[str, object]:
    """Arguments of `torch.compile` for that many compilations; {} where torch < 2.13 has none.

    Not `isolate_recompiles`: another instance of a model would be compiled anew.
    """
    known = inspect.signature(torch.compile).parameters
    return {"recompile_limit": limit} if "recompile_limit" in known else {}


def own_compilations() -> dict[str, object]:
    """Arguments of `torch.compile` that keep its compilations apart; {} where torch < 2.13 has none."""
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


def compiler_name() -> str | None:
    """The name of the backend for which Dynamo is tracing; None where it is not tracing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        compiler = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # no trace is going on
        return None
    name = getattr(compiler, "_compiler_name", None) or getattr(compiler, "compiler_name", None)
    return str(name or getattr(compiler, "__name__", compiler))


def constant_while_tracing(function: F) -> F:
    """`torch.compiler.assume_constant_result`, which imports Dynamo where it only has to mark a function."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what Dynamo looks for
    return function


def graph_end(gm: fx.GraphModule) -> str | None:
    """Why Dynamo ended a graph before the program's end, and at which source line; None if it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    lines = [line.strip() for line in reason.reason.splitlines() if line.strip()]
    explained = [line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")]
    why = ": ".join([*lines[:1], *explained[:1]]).rstrip(".")
    frame = reason.user_stack[-1] if reason.user_stack else None
    where = f" ({Path(frame.filename).name}:{frame.lineno} {frame.line})" if frame is not None else ""
    return f"{why}{where}"


def graph_break() -> None:
    """End Dynamo's graph here: what calls this runs in Python."""
    torch._dynamo.graph_break()


def outputs_need_gradients(gm: fx.GraphModule) -> bool:
    """Whether any computed output of a Dynamo graph requires grad.

    Judged by example values, so that `no_grad` and `enable_grad` inside count. A parameter that is returned
    as it came was not computed; under `no_grad`, a view of one says that it requires grad and has no
    `grad_fn`.
    """
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    values = [n.meta.get("example_value") for n in output.all_input_nodes if n.op != "placeholder"]
    needing = [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]
    return any(torch.is_grad_enabled() or v.grad_fn is not None for v in needing)


def inductor(gm: fx.GraphModule, examples: Sequence[object]) -> Callable[..., object]:
    """Compile with torch's default backend."""
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend("inductor")(gm, list(examples))  # type: ignore[arg-type]  # the registry is untyped


def steers_dynamo(error: Exception) -> bool:
    """Whether an exception is Dynamo's way of control (restart, skip the frame): let it through."""
    failed = torch._dynamo.exc.BackendCompilerFailed  # Inductor's errors are of this kind
    return isinstance(error, torch._dynamo.exc.TorchDynamoException) and not isinstance(error, failed)


def trace_artifact(name: str, text: str) -> None:
    """Hand a text artifact to `TORCH_TRACE` (readable by tlparse); free when tracing is off."""
    torch._logging.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text
    )


def hint(value: torch.SymInt | torch.SymFloat) -> int | float | None:
    """The value that a symbolic number has in the example call, or None. Adds no guard."""
    node = value.node
    return node.hint if node.has_hint() else None


def specialise(value: torch.SymFloat, number: float) -> None:
    """Guard on a symbolic float having this value: another one is compiled anew.

    Raises RuntimeError where the example's value is another one.
    """
    if float(value) != number:
        raise RuntimeError(f"{value} is {float(value)}, not {number}")


def lazy_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule whose `recompile` only marks it: its code is generated when it is called, printed or
    asked for.

    Passes may recompile after each edit then; generating the code of 1000 nodes takes 25 ms.
    """
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)


def compile_now(gm: fx.GraphModule) -> None:
    """Generate a lazy module's code now, so that `gm.forward` is the real one."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    _LazyGraphModule.force_recompile(gm)


def learn_equal(a: object, b: object) -> bool:
    """Tell the shape environment that two sizes are equal, as a guard: what an operator requires but never
    checks.
    """
    if not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt):
        return a == b
    return bool(a == b)


@contextlib.contextmanager
def no_dispatch_of(mode: FakeTensorMode) -> Iterator[None]:
    """Run fake computations under a mode, with its guards suppressed: looking at a value never specialises
    it.
    """
    env = mode.shape_env
    if env is None:
        with mode:
            yield
        return
    # What is suppressed is no guard: it neither raises nor counts under `no_new_guards`.
    raising, ignored = getattr(env, "_error_on_new_guards", False), env.counter["ignored_backward_guard"]
    env._error_on_new_guards = False
    try:
        with mode, env.suppress_guards():
            yield
    finally:
        env._error_on_new_guards = raising
        env.counter["ignored_backward_guard"] = ignored


@contextlib.contextmanager
def no_new_guards(mode: FakeTensorMode) -> Iterator[None]:
    """Run a pass after Dynamo has made its guards: what would need another one raises, and is not learnt."""
    env = mode.shape_env
    if env is None:
        yield
    elif hasattr(env, "error_on_new_guards"):
        with env.error_on_new_guards():
            yield
    else:  # older: guards of an environment that Dynamo is done with are ignored, and counted
        before = env.counter["ignored_backward_guard"]
        yield
        if env.counter["ignored_backward_guard"] != before:
            raise RuntimeError("a guard was attempted after Dynamo's guards were made")
