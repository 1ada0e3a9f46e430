"""Ids of matches under denial: a denied match is one match, and those after it keep their ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt import defaults, ops
from graphopt.capture import capture
from graphopt.observe import Event, Matched
from graphopt.options import Options
from graphopt.pipeline import Pipeline
from graphopt.rewrite import DENIED
from graphopt.rule import T, rule
from tests.models import zoo
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


def test_a_rule_of_two_passes_gives_no_id_twice() -> None:
    """Residual norms are recognised, and again when linears have been fused around them."""
    program = capture(zoo.model("bert"), **zoo.inputs(zoo.model("bert"), zoo.Case()))
    options = Options(target="cuda:90")
    ctx, road = defaults.context(options), defaults.pipeline(options, until="fuse")
    ids = [m.id for m in road.run(program, ctx)[1].matches]
    seen: list[str] = []
    ctx.observers = (Collector(seen),)
    road.run(program, ctx)
    assert any(i.startswith("residual_layer_norm@") and i.endswith("~2") for i in seen)
    assert len(seen) == len(set(seen)) and set(seen) == set(ids)


class Collector:
    """Keeps the id of each match, as it is told."""

    def __init__(self, ids: list[str]) -> None:
        self.ids = ids

    def on_event(self, event: Event) -> None:
        if isinstance(event, Matched):
            self.ids.append(event.match.id)
