"""Ids of matches under denial: a denied match is one match, and those after it keep their ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt import defaults, ops
from graphopt.pipeline import Pipeline
from graphopt.rewrite import DENIED
from graphopt.rule import T, rule
from tests.rewriting import Watch, canonical, rewritten

SILU = rule(lambda x: x * torch.sigmoid(x), lambda x: ops.activation(x, "silu"), x=T("..."))


def three(x: Tensor) -> Tensor:
    for _ in range(3):
        x = x * torch.sigmoid(x) + 1
    return x


@pytest.fixture(scope="module")
def ids() -> list[str]:
    """The three matches of one place and one shape."""
    _, watch = rewritten(canonical(three, torch.randn(2, 3)), [SILU])
    return [m.id for m in watch.matches]


def test_equal_matches_are_numbered(ids: list[str]) -> None:
    assert len(ids) == 3 and [i.partition("~")[2] for i in ids] == ["", "2", "3"]


@pytest.mark.parametrize("denied", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_exactly_what_is_denied_is_left_out(ids: list[str], denied: tuple[int, ...]) -> None:
    deny = frozenset(ids[i] for i in denied)
    _, watch = rewritten(canonical(three, torch.randn(2, 3)), [SILU], deny=deny)
    assert [m.id for m in watch.matches] == [i for i in ids if i not in deny]
    assert [(r.reason, r.guard) for r in watch.refusals] == [("denied", DENIED)] * len(deny)


def test_a_masks_id_does_not_hang_on_other_rewrites() -> None:
    """Denying every other match renames nodes; the mask is the same mask."""

    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        seen = torch.ones(5, 5, dtype=torch.bool).tril()[None, None] & padding[:, None, None, :]
        q = q * torch.sigmoid(q)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    from graphopt.capture import capture

    q = torch.randn(2, 3, 5, 4)
    program = capture(attend, q, q, q, torch.ones(2, 5, dtype=torch.bool))
    found = []
    for deny in (frozenset[str](), frozenset({"x"})):
        context = defaults.context()
        context.deny = deny
        if deny:
            context.deny = frozenset(m for m in found[0] if not m.startswith(("mask@", "torch_sdpa@")))
        watch = Watch()
        context.observers = (watch,)
        Pipeline(defaults.pipeline(until="recognise").passes).run(program, context)
        found.append([m.id for m in watch.matches])
    masks = [[i for i in ids if i.startswith("mask@")] for ids in found]
    assert len(masks[0]) == 1 and masks[0] == masks[1] and len(found[1]) < len(found[0])
