"""In-place calls become values: what is left to write, where it stands, and random programs against eager."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import fx

from graphopt import graph as g
from graphopt.aliasing import root, storage, viewed, writes, written_arguments, written_inputs
from graphopt.capture import capture
from graphopt.errors import CaptureRefused
from graphopt.passes.canonicalize import canonicalize
from graphopt.passes.functionalize import functionalize
from tests.eager import compare
from tests.graphs import calls, targets
from tests.programs import Program, programs

aten = torch.ops.aten


def x34() -> torch.Tensor:
    return torch.arange(12.0).reshape(3, 4) - 5.5


def functional(program, *inputs: torch.Tensor) -> fx.GraphModule:
    """The functional graph; it computes what the program computes, and writes what it writes."""
    captured = capture(program, *inputs)
    gm = functionalize(captured.gm)
    gm.graph.lint()
    compare(program, captured.replace(gm), inputs, layout=False)
    return gm


def writing(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if writes(n)]


# --------------------------------------------------------------------------------------------- the shape of
# it


def test_a_pure_graph_is_left_alone() -> None:
    gm = capture(lambda x: x * 2 + x.t().t(), x34()).gm
    assert functionalize(gm) is gm


def test_one_write_back_before_the_output() -> None:
    gm = functional(lambda x: x.add_(1).mul_(2) + 3, x34())
    assert targets(gm) == [aten.add.Tensor, aten.mul.Tensor, aten.add.Tensor, aten.copy_.default]
    (copy,) = writing(gm)
    assert copy.next.op == "output" and copy.args[0].op == "placeholder" and copy.args[2] is False


def test_an_intermediate_needs_no_write_back() -> None:
    gm = functional(lambda x: (x * 2).add_(1), x34())
    assert not writing(gm)


def test_the_same_value_written_back_is_no_write() -> None:
    assert not writing(functional(lambda x: x.copy_(x) + 1, x34()))


def test_a_cache_keeps_its_index_copy() -> None:
    def program(cache, position, new):
        cache.index_copy_(1, position, new)
        return cache.sum(1)

    gm = functional(program, torch.zeros(2, 5, 3), torch.tensor([3]), torch.ones(2, 1, 3))
    index_copy, total, copy = (n for n in gm.graph.nodes if n.op == "call_function")
    assert index_copy.target is aten.index_copy.default and copy.args[1] is index_copy
    assert total.args[0] is index_copy and gm.graph.lint() is None


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (lambda x: x[1:].add_(1), aten.slice_scatter.default),
        (lambda x: x.narrow(1, 1, 2).add_(1), aten.slice_scatter.default),
        (lambda x: x[1].add_(1), aten.select_scatter.default),
        (lambda x: x.diagonal().add_(1), aten.diagonal_scatter.default),
        (lambda x: x.t().add_(1), aten.permute.default),
        (lambda x: x.mT.add_(1), aten.permute.default),
        (lambda x: x.view(-1).add_(1), aten.reshape.default),
        (lambda x: x.split(2, 1)[1].add_(1), aten.slice_scatter.default),
        (lambda x: x.unbind(1)[2].add_(1), aten.select_scatter.default),
    ],
)
def test_a_write_through_a_view_is_a_scatter(program, expected) -> None:
    gm = functional(program, x34())
    assert calls(gm, expected) and [n.target for n in writing(gm)] == [aten.copy_.default]


def test_a_write_through_any_other_view_runs_on_a_private_copy() -> None:
    gm = functional(lambda x: x.unfold(1, 2, 2).mul_(3), x34())
    inner, last = writing(gm)
    (private,) = calls(gm, aten.clone.default)
    assert root(inner) is private and private.meta["keep"] and last.args[1] is private


def test_a_view_is_made_again_only_where_it_is_read_after_a_write() -> None:
    def program(x):
        v = x[1]
        before = v * 2
        x.add_(1)
        return before, v * 3

    gm = functional(program, x34())
    assert len(calls(gm, aten.select.int)) == 2


def test_in_place_results_are_cast_to_what_they_are_written_to() -> None:
    gm = functional(lambda h, x: h.mul_(x), x34().half(), x34())
    (cast,) = calls(gm, aten.to.dtype)
    assert g.dtype(cast) == torch.float16


def test_functional_values_keep_their_place_in_the_source() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x[1:3] = x[:2] * 2
            return x + 1

    gm = functionalize(capture(Model(), x34()).gm)
    scatter = calls(gm, aten.slice_scatter.default)[0]
    assert "x[1:3] = x[:2] * 2" in g.source(scatter) and isinstance(g.val(scatter), torch.Tensor)


# ----------------------------------------------------------------------------------------------- refusals


def test_a_write_into_a_constant_is_refused() -> None:
    table = torch.zeros(4)
    captured = capture(lambda x: table.add_(1) + x, torch.ones(4))
    with pytest.raises(CaptureRefused, match="writes a constant; make it an argument"):
        functionalize(captured.gm)


def test_inputs_that_share_memory_are_refused_only_if_written() -> None:
    x, z = x34(), x34()
    functional(lambda a, b, c: (a + b.t(), c.add_(1)), x, x.t(), z)
    with pytest.raises(CaptureRefused, match=r"two inputs share the memory that aten.add_.Tensor writes \("):
        functionalize(capture(lambda a, b: a.add_(1) + b.t(), x, x.t()).gm)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (lambda x: (x + 1).t_(), "t_ changes a tensor's sizes or storage in place"),
        (lambda x: (x + 1).resize_(2, 2), "resize_ changes a tensor's sizes or storage in place"),
        (lambda x: (x + 1).set_(x + 2), "set_ changes a tensor's sizes or storage in place"),
        (lambda x: (x + 1).as_strided((2, 2), (1, 1)).fill_(1), "depends on the storage below"),
    ],
)
def test_writes_that_are_no_values(program, reason: str) -> None:
    with pytest.raises(CaptureRefused, match=reason):
        functionalize(capture(program, x34()).gm)


def test_a_tensor_set_to_itself_stays_what_it_is() -> None:
    """module.to(dtype) in a forward, where the weights have that dtype already."""

    def program(x):
        y = x + 1
        y.set_(y)
        y.add_(1)
        return y.set_(y) * 2

    gm = functional(program, x34())
    assert not any(g.is_mutable(n.target) for n in gm.graph.nodes)


# ----------------------------------------------------------------------------------------------- aliasing


def test_what_may_be_a_view() -> None:
    gm = capture(lambda x: (x.t()[1], x.split(2)[1], x.to(torch.float64), x * 2, x.sort().values), x34()).gm
    (x,) = g.placeholders(gm.graph)
    view, piece, cast, product, values = g.output_node(gm.graph).args[0]
    assert viewed(view).target is aten.t.default and root(view) is x and root(piece) is x
    assert viewed(cast) is None and viewed(product) is None and root(values) is not x
    assert storage(g.val(view)) == storage(g.val(x)) != storage(g.val(product))
    assert storage(3) is None and storage(g.val(piece.args[0])) == storage(g.val(x))


def test_what_is_written() -> None:
    def program(x, y, z):
        torch.add(x, 1, out=y)
        torch._foreach_add_([z], 1)
        return x.detach_()

    gm = capture(program, x34(), x34(), x34()).gm
    _, y, z = g.placeholders(gm.graph)
    written = [written_arguments(n) for n in gm.graph.nodes if writes(n)]
    assert written == [(y,), (z,)] and written_inputs(gm.graph) == {y, z}


# ------------------------------------------------------------------------------------------ random programs


@settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(programs(size=12))
def test_random_programs_are_eagers(program: Program) -> None:
    """Values bit for bit, mutated inputs, and who shares memory with whom."""
    captured = capture(program, *program.arguments())
    try:
        canonicalize(captured.gm)
    except CaptureRefused as refused:
        assert "expand" in refused.reason, refused.reason
        return
    assert all(n.args[0].op == "placeholder" for n in calls(captured.gm, aten.copy_.default))
    compare(program, captured, tuple(program.arguments()), layout=False)
