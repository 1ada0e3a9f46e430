"""What holds for every op: schema, fake, one traced node, no aliasing, symbolic arguments, registration."""

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from graphopt import graph, ops, torch_private
from graphopt.ops import define
from tests.op_cases import BF16, CASES, DTYPES, F32, Case, first_case, fused, tensors
from tests.tensors import rand

WRITERS = (ops.rope_write, ops.cache_write)  # lowering alone makes calls that change an argument

# ------------------------------------------------------------------------------------------- laws of all ops


def test_every_op_has_cases_and_is_listed() -> None:
    assert {case.op.__name__ for case in CASES} == {o.__name__ for o in ops.OPS}
    assert len({o.overload for o in ops.OPS}) == len(ops.OPS)
    assert set(ops.__all__) == {"OPS", "Op", "op"} | {o.__name__ for o in ops.OPS}


@pytest.mark.parametrize("op", ops.OPS, ids=lambda o: o.__name__)
def test_op_looks_like_its_reference(op: ops.Op) -> None:
    assert op.overload is getattr(torch.ops.graphopt, op.__name__).default
    assert op.__doc__ and op.__doc__ == op.reference.__doc__
    assert inspect.signature(op) == inspect.signature(op.reference)
    assert [a.name for a in op.overload._schema.arguments] == list(inspect.signature(op).parameters)
    assert op.overload._schema.is_mutable == (op in WRITERS)


def written(case: Case, arguments: Sequence[object]) -> list[Tensor]:
    """The arguments that a call changes, by its schema."""
    schema = case.op.overload._schema.arguments
    given = zip(schema, arguments, strict=False)
    return [x for a, x in given if a.alias_info is not None and isinstance(x, Tensor)]


