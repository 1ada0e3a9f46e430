"""graphopt.tools.zoo.census: what is counted in an eager run, by something that the rules do not share."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.tools.zoo.build import build, tiny_config
from graphopt.tools.zoo.census import normalises, watching


class Scores(nn.Module):
    """Attention by hand; with `values` off, the softmax is read by a weight only."""

    def __init__(self, values: bool, weight: bool = False) -> None:
        super().__init__()
        self.values, self.w = values, nn.Parameter(torch.randn(6, 6)) if weight else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x @ (x.mT if self.w is None else self.w.t())
        probabilities = F.dropout(torch.softmax(scores / 2, -1), 0.0)
        return probabilities.contiguous() @ x if self.values else probabilities


@pytest.mark.parametrize(
    ("model", "wanted"), [(Scores(True), 1), (Scores(False), 0), (Scores(True, weight=True), 0)]
)
def test_an_attention_is_a_softmax_between_two_products(model: nn.Module, wanted: int) -> None:
    with torch.no_grad(), watching(model) as seen:
        model(torch.randn(2, 6, 6))
    assert seen.counts["attention"] == wanted == len(seen.logits)


class Scaled(nn.Module):
    """Called a norm, but an affine map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class FakeNorm(Scaled):
    """Its name ends in norm."""


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (nn.LayerNorm(8), True),
        (nn.RMSNorm(8), True),
        (FakeNorm(), False),
        (nn.BatchNorm1d(5).eval(), False),
        (nn.GroupNorm(5, 5), False),  # forgets each row's scale, too; its weights lie along the channels
        (nn.GroupNorm(1, 5), False),
    ],
)
def test_a_norm_forgets_the_scale_of_each_row(module: nn.Module, wanted: bool) -> None:
    assert normalises(module, (torch.randn(3, 5, 8),), {}) is wanted


def test_functions_count_like_modules() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act, self.up = nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(self.norm(x + x), (4,)) + F.gelu(self.up(x)) + self.act(x)

    counts = _counts(Both(), torch.randn(2, 4))
    assert counts == {"norm": 2, "norm of a sum": 1, "mlp": 2, "linear": 1}


class MatrixExperts(nn.Module):
    """Called experts, but one product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class StackedExperts(nn.Module):
    """Experts on stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(2, 4, 4)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x @ self.up[0]) @ self.down[0]


class NamedExperts(nn.ModuleDict):
    """Experts by their names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(expert(x) for expert in self.values())  # type: ignore[return-value]  # a sum of tensors is one


class ListOfExperts(nn.Module):
    """Experts in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.SiLU()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(expert(x) for expert in self.experts)  # type: ignore[return-value]  # a sum of tensors is one


class TwoProducts(nn.Module):
    """Experts of two products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = MatrixExperts(), MatrixExperts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.up(x)))


@pytest.mark.parametrize(
    ("make", "experts"),
    [
        (StackedExperts, 1),
        (lambda: NamedExperts({"a": nn.Sequential(nn.Linear(4, 4), nn.SiLU())}), 1),
        (ListOfExperts, 1),
        (TwoProducts, 1),
        (MatrixExperts, 0),
        (lambda: nn.Sequential(ListOfExperts(), StackedExperts(), nn.SiLU()), 2),
    ],
)
def test_experts_are_counted_by_blocks(make: Callable[[], nn.Module], experts: int) -> None:
    """A block once, however its experts are kept; what is inside is no MLP besides."""
    model = make()
    counts = _counts(model, torch.randn(2, 4))
    assert counts.get("experts", 0) == experts
    assert counts.get("mlp", 0) == isinstance(model, nn.Sequential)


def _counts(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    with torch.no_grad(), watching(model) as seen:
        model(x)
    return {name: n for name, n in seen.counts.items() if n}


def test_watching_leaves_the_model_as_it_was() -> None:
    model = build(tiny_config("llama"))
    file = sys.modules[type(model).__module__]
    before = file.apply_rotary_pos_emb
    with watching(model):
        assert file.apply_rotary_pos_emb is not before
    assert file.apply_rotary_pos_emb is before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
