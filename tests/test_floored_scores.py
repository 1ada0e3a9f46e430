"""A floor under masked scores: attention where it swallows a score, the program as written where not."""

from __future__ import annotations

import pytest
import torch

from graphopt import backend
from tests.tolerances import close


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A row whose keys are all hidden by -inf gives their mean: XGLM's."""
    scores = (q @ k.transpose(-1, -2) + mask).clamp(min=torch.finfo(q.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_without_keys_is_a_mean(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 8).to(dtype) for _ in range(3))
    mask = torch.zeros(4, 4, dtype=dtype).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
    mask[0] = float("-inf")
    backend.clear_reports()
    torch.compiler.reset()
    with torch.no_grad():
        ours = torch.compile(attend, backend="graphopt")(q, k, v, mask)
    (report,) = backend.reports()
    recognised = report.counts.get("attention", 0) if report.fallback is None else 0
    assert recognised == (dtype != torch.float16)
    assert torch.isfinite(ours).all()
    exact = [x.double() for x in (q, k, v, mask)] if recognised else (q, k, v, mask)
    close(ours, attend(*exact), dtype)
    close(ours[:, :, 0], v.double().mean(2), dtype)


def test_a_clamp_of_one_side_has_one_spelling() -> None:
    for program in (lambda x: x.clamp(min=0.5), lambda x: torch.clamp_min(x, 0.5), lambda x: x.clamp(0.5)):
        backend.clear_reports()
        torch.compiler.reset()
        x = torch.randn(3, 4)
        assert torch.equal(torch.compile(program, backend="graphopt")(x), program(x))
        (report,) = backend.reports()
        assert list(report.counts) == ["aten.clamp_min"]
