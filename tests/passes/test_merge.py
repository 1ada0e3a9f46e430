"""Sibling linears become one; everything else is left alone and says why."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import fx, nn

from graphopt import backend, ops
from graphopt import graph as g
from graphopt.lowering.fold import fold
from graphopt.observe import Matched
from graphopt.passes.merge import LINEAR, RULE, Merge
from graphopt.pipeline import Context
from graphopt.weights import WeightStore
from tests.graphs import Builder, calls, values
from tests.listening import Listener
from tests.tolerances import close

aten = torch.ops.aten


def siblings(
    rows: Sequence[int], bias: Sequence[bool] | None = None, paths: Sequence[str] | None = None
) -> fx.GraphModule:
    """neg(linear(x, w_i, b_i)) for each i."""
    build = Builder()
    x = build.input("x", 2, 3, 8)
    bias = bias or [False] * len(rows)
    paths = paths or [f"layers.0.attn.p{i}" for i in range(len(rows))]
    outs = []
    for i, (n, with_bias, path) in enumerate(zip(rows, bias, paths, strict=True)):
        w = build.weight(f"w{i}", n, 8)
        b = build.weight(f"b{i}", n) if with_bias else None
        outs.append(build.call(aten.neg.default, build.call(LINEAR, x, w, b, path=path)))
    return build.done(*outs)


def merged(gm: fx.GraphModule, **context: object) -> tuple[fx.GraphModule, Listener]:
    """Run the pass; results and abstract values must be what they were."""
    listener, inputs = Listener(), values(gm)
    expected = gm(*inputs)
    Merge().run(gm, Context(observers=(listener,), **context))  # type: ignore[arg-type]  # fields of Context
    for one, two, node in zip(gm(*inputs), expected, g.output_node(gm.graph).args[0], strict=True):  # type: ignore[arg-type]  # a tuple
        close(one, two, torch.float32)
        assert g.same_shape(g.shape(node), two.shape)  # type: ignore[arg-type]  # a node
    return gm, listener


@pytest.mark.parametrize("rows", [(4, 4), (6, 2, 2), (5, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_siblings_become_one_linear(rows: tuple[int, ...], bias: bool) -> None:
    gm, listener = merged(siblings(rows, [bias] * len(rows)))
    (linear,) = calls(gm, LINEAR)
    assert g.shape(linear) == (2, 3, sum(rows))
    assert len(calls(gm, aten.slice.Tensor)) == len(rows) and len(calls(gm, aten.cat.default)) == 1 + bias
    (event,) = listener.events
    assert isinstance(event, Matched)
    match = event.match
    assert match.id.startswith("merge_siblings@layers.0.attn#") and match.module_path == "layers.0.attn"
    assert len(match.nodes) == len(rows) and set(match.new_nodes) <= {n.name for n in gm.graph.nodes}
    origin = g.origin(linear)
    assert origin is not None and origin.match == match.id and origin.replaced == match.nodes
    assert [g.module_path(n) for n in calls(gm, aten.slice.Tensor)] == [
        f"layers.0.attn.p{i}" for i in range(len(rows))
    ]


def test_merged_weights_are_prepared_once() -> None:
    gm, _ = merged(siblings((4, 2, 2), [True] * 3))
    store, inputs = WeightStore(), values(gm)
    expected = gm(*inputs)
    fold(gm, store)
    gm.recompile()
    for _ in range(2):
        for one, two in zip(gm(*inputs), expected, strict=True):
            close(one, two, torch.float32)
    assert store.prepared == 2 and not calls(gm, aten.cat.default)


def test_an_only_child_is_left_alone() -> None:
    gm, listener = merged(siblings((4,)))
    assert len(calls(gm, LINEAR)) == 1 and not listener.events


def test_those_with_and_without_bias_form_two_groups() -> None:
    gm, listener = merged(siblings((4, 2, 4), [True, False, True]))
    assert len(calls(gm, LINEAR)) == 2
    assert listener.reasons == ["bias None differs from linear_default's torch.float32"]


def of_two_layers(together: bool) -> fx.GraphModule:
    """The keys and values of one input in two attentions, or in one; in modules of any names."""
    build = Builder()
    x, q = build.input("x", 2, 3, 8), build.input("q", 2, 1, 3, 8)
    flat = [build.call(LINEAR, x, build.weight(f"w{i}", 8, 8), None) for i in range(4)]
    heads = [build.call(aten.reshape.default, y, [2, 1, 3, 8]) for y in flat]
    first = build.call(ops.attention.overload, q, *heads[:2], 0.3)
    then = build.call(ops.attention.overload, first if together else q, *heads[2:], 0.3)
    return build.done(first, then)


@pytest.mark.parametrize("together", [False, True])
def test_what_comes_together_in_each_layer_is_merged_in_each(together: bool) -> None:
    gm, listener = merged(of_two_layers(together))
    assert [g.shape(n)[-1] for n in calls(gm, LINEAR)] == [16, 16] and not listener.reasons
    assert len(calls(gm, ops.attention.overload)) == 2


def test_what_has_another_join_says_so() -> None:
    build = Builder()
    x = build.input("x", 2, 8)
    outs = [build.call(LINEAR, x, build.weight(f"w{i}", 8, 8), None) for i in range(2)]
    gm, listener = merged(build.done(build.call(ops.activation.overload, outs[0], "silu"), outs[1]))
    assert len(calls(gm, LINEAR)) == 2
    assert listener.reasons[0] == "join activation_default differs from linear_default_1's output"


def test_names_of_modules_decide_nothing() -> None:
    for paths in (["", ""], ["layers.0.cross.k", "layers.1.cross.k"]):
        gm, _ = merged(siblings((4, 4), paths=paths))
        assert len(calls(gm, LINEAR)) == 1


def test_a_vocabulary_is_not_copied() -> None:
    gm = siblings((4, 4, 40))
    listener = Listener()
    Merge(max_rows=16).run(gm, Context(observers=(listener,)))
    assert len(calls(gm, LINEAR)) == 2 and listener.reasons == ["40 rows > 16"]


def test_a_tied_weight_is_not_copied() -> None:
    build = Builder()
    x, tied, other = build.input("x", 2, 8), build.weight("tied", 4, 8), build.weight("other", 4, 8)
    rows = build.call(aten.embedding.default, tied, build.input("ids", 2, dtype=torch.int64))
    gm = build.done(build.call(LINEAR, x, tied, None), build.call(LINEAR, x, other, None), rows)
    listener = Listener()
    Merge().run(gm, Context(observers=(listener,)))
    assert len(calls(gm, LINEAR)) == 2
    assert listener.reasons[0] == "weight tied is also read by aten.embedding: merging would hold it twice"


def test_computed_weights_and_other_dtypes_are_refused() -> None:
    build = Builder()
    x, w = build.input("x", 2, 8), build.weight("w", 4, 8)
    y = build.input("y", 4, 8)
    half = build.call(
        aten.to.dtype, build.weight("h", 4, 8, dtype=torch.bfloat16), torch.float32, False, False, None
    )
    outs = [build.call(LINEAR, x, weight, None) for weight in (w, build.call(aten.neg.default, y), half)]
    gm, listener = merged(build.done(*outs))
    assert len(calls(gm, LINEAR)) == 2, "the cast weight depends on weights alone and is merged"
    assert listener.reasons == ["weight neg_default does not depend on weights alone"]


def test_a_linear_that_x_is_the_weight_of_is_no_sibling() -> None:
    build = Builder()
    w, v = build.weight("w", 8, 8), build.weight("v", 8, 8)
    gm, listener = merged(build.done(build.call(LINEAR, w, v, None), build.call(LINEAR, v, w, None)))
    assert len(calls(gm, LINEAR)) == 2 and not listener.events


def test_weights_made_late_are_hoisted() -> None:
    build = Builder()
    x = build.input("x", 2, 8)
    outs = []
    for i in range(3):
        turned = build.call(aten.permute.default, build.weight(f"w{i}", 8, 4), [1, 0])
        outs.append(build.call(LINEAR, x, turned, build.call(aten.mul.Tensor, build.weight(f"b{i}", 4), 2.0)))
    gm, _ = merged(build.done(*outs))
    assert len(calls(gm, LINEAR)) == 1


def test_symbolic_sizes() -> None:
    build = Builder()
    s = build.size("s", 5)
    x = build.input("x", 2, s, 8)
    gm = build.done(*(build.call(LINEAR, x, build.weight(f"w{i}", 4, 8), None) for i in range(2)))
    Merge().run(gm, Context())
    values = [torch.randn(2, 7, 8), torch.randn(4, 8), torch.randn(4, 8)]
    for out, w in zip(gm(7, *values), values[1:], strict=True):
        close(out, values[0] @ w.T, torch.float32)
    assert len(calls(gm, LINEAR)) == 1


def test_denied_matches_and_fuel() -> None:
    _, listener = merged(siblings((4, 4)))
    event = listener.events[0]
    assert isinstance(event, Matched)
    gm, listener = merged(siblings((4, 4)), deny=frozenset({event.match.id}))
    assert len(calls(gm, LINEAR)) == 2 and listener.reasons == ["denied"]
    gm, listener = merged(siblings((4, 4)), fuel=0)
    assert len(calls(gm, LINEAR)) == 2 and listener.reasons == ["no fuel left"]
    context = Context(fuel=3)
    Merge().run(siblings((4, 4)), context)
    assert context.fuel == 2


def test_ids_are_stable_and_distinct() -> None:
    def ids() -> list[str]:
        build = Builder()
        outs = []
        for layer in (0, 1):
            x = build.input(f"x{layer}", 2, 8)
            for i in range(2):
                w = build.weight(f"w{layer}{i}", 4, 8)
                outs.append(build.call(LINEAR, x, w, None, path="layers.attn.p"))
        listener = Listener()
        Merge().run(build.done(*outs), Context(observers=(listener,)))
        return [e.match.id for e in listener.events if isinstance(e, Matched)]

    assert ids() == ids() and len(set(ids())) == 2
    assert Merge() == Merge() and hash(Merge(8)) != hash(Merge(9))
    assert ops.linear.overload is LINEAR


def test_values_of_equal_layers_are_as_if_each_were_run() -> None:
    build = Builder()
    x, outs = build.input("x", 2, 3, 8), []
    for layer in range(3):
        q, k = (build.call(LINEAR, x, build.weight(f"w{layer}{i}", 8, 8), None) for i in range(2))
        outs.append(build.call(ops.gated_activation.overload, q, k, "silu"))
        x = build.call(aten.neg.default, x)
    gm, _ = merged(build.done(*outs))  # which compares values and shapes
    pieces = calls(gm, aten.slice.Tensor)
    vals = [g.tensor(n) for n in pieces]
    assert len(pieces) == 6 and {v.stride() for v in vals if v is not None} == {(48, 16, 1)}
    assert len({v.untyped_storage()._cdata for v in vals if v is not None}) > 1, "each layer has its own"


def test_memory_that_a_program_reads_itself_is_not_the_merged_one() -> None:
    """A piece of a merged product has other strides than the product that it was (Longformer's windows)."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 6), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            q, k = self.q(x), self.k(x)
            return 2 * q, 2 * k.as_strided((2, 2, 4, 6), (30, 6, 6, 1))  # 4 rows each, from every row on

    model, x = Windows().requires_grad_(False), torch.randn(2, 5, 8)
    backend.clear_reports()
    ours = torch.compile(model, backend="graphopt", options={"strict": True})(x)
    (report,) = backend.reports()
    assert RULE in [match.rule for match in report.matches], "q and k are one product"
    for found, expected in zip(ours, model.double()(x.double()), strict=True):
        close(found, expected, torch.float32)