def shared(outputs: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    """Whether an output lives in the memory of an input or of another output."""
    new = [x.untyped_storage().data_ptr() for x in outputs if x.numel()]
    return len(set(new)) < len(new) or bool(set(new) & {x.untyped_storage().data_ptr() for x in given})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_are_new_and_inputs_are_kept(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    given = [x for x in (*arguments, *case.options.values()) if isinstance(x, Tensor)]
    before = [x.clone() for x in given]
    outputs = tensors(case.op(*arguments, **case.options))
    assert not shared(outputs, given)
    changed = written(case, arguments)
    kept = [(x, y) for x, y in zip(given, before, strict=True) if not any(x is c for c in changed)]
    assert all(torch.equal(x, y) for x, y in kept) and len(kept) == len(given) - len(changed)
    fresh = case.arguments(dtype)
    reference = tensors(case.op.reference(*fresh, **case.options))
    torch.testing.assert_close(outputs, reference, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(changed, written(case, fresh), rtol=0, atol=0)


def test_shared_memory_is_seen() -> None:
    x, y = rand(3, 4), rand(3, 4)
    assert shared([x.T], [y, x]) and shared([x, x[1:]], [y]) and not shared([x, y], [x + y])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_schema_and_fake_are_true(case: Case) -> None:
    for dtype in (F32, BF16):
        torch.library.opcheck(
            case.op.overload,
            case.arguments(dtype),
            case.options,
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("op", ops.OPS, ids=lambda o: o.__name__)
def test_op_compiles_with_dynamic_sizes(op: ops.Op) -> None:
    case = first_case(op)
    torch.library.opcheck(op.overload, case.arguments(F32), case.options)


@pytest.mark.parametrize("op", ops.OPS, ids=lambda o: o.__name__)
def test_op_runs_on_meta(op: ops.Op) -> None:
    case = first_case(op)
    real = tensors(op(*case.arguments(F32), **case.options))
    on_meta = [x.to("meta") if isinstance(x, Tensor) else x for x in case.arguments(F32)]
    shapes = [(x.shape, x.dtype, x.device.type) for x in tensors(op(*on_meta, **case.options))]
    assert shapes == [(x.shape, x.dtype, "meta") for x in real]


@pytest.mark.parametrize("op", [o for o in ops.OPS if o not in WRITERS], ids=lambda o: o.__name__)
def test_call_under_no_grad_and_with_gradients(op: ops.Op) -> None:
    case = first_case(op)
    leaf = case.arguments(F32)[0].requires_grad_()  # type: ignore[attr-defined]  # the first is a tensor
    rest = case.arguments(F32)[1:]
    with torch.no_grad():
        assert not tensors(op(leaf, *rest, **case.options))[0].requires_grad
    if not tensors(op(leaf, *rest, **case.options))[0].is_floating_point():
        return  # packed weights have no gradients
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of ops without autograd kernels
        (ours,) = torch.autograd.grad(tensors(op(leaf, *rest, **case.options))[0].sum(), leaf)
    (expected,) = torch.autograd.grad(tensors(op.reference(leaf, *rest, **case.options))[0].sum(), leaf)
    assert torch.equal(ours, expected)


# ---------------------------------------------------------------------------------------------------- tracing


def symbolic_calls() -> dict[
    str, tuple[Callable[..., object], tuple[object, ...], torch_private.FakeTensorMode]
]:
    """op -> a call with every size and number symbolic, its fake arguments and their mode."""
    mode = torch_private.new_fake_mode(symbolic=True)
    hints = {"B": 2, "H": 4, "G": 3, "Q": 5, "K": 7, "D": 8, "V": 6, "R": 4}
    n = {name: torch_private.symbolic_int(mode, name, hint) for name, hint in hints.items()}
    eps, scale = (torch_private.symbolic_float(mode, name, 0.5) for name in ("eps", "scale"))

    def fake(*names: str, dtype: torch.dtype = BF16) -> Tensor:
        with mode:
            return torch.empty([n[x] for x in names], dtype=dtype)

    x, w = fake("B", "Q", "D"), fake("D")
    with mode:
        rows = torch.empty((n["V"], 8), dtype=BF16)  # what is divided into groups is never symbolic
        q = torch.empty((n["B"], n["H"] * n["G"], n["Q"], n["D"]), dtype=BF16)
        at, one = torch.empty((n["Q"],), dtype=torch.int64), torch.empty((), dtype=torch.int64)
        sinks = torch.empty((n["H"] * n["G"],), dtype=F32)
    k, v, new = fake("B", "H", "K", "D"), fake("B", "H", "K", "V"), fake("B", "H", "Q", "D")
    cos, bias = fake("B", "Q", "R", dtype=F32), fake("B", "Q", "K")[:, None]

    def attends(op: ops.Op) -> Callable[..., object]:
        return lambda q, k, v, scale, cap, bias, sinks: op(
            q,
            k,
            v,
            scale,
            True,
            k.shape[2] - q.shape[2],
            window=k.shape[2] * 2,
            softcap=cap,
            bias=bias,
            sinks=sinks,
        )

    calls: dict[str, tuple[Callable[..., object], tuple[object, ...]]] = {
        "rms_norm": (lambda x, w, e, o: ops.rms_norm(x, w, e, o), (x, w, eps, scale)),
        "add_rms_norm": (lambda x, w, e: ops.add_rms_norm(x, x, w, e), (x, w, eps)),
        "layer_norm": (lambda x, w, e: ops.layer_norm(x, w, w, e), (x, w, eps)),
        "add_layer_norm": (lambda x, w, e: ops.add_layer_norm(x, x, w, w, e), (x, w, eps)),
        "rope": (lambda q, k, c: ops.rope(q, k, c, c, c.shape[-1]), (q, new, cos)),
        "attention": (attends(ops.attention), (q, k, v, scale, eps, bias, sinks)),
        "attention_lse": (attends(ops.attention_lse), (q, k, v, scale, eps, bias, sinks)),
        "attention_scores": (lambda q, k, s, c: ops.attention_scores(q, k, s, None, c), (new, k, scale, eps)),
        "attention_weights": (
            lambda q, k, s, c: ops.attention_weights(q, k, s, None, c),
            (new, k, scale, eps),
        ),
        "cache_update": (lambda c, n: ops.cache_update(c, n, None), (k, new)),
        "cache_update at": (lambda c, n, p: ops.cache_update(c, n, p), (k, new, at)),
        "linear": (lambda x, w, b: ops.linear(x, w, b), (x, fake("V", "D"), fake("V"))),
        "linear_int8": (
            lambda x, p, s, b: ops.linear_int8(x, p, s, b),
            (x, fake("V", "D", dtype=torch.int8), fake("V", "R"), fake("V")),
        ),
        "scales_int8": (lambda w: ops.scales_int8(w, 4), (rows,)),
        "pack_int8": (lambda w, s: ops.pack_int8(w, s), (rows, rows[:, ::4])),
        "fused_linear": (
            lambda x, w, b, n, e: fused(
                x, w, b, norm="rms", norm_weight=n, eps=e, activation="relu", residual=b
            ),
            (x, fake("V", "D"), fake("V"), w, eps),
        ),
        "rms_norm_residual": (lambda x, w, e: ops.rms_norm_residual(x, w, e, 0.0, True, x), (x, w, eps)),
        "rope_write": (
            lambda q, k, v, t, n, c, d, p, e: ops.rope_write(
                q, k, v, t, t, t.shape[-1], False, n, n, e, 0.0, True, c, d, p, None
            ),
            (q, new, new, cos, w, k, k, at, eps),
        ),
        "cache_write": (lambda k, v, c, d, p: ops.cache_write(k, v, c, d, None, p), (new, new, k, k, one)),
        "experts": (
            lambda x, ids, r, u, d, e: ops.experts(x, ids, r, u, d, "silu", limit=e, up_offset=e),
            (
                *(fake("K", "D"), fake("K", "G", dtype=torch.int64), fake("K", "G")),
                *(torch.cat([fake("R", "V", "D")] * 2, 1), fake("R", "H", "V"), eps),
            ),
        ),
        "expert_matmul": (
            lambda x, w, ids, b: ops.expert_matmul(x, w, ids, b),
            (fake("K", "D"), fake("R", "D", "V"), fake("K", dtype=torch.int64), fake("R", "V")),
        ),
        "gated_activation": (lambda x: ops.gated_activation(x, x, "relu2"), (x,)),
        "activation": (lambda x: ops.activation(x, "tanh"), (x,)),
        "all_reduce": (lambda x: ops.all_reduce(x, "tp"), (x,)),
        "all_gather": (lambda x: ops.all_gather(x, "tp", -1), (x,)),
        "reduce_scatter": (lambda x: ops.reduce_scatter(x, "tp", 0, "avg"), (x,)),
    }
    return {name: (call, arguments, mode) for name, (call, arguments) in calls.items()}


@pytest.mark.parametrize("label", [*(o.__name__ for o in ops.OPS), "cache_update at"])
def test_symbolic_call_is_one_node_and_specialises_nothing(label: str) -> None:
    call, arguments, mode = symbolic_calls()[label]
    op = getattr(ops, label.split()[0])
    traced = torch_private.trace(call, arguments, mode)
    (ours,) = [n for n in traced.graph.nodes if n.target is op.overload]
    others = [n.target for n in traced.graph.nodes if isinstance(n.target, torch_private.OpOverload)]
    assert set(others) <= {op.overload, torch.ops.aten.sym_size.int}
    assert torch_private.equalities(mode) == ()
    placeholders = traced.graph.find_nodes(op="placeholder")
    scalars = [n for n in placeholders if isinstance(graph.val(n), torch.SymFloat)]
    assert all(ours in n.users for n in scalars)  # a burnt-in float would have no user

    # What the fake promised is what the reference gives, size by size.
    args, options = torch.fx.node.map_arg((ours.args, dict(ours.kwargs)), graph.val)
    with mode:
        promised, given = tensors(op.overload(*args, **options)), tensors(op.reference(*args, **options))
    for a, b in zip(promised, given, strict=True):
        assert a.dtype == b.dtype and a.device == b.device and graph.same_shape(a.shape, b.shape)


def test_number_declared_as_float_would_be_burnt_in() -> None:
    """Why `schema_of` says Scalar: the same call through a schema that says float adds a guard."""
    torch.library.define("graphopt_test::scaled", "(Tensor x, float scale) -> Tensor")
    torch.library.impl("graphopt_test::scaled", "default", torch.mul)
    torch.library.register_fake("graphopt_test::scaled", torch.mul)
    mode = torch_private.new_fake_mode(symbolic=True)
    scale = torch_private.symbolic_float(mode, "scale", 0.5)
    with mode:
        x = torch.empty(3)
    torch_private.trace(lambda x, s: torch.ops.graphopt_test.scaled(x, s), (x, scale), mode)
    assert torch_private.equalities(mode)


# ------------------------------------------------------------------------------------------------- definition


def test_importing_twice_registers_once() -> None:
    for name in [n for n in sys.modules if n.startswith("graphopt.ops.")]:
        importlib.reload(sys.modules[name])
    saved = {
        n: sys.modules.pop(n)
        for n in list(sys.modules)
        if n == "graphopt.ops" or n.startswith("graphopt.ops.")
    }
    try:
        again = importlib.import_module("graphopt.ops")
        assert again is not ops and again.rope.overload is ops.rope.overload
    finally:
        sys.modules.update(saved)
    case = first_case(ops.rope)
    assert tensors(ops.rope(*case.arguments(F32)))[0].shape == (2, 4, 8, 16)


def test_other_signature_under_a_known_name_is_an_error() -> None:
    def activation(x: Tensor, kind: str, slope: float) -> Tensor:
        return x * slope

    with pytest.raises(ValueError, match=r"activation.* is registered already .* give the op another name"):
        ops.op(activation)


def test_function_without_a_schema_is_an_error() -> None:
    def untyped(x):  # type: ignore[no-untyped-def]  # that is what it is about
        return x + 1

    with pytest.raises(ValueError, match="type annotation"):
        ops.op(untyped)
    assert not hasattr(torch.ops.graphopt, "untyped")


def test_a_fake_reads_what_the_op_has() -> None:
    def shifted(x: Tensor, by: float, clamp: bool = True) -> Tensor:
        return x + by

    with pytest.raises(ValueError, match=r"the fake of shifted reads 'up'; the op has x, by, clamp"):
        ops.op(fake=lambda x, up: x)(shifted)
    read: list[object] = []
    fake = define._by_name(shifted, lambda clamp, x: read.append((clamp, x)))
    fake(1, by=2.0)  # type: ignore[arg-type]  # numbers do for tensors
    fake(1, 2.0, False)  # type: ignore[arg-type]  # numbers do for tensors
    assert read == [(True, 1), (False, 1)]
