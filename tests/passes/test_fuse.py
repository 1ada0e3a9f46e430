"""What one kernel does becomes one call: block by block, then real models, launch by launch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx

from graphopt import backend, defaults, ops
from graphopt import graph as g
from graphopt.accuracy import judge
from graphopt.lowering.cache_writes import advance_lengths, group_cache_writes
from graphopt.lowering.write_back import update_fresh, write_in_place
from graphopt.match import VIEWS
from graphopt.observe import Event, PassEnded
from graphopt.passes.fuse import Fuse
from graphopt.patterns.fused import NORM_ROWS
from graphopt.pipeline import Context
from tests.models import zoo
from tests.op_cases import codes, fused
from tests.rewriting import Watch, canonical, outputs, vocabulary
from tests.tolerances import close

Program = Callable[..., object]
HALF = torch.bfloat16


def run_fuse(program: Program, *inputs: Tensor, **context: object) -> tuple[fx.GraphModule, Watch]:
    """A program's canonical graph after the pass, and what it told."""
    gm, watch = canonical(program, *inputs), Watch()
    Fuse().run(gm, Context(observers=(watch,), **context))  # type: ignore[arg-type]  # fields of Context
    gm.graph.lint()
    return gm, watch


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Random tensors, small enough for products of them to stay near 1."""
    random = torch.Generator().manual_seed(3)
    return tuple(torch.randn(s, generator=random).div(2).to(dtype) for s in shapes)


def residual_stream(norm: Program, x: Tensor, w: Tensor, r: Tensor, n: Tensor, v: Tensor) -> object:
    """A block's end and the next one's begin."""
    h, total = norm(ops.linear(x, w, None), r, n)  # type: ignore[misc]  # a pair
    return ops.linear(h, v, None), total


def gated_mlp(x: Tensor, n: Tensor, w: Tensor, d: Tensor) -> Tensor:
    h = ops.linear(ops.rms_norm(x, n, 1e-6), w, None)
    h = ops.gated_activation(h[..., : w.shape[0] // 2], h[..., w.shape[0] // 2 :], "silu")
    return x + ops.linear(h, d, None)


X, W, B, R, N, V = (2, 3, 8), (6, 8), (6,), (2, 3, 6), (6,), (4, 6)
BLOCKS: dict[str, tuple[Program, Program, Sequence[tuple[int, ...]]]] = {
    "activation": (
        lambda x, w, b: ops.activation(ops.linear(x, w, b), "gelu"),
        lambda x, w, b: fused(x, w, b, activation="gelu"),
        (X, W, B),
    ),
    "residual": (
        lambda x, w, b, r: ops.linear(x, w, b) + r,
        lambda x, w, b, r: fused(x, w, b, residual=r),
        (X, W, B, R),
    ),
    "residual first, after an activation": (
        lambda x, w, r: r + ops.activation(ops.linear(x, w, None), "relu"),
        lambda x, w, r: fused(x, w, activation="relu", residual=r),
        (X, W, R),
    ),
    "rms norm": (
        lambda x, n, w: ops.linear(ops.rms_norm(x, n, 1e-6), w, None),
        lambda x, n, w: fused(x, w, norm="rms", norm_weight=n, eps=1e-6),
        (X, (8,), W),
    ),
    "late rms norm": (
        lambda x, n, w: ops.linear(ops.rms_norm(x, n, 1e-6, 1.0, False), w, None),
        lambda x, n, w: fused(
            x, w, norm="rms", norm_weight=n, eps=1e-6, weight_offset=1.0, cast_before_scale=False
        ),
        (X, (8,), W),
    ),
    "layer norm": (
        lambda x, n, m, w, b: ops.linear(ops.layer_norm(x, n, m, 1e-5), w, b),
        lambda x, n, m, w, b: fused(x, w, b, norm="layer", norm_weight=n, norm_bias=m, eps=1e-5),
        (X, (8,), (8,), W, B),
    ),
    "a sum that is normed and kept": (
        lambda *a: residual_stream(lambda y, r, n: ops.add_rms_norm(r, y, n, 1e-6), *a),
        lambda x, w, r, n, v: (
            fused(total := fused(x, w, residual=r), v, norm="rms", norm_weight=n, eps=1e-6),
            total,
        ),
        (X, W, R, N, V),
    ),
    "a sum that is layer normed and kept": (
        lambda *a: residual_stream(lambda y, r, n: ops.add_layer_norm(y, r, n, None, 1e-5), *a),
        lambda x, w, r, n, v: (
            fused(total := fused(x, w, residual=r), v, norm="layer", norm_weight=n, eps=1e-5),
            total,
        ),
        (X, W, R, N, V),
    ),
    "a sum that is only normed": (
        lambda x, w, r, n: ops.add_rms_norm(ops.linear(x, w, None), r, n, 1e-6)[0],
        lambda x, w, r, n: ops.rms_norm(fused(x, w, residual=r), n, 1e-6),
        (X, W, R, N),
    ),
    "a norm behind a block": (
        lambda x, r, m, n: ops.add_rms_norm(ops.rms_norm(x, m, 1e-6, 1.0, False), r, n, 1e-6),
        lambda x, r, m, n: (
            ops.rms_norm(total := ops.rms_norm_residual(x, m, 1e-6, 1.0, False, r), n, 1e-6),
            total,
        ),
        (R, R, N, N),
    ),
    "a gated mlp": (
        gated_mlp,
        lambda x, n, w, d: fused(
            fused(x, w, norm="rms", norm_weight=n, eps=1e-6, activation="silu", gated=True), d, residual=x
        ),
        (X, (8,), (10, 8), (8, 5)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_becomes_few_calls(block: str, dtype: torch.dtype) -> None:
    before, after, shapes = BLOCKS[block]
    args = tensors(*shapes, dtype=dtype)
    gm, watch = run_fuse(before, *args)
    wanted = canonical(after, *args)
    same = g.fingerprint(gm.graph) == g.fingerprint(wanted.graph)
    assert same, f"found\n{gm.code}\nwanted\n{wanted.code}\n{watch.refusals}"
    for want, have in zip(outputs(before(*args)), gm(*args), strict=True):
        close(have, want, dtype)
    count = len(watch.matches)
    Fuse().run(gm, Context(observers=(watch,)))
    assert g.fingerprint(gm.graph) == g.fingerprint(wanted.graph) and len(watch.matches) >= count


INT8: dict[str, tuple[Program, Program]] = {
    "activation": (
        lambda y, x, r: ops.activation(y(x), "gelu"),
        lambda f, x, r: f(x, activation="gelu"),
    ),
    "gate": (
        lambda y, x, r: ops.gated_activation(y(x)[..., :3], y(x)[..., 3:], "silu"),
        lambda f, x, r: f(x, activation="silu", gated=True),
    ),
    "residual": (lambda y, x, r: r + y(x), lambda f, x, r: f(x, residual=r)),
    "rms norm": (
        lambda y, x, r: y(ops.rms_norm(x, None, 1e-6)),
        lambda f, x, r: f(x, norm="rms", eps=1e-6),
    ),
    "layer norm": (
        lambda y, x, r: y(ops.layer_norm(x, r[0, 0].repeat(2)[:8], None, 1e-5)),
        lambda f, x, r: f(x, norm="layer", norm_weight=r[0, 0].repeat(2)[:8], eps=1e-5),
    ),
    "nothing": (lambda y, x, r: y(x), lambda f, x, r: f(x)),
}


@pytest.mark.parametrize("block", INT8)
def test_packed_weights_keep_their_scales(block: str) -> None:
    before, after = INT8[block]
    x, bias, r = tensors(X, B, R)
    packed, scales = codes(*W), torch.rand(6, 2) / 64

    def program(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor, r: Tensor) -> object:
        return before(lambda h: ops.linear_int8(h, packed, scales, bias), x, r)

    def expected(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor, r: Tensor) -> object:
        if block == "nothing":
            return ops.linear_int8(x, packed, scales, bias)
        return after(lambda h, **parts: fused(h, packed, bias, scales=scales, **parts), x, r)

    args = x, packed, scales, bias, r
    gm, _ = run_fuse(program, *args)
    wanted = canonical(expected, *args)
    assert g.fingerprint(gm.graph) == g.fingerprint(wanted.graph), gm.code
    close(gm(*args)[0], outputs(program(*args))[0], torch.float32)


# ---------------------------------------------------------------------------------------------- left alone


def one_of_two(x: Tensor, n: Tensor, w: Tensor) -> object:
    h = ops.rms_norm(x, n, 1e-6)
    return ops.linear(h, w, None), h


ALONE: dict[str, tuple[Program, tuple[Tensor, ...], str | None]] = {
    "a linear": (lambda x, w: ops.linear(x, w, None), tensors(X, W), None),
    "a norm with two readers": (one_of_two, tensors(X, (8,), W), "rms_norm is also used by output"),
    "a norm of many rows": (
        lambda x, n, w: ops.linear(ops.rms_norm(x, n, 1e-6), w, None),
        tensors((5, 13, 8), (8,), W),
        f"65 rows > {NORM_ROWS}",
    ),
    "a linear with two readers": (
        lambda x, w: (lambda y: (ops.activation(y, "relu"), y))(ops.linear(x, w, None)),
        tensors(X, W),
        "is also used by output",
    ),
    "a residual that broadcasts": (
        lambda x, w, r: ops.linear(x, w, None) + r,
        tensors(X, W, (6,)),
        "residual has the leading sizes",
    ),
    "a sum across ranks": (
        lambda x, w, r: ops.all_reduce(ops.linear(x, w, None), "tp") + r,
        tensors(X, W, R),
        None,
    ),
    "a normed sum across ranks": (
        lambda x, w, r: ops.add_rms_norm(ops.all_reduce(ops.linear(x, w, None), "tp"), r, None, 1e-6),
        tensors(X, W, R),
        None,
    ),
    "a layer norm without a weight": (
        lambda x, w: ops.linear(ops.layer_norm(x, None, None, 1e-5), w, None),
        tensors(X, W),
        None,
    ),
    "a gate that stands second": (
        lambda x, w: (lambda y: ops.gated_activation(y[..., 3:], y[..., :3], "silu"))(ops.linear(x, w, None)),
        tensors(X, W),
        None,
    ),
    "parts that are no halves": (
        lambda x, w: (lambda y: ops.gated_activation(y[..., :2], y[..., 2:4], "silu"))(
            ops.linear(x, w, None)
        ),
        tensors(X, W),
        None,
    ),
    "a norm of wider weights": (
        lambda x, n, p, s: ops.linear_int8(ops.rms_norm(x, n, 1e-6), p, s, None),
        (*tensors(X, dtype=HALF), *tensors((8,)), codes(*W), *tensors((6, 1), dtype=HALF)),
        None,
    ),
}


@pytest.mark.parametrize("what", ALONE)
def test_what_does_not_fit_is_left_alone(what: str) -> None:
    program, args, reason = ALONE[what]
    gm, watch = run_fuse(program, *args)
    assert g.fingerprint(gm.graph) == g.fingerprint(canonical(program, *args).graph), gm.code
    assert reason is None or any(reason in r.reason for r in watch.refusals), watch.refusals


def test_denied_and_without_fuel() -> None:
    before, _, shapes = BLOCKS["a gated mlp"]
    args = tensors(*shapes)
    gm, watch = run_fuse(before, *args)
    ids = [m.id for m in watch.matches]
    assert len(set(ids)) == len(ids) and ids == [m.id for m in run_fuse(before, *args)[1].matches]
    gate = next(i for i in ids if i.startswith("gated_linear@"))
    denied, heard = run_fuse(before, *args, deny=frozenset({gate}))
    assert vocabulary(denied) == ["fused_linear", "gated_activation", "fused_linear"]
    assert any(r.rule == "gated_linear" and r.reason == "denied" for r in heard.refusals)
    for fuel in range(len(ids) + 1):
        ctx = Context(fuel=fuel)
        part = canonical(before, *args)
        Fuse().run(part, ctx)
        assert ctx.fuel == 0
        close(part(*args)[0], gm(*args)[0], torch.float32)


def test_a_call_stays_where_its_linear_was_and_names_what_it_took_up() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out, self.act = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.act(self.out(self.norm(x)))

    watch = Watch()
    with torch.no_grad():
        gm = canonical(Block(), *tensors(X))
        for step in (defaults.Recognise(), Fuse()):
            step.run(gm, defaults.context(observers=(watch,)))
    (call,) = [n for n in gm.graph.nodes if g.is_call(n, ops.fused_linear.overload)]
    origin = g.origin(call)
    assert g.module_path(call) == "out" and origin is not None and origin.rule == "linear_residual"
    assert {"layer_norm", "linear", "silu", "add"} <= {re.sub(r"(_\d+)+$", "", n) for n in origin.replaced}


# --------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Grouped:
    """What lowering does for GPU targets before it chooses kernels."""

    name: ClassVar[str] = "grouped"
    requires: ClassVar[frozenset[str]] = frozenset({"fused"})
    provides: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})
    exactness: ClassVar[str] = "reordered"

    def run(self, gm: fx.GraphModule, ctx: Context) -> None:
        write_in_place(gm.graph)
        update_fresh(gm.graph)
        advance_lengths(gm.graph)
        group_cache_writes(gm.graph)
        g.eliminate_dead_code(gm.graph)
        gm.recompile()


class Launches:
    """Listens for what each graph launches: {layer's path or "": ops, in order}."""

    def __init__(self) -> None:
        self.graphs: list[dict[str, list[str]]] = []

    def on_event(self, event: Event) -> None:
        if isinstance(event, PassEnded) and event.name == "grouped":
            self.graphs.append(launches(event.gm.graph))


def launches(graph: fx.Graph) -> dict[str, list[str]]:
    """Every call but views, sizes, picks of an output and what depends on weights alone."""
    free = g.weight_only(graph)
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node in free or node.target in VIEWS | g.SIZE_OPS:
            continue
        if g.op_name(node) != "getitem":
            layer = re.match(r".*\b(layers|h|layer)\.\d+", g.module_path(node))
            found.setdefault(layer[0] if layer else "", []).append(g.op_name(node))
    return found


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """The default pipeline with Fuse and Grouped, and who counts."""
    counted = Launches()
    *steps, lower = [p for p in defaults.PIPELINE if p.name != "fuse"]
    monkeypatch.setattr(defaults, "PIPELINE", (*steps, Fuse(), Grouped(), lower))
    monkeypatch.setattr(backend, "from_environment", lambda: (counted,))
    torch.compiler.reset()
    yield counted
    torch.compiler.reset()


DECODER = ["fused_linear", "rope_write", "attention", "fused_linear", "fused_linear", "fused_linear"]
BEHIND = ["linear", "rms_norm_residual", "fused_linear", "linear", "rms_norm_residual"]
PLAIN = [op.replace("rope_write", "rope") for op in DECODER]
# One layer at decode with a static cache, and at prefill without a cache.
LAYERS = {
    "llama": (DECODER, PLAIN),
    "qwen3": (DECODER, ["fused_linear", "rms_norm", "rms_norm", *PLAIN[1:]]),
    "gemma2": ([*DECODER[:3], *BEHIND], [*PLAIN[:3], *BEHIND]),
    "gpt2": ([op.replace("rope_write", "cache_write") for op in DECODER], [o for o in PLAIN if o != "rope"]),
    "bert": (
        [],
        ["linear", "attention", "fused_linear", "layer_norm", "fused_linear", "fused_linear", "layer_norm"],
    ),
}


def compiled_run(name: str, dtype: torch.dtype, case: zoo.Case) -> None:
    """A compiled model's results, caches included, are as near to fp64 as eager's."""
    model = zoo.model(name, tied=case.tied, window=case.window, dtype=dtype)
    given = zoo.inputs(model, case)
    compiled = torch.compile(
        model, backend="graphopt", options={"strict": True}, fullgraph=True, dynamic=False
    )
    assert isinstance(compiled, torch.nn.Module)
    with torch.no_grad():
        ours = zoo.real(zoo.run(compiled, given, case.cache), given)
    verdict = judge(zoo.oracle(name, case), zoo.eager(name, case, dtype), ours, dtype)
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((n, torch.float32) for n in LAYERS if n != "bert"), ("qwen3", HALF), ("gemma2", HALF)],
)
def test_launches_of_a_layer_at_decode(name: str, dtype: torch.dtype, watched: Launches) -> None:
    compiled_run(name, dtype, zoo.Case(cache="static", window=32))
    decode = watched.graphs[-1]
    layers = [ops_ for path, ops_ in decode.items() if path]
    assert layers[0] == LAYERS[name][0] and len(layers[0]) <= 8
    assert len(layers) == 2 and decode[""].count("aten._foreach_add_") <= 1
    assert not {op for ops_ in decode.values() for op in ops_} & {
        "aten.index_copy_",
        "aten.copy_",
        "aten.add_",
    }


@pytest.mark.parametrize("name", LAYERS)
def test_launches_of_a_layer_at_prefill(name: str, watched: Launches) -> None:
    compiled_run(name, torch.float32, zoo.Case())
    layers = [ops_ for path, ops_ in watched.graphs[0].items() if path]
    assert len(layers) == 2 and layers[0] == LAYERS[name][1]


@pytest.mark.parametrize(("length", "padding"), [(2, "none"), (3, "left"), (7, "none")])
def test_a_window_that_fills_stays_right(length: int, padding: str, watched: Launches) -> None:
    """A sliding cache is written at positions, then rolled, once its window of 4 is full."""
    compiled_run("gemma2", torch.float32, zoo.Case(3, length, padding, "static", window=4))
    rolled = [any("aten.roll" in ops_ for ops_ in graph.values()) for graph in watched.graphs]
    assert rolled[-1] == (length + zoo.DECODES > 4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_growing_cache_stays_right(name: str, watched: Launches) -> None:
    compiled_run(name, torch.float32, zoo.Case(cache="dynamic"))
    assert "cache_update" in watched.graphs[-1][next(filter(None, watched.graphs[-1]))]
