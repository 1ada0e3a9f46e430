"""Masks and clamps that integers of a choice never meet: which go, and which must stay."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphopt import torch_private
from graphopt.capture import Captured, capture
from graphopt.passes.canonicalize import canonicalize
from tests.eager import compare
from tests.graphs import calls

aten = torch.ops.aten
Program = Callable[[Tensor], object]
E = 7
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)


def canonical(program: Program, x: Tensor) -> Captured:
    captured = capture(program, x)
    canonicalize(captured.gm)
    return captured


def scores() -> Tensor:
    """[5, E]: with a nan and infinities, whose places are among 0 .. E - 1 as well."""
    x = torch.randn(5, E, generator=torch.Generator().manual_seed(0))
    x[0, 1], x[1, 2], x[2, 3] = float("nan"), float("inf"), -float("inf")
    return x


def filled(mask_of: Callable[[Tensor], Tensor]) -> Program:
    """The scores, 9 where a mask of one column says so."""
    return lambda x: x.masked_fill(mask_of(x), 9.0) * 2


def column(x: Tensor, k: int = 1) -> Tensor:
    return x.topk(k, -1)[1]


@pytest.mark.parametrize(
    "program",
    [
        filled(lambda x: column(x) >= E),
        filled(lambda x: column(x) > E - 1),
        filled(lambda x: column(x) < 0),
        filled(lambda x: column(x) <= -1),
        filled(lambda x: column(x) == E),
        filled(lambda x: x.argmax(-1, keepdim=True) >= E),
        filled(lambda x: x.max(-1, keepdim=True)[1] >= E),
        filled(lambda x: x.argsort(-1) >= E),
        filled(lambda x: (x.topk(2, -1)[1].reshape(-1).sort()[0] >= E)[:5].unsqueeze(-1)),
        filled(lambda x: x.sort(-1)[1].gather(1, column(x)) >= E),
        filled(lambda x: torch.cat([column(x), x.min(-1, keepdim=True)[1]], -1)[:, 1:] >= E),
        filled(lambda x: torch.stack([x.argmax(-1), x.argmin(-1)], -1)[:, :1] >= E),
        filled(lambda x: column(x).to(torch.int32)[torch.arange(5)] >= E),
        filled(lambda x: column(x, 3).clamp(0, 2)[:, :1] >= 3),
        lambda x: x.masked_fill_(column(x) >= E, 9.0) * 2,
        lambda x: x.masked_fill(column(x) >= E, torch.tensor(9.0)) * 2,
        lambda x: x.masked_fill(column(x) >= E, 9.0),  # in memory of its own
        lambda x: (x, x.masked_fill(column(x) >= E, 9.0).add_(1.0)),
    ],
)
def test_a_mask_that_is_false_everywhere_goes(program: Program) -> None:
    captured = canonical(program, scores())
    assert not calls(captured.gm, *FILLS)
    compare(program, captured, (scores(),), layout=False)


@pytest.mark.parametrize(
    "program",
    [
        filled(lambda x: column(x) >= E - 1),
        filled(lambda x: column(x) > E - 2),
        filled(lambda x: column(x) <= 0),
        filled(lambda x: column(x) == E - 1),
        filled(lambda x: column(x) != E),
        filled(lambda x: x.argmax(0, keepdim=True) >= 4),
        filled(lambda x: x.topk(1, -1)[0] >= E),  # the scores themselves
        filled(lambda x: column(x) + 1 >= E),
        filled(lambda x: torch.cat([column(x), x[:, :1].long()], -1)[:, 1:] >= E),
        filled(lambda x: x.long() >= E),
        filled(lambda x: column(x).clamp(min=E + 2) >= E),
        filled(lambda x: column(x) >= column(x) + 1),
        lambda x: x[:, :1].masked_fill(x.argsort(-1) >= E, 9.0) * 2,  # it spreads x
    ],
)
def test_a_mask_that_may_be_true_stays(program: Program) -> None:
    captured = canonical(program, scores())
    assert len(calls(captured.gm, *FILLS)) == 1
    compare(program, captured, (scores(),), layout=False)


@pytest.mark.parametrize(
    ("clamped", "stays"),
    [
        (lambda i: i.clamp(0, E - 1), False),
        (lambda i: i.clamp(max=E - 1), False),
        (lambda i: i.clamp(min=0), False),
        (lambda i: i.clamp_(max=E - 1), False),
        (lambda i: i.clamp(0, E - 2), True),
        (lambda i: i.clamp(min=1), True),
        (lambda i: i.clamp(max=E - 1.5), True),
        (lambda i: i.clamp(E, 2), True),  # the largest wins
    ],
)
def test_a_clamp_stays_where_it_may_change_a_number(clamped: Callable[[Tensor], Tensor], stays: bool) -> None:
    def program(x: Tensor) -> Tensor:
        return clamped(column(x, 2)) * 2

    captured = canonical(program, scores())
    spellings = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
    assert any(calls(captured.gm, spelling) for spelling in spellings) is stays
    compare(program, captured, (scores(),), layout=False)


def test_a_number_of_choices_that_is_a_symbol_bounds_nothing() -> None:
    mode = torch_private.new_fake_mode(symbolic=True)
    size = torch_private.symbolic_int(mode, "n", E)
    with mode:
        x = torch.empty([5, size])  # type: ignore[call-overload]  # a symbol
    captured = canonical(filled(lambda x: column(x) >= E), x)
    assert len(calls(captured.gm, *FILLS)) == 1
