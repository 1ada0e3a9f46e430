"""What weights are owned by: ways into what was prepared, stand-ins, marks; nothing is half released."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import graphopt
from graphopt import backend
from graphopt.errors import WeightError
from graphopt.ownership import Marked, Owners, follow, is_stand_in, keeps_layout, stand_in, ways
from tests.block import block
from tests.owned import prepare_graph, rows, stand_ins

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("emptied")


# --------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize(
    ("build", "found", "rows_only"),
    [
        (lambda call, a, b: call(aten.cat.default, [a, b], 0), {0, 1}, True),
        (lambda call, a, b: call(aten.cat.default, [a, b], -2), {0, 1}, True),
        (
            lambda call, a, b: call(aten.cat.default, [call(aten.t.default, x) for x in (a, b)], 1),
            {0, 1},
            False,
        ),
        (
            lambda call, a, b: call(aten.permute.default, call(aten.cat.default, [a, b], 0), [1, 0]),
            {0, 1},
            False,
        ),
        (
            lambda call, a, b: call(aten.transpose.int, call(aten.cat.default, [b, a], 0), 0, -1),
            {0, 1},
            False,
        ),
        (lambda call, a, b: call(aten.cat.default, [a, call(aten.mul.Tensor, b, 2)], 0), {0}, True),
        (lambda call, a, b: call(aten.cat.default, [a, a, b], 0), {1}, True),
        (lambda call, a, b: call(aten.cat.default, [a, call(aten.clone.default, b)], 0), {0, 1}, True),
        (lambda call, a, b: call(aten.slice.Tensor, call(aten.cat.default, [a, b], 0), 0, 1, 9), set(), True),
        (lambda call, a, b: call(aten.to.dtype, a, torch.float64), set(), True),
        (lambda call, a, b: call(aten.sum.default, a), set(), True),
    ],
)
def test_ways_lead_to_what_was_put_in(
    build: Callable[..., fx.Node], found: set[int], rows_only: bool
) -> None:
    gm = prepare_graph(build, (7, 5), (4, 5))
    weights = [torch.randn(7, 5), torch.randn(4, 5)]
    result, ways_found = gm(*weights), ways(gm)
    assert set(ways_found) == found
    for i, way in ways_found.items():
        part = follow(way, result)
        assert torch.equal(part, weights[i]) and keeps_layout(way) == rows_only
        assert part.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()


def test_what_is_a_stand_in() -> None:
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = stand_in((3, 1, 4), dtype, cpu)
        assert (
            is_stand_in(x) and x.shape == (3, 1, 4) and x.dtype == dtype and x.untyped_storage().nbytes() < 16
        )
    for other in (
        torch.full((3, 4), math.nan),
        torch.full((1,), math.nan).expand(4),
        torch.zeros(1, 1).expand(3, 4),
        torch.zeros(1, 1, dtype=torch.int8).expand(3, 4),
        torch.empty(1, 1, device="meta").expand(3, 4),
        torch.empty(0, 3),
        None,
        3,
    ):
        assert not is_stand_in(other)
    assert not is_stand_in(stand_in((3, 4), torch.float32, cpu).zero_())


def test_marks_die_with_their_tensors() -> None:
    marked = Marked()
    kept = [torch.zeros(1) for _ in range(3)]
    for x in (*kept, torch.zeros(1)):
        marked.add(x)
    del x
    gc.collect()
    assert len(marked._tensors) == 3 and all(x in marked for x in kept) and torch.zeros(1) not in marked


def test_a_dead_model_is_owned_no_more() -> None:
    owners = backend.STORE.owners
    assert isinstance(owners, Owners)
    model = graphopt.optimize(block())
    weight = model.q.weight
    assert id(weight) in owners.releasable()
    del model
    gc.collect()
    assert id(weight) not in owners.releasable()


# --------------------------------------------------------------------------------------------------- NaN


class Chain(nn.Module):
    """Two packed weights, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = (nn.Parameter(torch.randn(64, 64) / 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.first), self.last)


class TiedAfter(Chain):
    """The last weight is a table, too: it stays."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.last[0])


@pytest.mark.parametrize("kind", [Chain, TiedAfter])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_cannot_be_packed_is_found_before_any_is_released(
    value: float, kind: type[Chain]
) -> None:
    model = kind().eval()
    with torch.no_grad():
        model.last[3, 5] = value
    before = copy.deepcopy(dict(model.named_parameters()))
    graphopt.optimize(model, quantize="int8", strict=True)
    with pytest.raises(WeightError, match=r"weight last \(64, 64\): it has values that are not finite"):
        model(rows())
    assert stand_ins(model) == set()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) or name == "last"
    with torch.no_grad():
        model.last[3, 5] = 0.5
    found = model(rows())
    assert stand_ins(model) == ({"first", "last"} if kind is Chain else {"first"})
    assert bool(found.isfinite().all())
