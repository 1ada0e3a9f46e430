"""Equal calls that rules made become one; what the program itself says twice, and what is written, stays."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt import graph as g
from graphopt.defaults import context
from graphopt.passes.duplicates import merge_made
from graphopt.passes.recognise import Recognise
from tests.rewriting import canonical
from tests.tensors import rand

aten = torch.ops.aten


def recognised(program: object, *args: Tensor) -> fx.GraphModule:
    gm = canonical(program, *args)  # type: ignore[arg-type]  # a callable
    Recognise().run(gm, context())
    gm.graph.lint()
    return gm


def count(gm: fx.GraphModule, name: str) -> int:
    return sum(g.op_name(n) == name for n in gm.graph.nodes)


def biased(x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(x @ x.mT + bias + mask, -1) @ x


def test_layers_share_the_sum_of_bias_and_mask() -> None:
    """Two layers add the same bias and the same mask to their scores: one sum, two attentions."""
    args = rand(2, 3, 5, 8), rand(1, 3, 5, 5), rand(2, 1, 5, 5)
    program = lambda x, bias, mask: biased(biased(x, bias, mask), bias, mask)
    gm = recognised(program, *args)
    assert count(gm, "attention") == 2 and count(gm, "aten.add") == 1
    torch.testing.assert_close(gm(*args)[0], program(*args))


def test_a_graph_that_is_written_in_place_is_left_alone() -> None:
    """Two equal reads around a write are two values."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first, _, second = (
        graph.call_function(aten.neg.default, (x,)),
        graph.call_function(aten.add_.Tensor, (x, 1)),
        graph.call_function(aten.neg.default, (x,)),
    )
    graph.output((first, second))
    second.meta["origin"] = g.Origin("a rule", "an id", ())
    gm = fx.GraphModule({}, graph)
    assert merge_made(gm) == 0
    a, b = gm(torch.zeros(2))
    assert not torch.equal(a, b)


def test_weights_that_became_no_attention_go_back() -> None:
    """Weights that the program returns are a softmax again, with sinks a softmax over one column more."""

    def program(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        scores = q @ k.mT * 0.5
        plain = torch.softmax(scores, -1)
        logits = torch.cat((q @ k.mT * 0.25, sinks.reshape(1, 3, 1, 1).expand(2, 3, 4, 1)), -1)
        sunk = torch.softmax(logits, -1)[..., :-1]
        return plain @ v, plain, sunk @ v, sunk

    args = rand(2, 3, 4, 8), rand(2, 3, 5, 8), rand(2, 3, 5, 6), rand(3)
    gm = recognised(program, *args)
    half_way = ("attention", "attention_scores", "attention_weights")
    assert [count(gm, name) for name in half_way] == [0, 0, 0]
    assert count(gm, "aten.softmax") == 2
    for have, want in zip(gm(*args), program(*args), strict=True):
        torch.testing.assert_close(have, want)


def test_a_constant_tensor_is_a_fill() -> None:
    """where(seen, scores, torch.tensor(lowest)) hides as the number does (GPT-Neo)."""
    lowest = torch.tensor(torch.finfo(torch.float32).min)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    program = lambda x, seen: torch.softmax(torch.where(seen, x @ x.mT, lowest), -1) @ x
    args = rand(2, 3, 5, 8), seen
    gm = recognised(program, *args)
    assert count(gm, "attention") == 1
    torch.testing.assert_close(gm(*args)[0], program(*args))
