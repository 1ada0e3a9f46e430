"""Optimized models: a weight that something else reads as it is stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphopt
from graphopt import backend
from graphopt import graph as g
from graphopt.errors import ReleasedError
from graphopt.options import Options
from graphopt.ownership import Owned, is_stand_in, stand_in
from graphopt.weights import Prepared, PreparePlan, WeightStore
from tests.block import agree
from tests.owned import OPTIONS, Packed, compiled, owned, packed, prepare_graph, rows, stand_ins
from tests.threads import in_threads

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("emptied")


class Tied(nn.Module):
    """An embedding whose table is the head's weight too; a graph break makes two programs of it."""

    def __init__(self, breaks: bool = False, late: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.breaks, self.late = breaks, late

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(tokens, 64).float() if self.late else self.embed(tokens)
        if self.breaks:
            torch._dynamo.graph_break()
        x = nn.functional.linear(x, self.embed.weight)
        if self.late:
            torch._dynamo.graph_break()
            x = x + self.embed(tokens).sum()
        return x


@pytest.mark.parametrize("breaks", [False, True])
def test_a_weight_that_is_read_as_it_is_too_stays(breaks: bool) -> None:
    model, tokens = Tied(breaks).requires_grad_(False), torch.tensor([[1, 5, 2]])
    expected = compiled(copy.deepcopy(model))(tokens)
    graphopt.optimize(model, strict=True, **OPTIONS)
    for _ in range(2):
        agree(model(tokens), expected)
    assert not stand_ins(model)


def test_a_later_program_that_reads_it_as_it_is_says_so() -> None:
    model = graphopt.optimize(Tied(late=True), strict=True, **OPTIONS)
    with pytest.raises(ReleasedError, match=r"weight embed\.weight was released"):
        model(torch.tensor([[1, 5, 2]]))
    other = graphopt.optimize(Tied(late=True), release=False, strict=True, **OPTIONS)
    assert not other(torch.tensor([[1, 5, 2]])).isnan().any()


def test_a_parameter_of_two_optimized_models_stays() -> None:
    one, two = packed(1), packed(2)
    two.weight = one.weight
    for model in (one, two):
        graphopt.optimize(model, strict=True, **OPTIONS)
    found = [model(rows()) for model in (one, two)]
    assert not stand_ins(one) and not stand_ins(two)
    one.weight.mul_(3)
    assert all(not torch.equal(m(rows()), y) for m, y in zip((one, two), found, strict=True))


def test_a_part_of_an_optimized_model_is_no_second_model() -> None:
    inner = packed()
    outer = nn.Sequential(inner)
    expected = compiled(packed())(rows())
    graphopt.optimize(inner, strict=True, **OPTIONS)
    graphopt.optimize(outer, strict=True, **OPTIONS)
    agree(outer(rows()), expected)
    agree(outer(rows()), expected)
    assert stand_ins(outer) == {"0.weight"}


def test_another_model_that_shares_a_parameter_hears_of_its_release() -> None:
    other = packed(2)
    model = owned(1)
    other.weight = model.weight
    theirs = compiled(other)
    before = theirs(rows())
    model(rows())
    assert not before.isnan().any() and stand_ins(other) == {"weight"}
    agree(theirs(rows()), before)  # of the same prepared form
    other.weight = nn.Parameter(stand_in((64, 64), torch.float32, torch.device("cpu")), requires_grad=False)
    with pytest.raises(ReleasedError, match="is not held"):
        theirs(rows())


def test_buffers_are_not_owned() -> None:
    class Buffered(Packed):
        def __init__(self) -> None:
            super().__init__()
            weight = self.weight.detach()
            del self.weight
            self.register_buffer("weight", weight)

    model = graphopt.optimize(Buffered().requires_grad_(False), strict=True, **OPTIONS)
    model(rows())
    assert not model.weight.isnan().any()


def test_what_the_model_itself_computes_of_a_weight_does_not_release_it() -> None:
    """A table of positions is read as far as the input is long: another length needs more of it."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 64)
            self.weight = nn.Parameter(torch.randn(64, 64))
            self.register_buffer("numbers", torch.arange(9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.table(self.numbers[: x.shape[0]])
            return x + nn.functional.linear(x, self.weight * 0.5)

    model = Positions().requires_grad_(False)
    expected = {count: model(rows(count)) for count in (3, 5, 9)}
    graphopt.optimize(model, strict=True)
    for count in (3, 5, 9, 3):
        agree(model(rows(count)), expected[count])
    assert not stand_ins(model) and backend.STORE.prepared


@pytest.mark.parametrize("ours", [True, False])
def test_a_part_of_a_weight_does_not_keep_all_of_it(ours: bool) -> None:
    """A rank's rows are copied, and the weight goes; a slice that the model takes is a view."""
    origin = g.Origin("shard", "shard@-#0", ())
    gm = prepare_graph(lambda call, w: call(aten.slice.Tensor, w, 0, 16, 32), (64, 64))
    for node in gm.graph.nodes:
        if node.op == "call_function" and ours:
            node.meta["origin"] = origin
    plan = PreparePlan(gm, "part", (0,), ("weight",))
    store, model = WeightStore(), packed()
    store.owners.add(model, Owned(Options(), release=True))
    rows_of_it = model.weight[16:32].clone()
    prepared = Prepared(store, (plan,), ((0,),))
    for _ in range(2):
        (found,) = prepared(model.weight)
        assert torch.equal(found, rows_of_it)
    assert found.untyped_storage().nbytes() == (1 if ours else 4) * 16 * 64 * 4
    assert is_stand_in(model.weight) == ours and store.prepared == 1


def test_threads_share_one_release() -> None:
    model, expected = owned(), compiled(packed())(rows())
    model(rows())
    model.load_state_dict(packed().state_dict())

    def work() -> None:
        for count in (3, 3, 3):
            agree(model(rows(count)), expected)

    in_threads(*[work] * 4)
    assert stand_ins(model) == {"weight"}
