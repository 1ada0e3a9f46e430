"""einsum becomes permute, reshape and matmul: the same bits, for every kind of label; the rest stays."""

from __future__ import annotations

import pytest
import torch

from graphopt.capture import Captured, capture
from graphopt.passes.canonicalize import canonicalize
from graphopt.passes.einsum import Equation, equation_of
from tests.eager import compare
from tests.graphs import calls

aten = torch.ops.aten
SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "f": 7}


def canonical(text: str, *tensors: torch.Tensor) -> Captured:
    captured = capture(lambda *x: torch.einsum(text, *x), *tensors)
    canonicalize(captured.gm)
    return captured


def operands(text: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    parts = text.split("->")[0].replace("...", "ab").split(",")
    return [torch.randn([SIZES[c] for c in part.strip()]) for part in parts]


PRODUCTS = [
    "abcd,abed->abce",  # scores
    "abce,abed->abcd",  # weights and values
    "bcad,beda->bace",  # scores of BERT's layout
    "bace,bead->bcad",
    "abc,cde->abde",  # XLNet's projections
    "abcd,ecd->abe",
    "acbd,ebcd->baec",  # a result in another order
    "ab,bc",  # the result is understood
    "cb,ba",
    "...cd,...ed->...ce",
    "...cd,de->...ce",
    "abcd,abef->abcdef",  # nothing is summed
    "abc,abc->ab",  # no rows, no columns
    "abc,abc->",
    "a,a->",
    "bcad,acdb->a",
    "ab,b->a",
    "b,ba->a",
    "abc,dc->dba",
    "abcd,abe->abe",  # one operand's label is summed alone
    "aab,bc->ac",  # a diagonal
    "ab,bc,cd->ad",
    "abcd->dbca",
    "...c->c...",
    "abc->ab",
]
STAYS = ("abcd,abef->abcdef", "abcd,abe->abe", "aab,bc->ac", "ab,bc,cd->ad", "abc->ab")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", PRODUCTS)
def test_the_same_bits(text: str, dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in operands(text)]
    captured = canonical(text, *given)
    compare(lambda *x: torch.einsum(text, *x), captured, tuple(given), layout=False)
    assert bool(calls(captured.gm, aten.einsum.default)) == (text in STAYS)
    assert len(calls(captured.gm, aten.matmul.default)) == ("," in text and text not in STAYS)


def test_what_broadcasts_stays() -> None:
    given = (torch.randn(1, 3, 4), torch.randn(2, 4, 5))
    captured = canonical("abc,acd->abd", *given)
    assert calls(captured.gm, aten.einsum.default)
    compare(lambda *x: torch.einsum("abc,acd->abd", *x), captured, given, layout=False)


def test_changing_sizes() -> None:
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 4, 8)
    batch, rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "rows", "columns"))

    class Scores(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bind,bjnd->bnij", q, k)

    shapes = ({0: batch, 1: rows}, {0: batch, 1: columns})
    captured = capture(torch.export.export(Scores(), (q, k), dynamic_shapes=shapes, strict=False))
    canonicalize(captured.gm)
    assert calls(captured.gm, aten.matmul.default) and not calls(captured.gm, aten.einsum.default)
    q, k = torch.randn(7, 2, 4, 8), torch.randn(7, 9, 4, 8)
    compare(Scores(), captured, (q, k), layout=False)


@pytest.mark.parametrize(
    ("text", "ranks", "found"),
    [
        ("...qd, ...kd -> ...qk", (4, 4), Equation(("01qd", "01kd"), "01qk")),
        ("...qd,...kd->...qk", (3, 4), Equation(("1qd", "01kd"), "01qk")),
        ("ba,cb", (2, 2), Equation(("ba", "cb"), "ac")),
        ("...a,...a", (2, 2), Equation(("0a", "0a"), "0")),
        ("ab,bc", (2, 3), None),
        ("aa->a", (2,), None),
        ("a,b,c->abc", (1, 1, 1), None),
    ],
)
def test_equations(text: str, ranks: tuple[int, ...], found: Equation | None) -> None:
    assert equation_of(text, ranks) == found
