"""Shapes that change: two graphs at most for 20 lengths and 4 batch sizes, with a fixed shape's matches."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import nn

from graphopt.accuracy import judge, raise_to_fp64
from graphopt.report import Report
from tests.models import zoo

LENGTHS = range(2, 22)
BATCHES = (2, 1, 3, 5)
HOW = ("dynamic", "mark", "automatic")

pytestmark = pytest.mark.usefixtures("emptied")


def shapes(how: str) -> list[tuple[int, int]]:
    """(batch, length) of each call.

    Torch compiles for a batch of 1 apart, whatever it is told; what becomes dynamic by itself is a second
    graph already, after a call in which both sizes are others: its batches are 2, 3, 5 and 7. Two sizes that
    are equal in the first dynamic call are one symbol to torch.
    """
    if how == "automatic":
        return [(2, 2), (3, 3), *itertools.product((2, 3, 5, 7), LENGTHS)]
    return [(2, 9), *itertools.product(BATCHES, LENGTHS)]


@functools.cache
def tokens(name: str) -> torch.Tensor:
    """Random ids [7, 21], of which each call is given the first."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, zoo.model(name).config.vocab_size, (7, max(LENGTHS)), generator=generator)


def given(name: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    """One call's inputs; nothing is padded."""
    ids = tokens(name)[:batch, :length].clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@functools.cache
def oracle(name: str) -> torch.Tensor:
    """In fp64, the logits [20, 7, 21, vocabulary] of 7 rows at 20 lengths: one call, padded on the right."""
    ids = tokens(name)
    lengths = torch.tensor(LENGTHS)[:, None, None]
    mask = (torch.arange(ids.shape[1]) < lengths).expand(len(LENGTHS), *ids.shape).long()
    values = {"input_ids": (ids * mask).flatten(0, 1), "attention_mask": mask.flatten(0, 1)}
    model = zoo.model(name)
    logits = raise_to_fp64(zoo.trace(lambda **x: model(**x).logits, values))(*values.values())
    return logits.unflatten(0, mask.shape[:2])


def ours_of(report: Report) -> dict[str, int]:
    """The ops of our vocabulary that a graph has."""
    return {name: n for name, n in report.counts.items() if "." not in name}


def strictly(model: nn.Module, dynamic: bool | None) -> nn.Module:
    """The model under the backend."""
    compiled = torch.compile(
        model, backend="graphopt", options={"strict": True}, fullgraph=True, dynamic=dynamic
    )
    assert isinstance(compiled, nn.Module)
    return compiled


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_20_lengths_and_4_batches_are_two_graphs(name: str, how: str) -> None:
    model = zoo.model(name)
    cache = {"use_cache": False} if zoo.FAMILIES[name].caches else {}
    ours = strictly(model, {"dynamic": True}.get(how))

    def call(batch: int, length: int) -> torch.Tensor:
        values = given(name, batch, length)
        if how == "mark":
            for x in values.values():
                torch._dynamo.mark_dynamic(x, (0, 1))
        return ours(**values, **cache).logits

    with torch.no_grad():
        results, reports = zoo.reports_of(lambda: {shape: call(*shape) for shape in shapes(how)})
        eager = {(b, n): model(**given(name, b, n), **cache).logits for b, n in results}
        _, fixed = zoo.reports_of(lambda: strictly(model, False)(**given(name, 2, 9), **cache))
    right = {(b, n): oracle(name)[LENGTHS.index(n), :b, :n] for b, n in results}
    verdict = judge(
        *({str(k): x for k, x in each.items()} for each in (right, eager, results)), torch.float32
    )
    assert verdict.ok, verdict.reason
    assert len(results) == 80 and all(
        torch.equal(results[k].argmax(-1), eager[k].argmax(-1)) for k in results
    )

    assert len(reports) <= 2, "batch 1 apart, or the first call's own sizes"
    assert not [r.fallback for r in reports if r.fallback]
    (static,) = fixed
    assert static.counts["attention"] == 2 and static.unmatched_share == 0
    for report in reports:
        assert ours_of(report) == ours_of(static) and report.unmatched_share == 0


def test_a_cache_that_grows_is_three_graphs() -> None:
    from transformers import DynamicCache

    model = zoo.model("llama")
    ours, ids = strictly(model, None), tokens("llama")[:2]
    past, theirs = (DynamicCache(config=model.config) for _ in range(2))
    steps = [ids[:, :7], *ids[:, 7:19].split(1, 1)]
    with torch.no_grad():
        logits, reports = zoo.reports_of(
            lambda: [ours(input_ids=x, past_key_values=past).logits for x in steps]
        )
        eager = [model(input_ids=x, past_key_values=theirs).logits for x in steps]
    right = oracle("llama")[LENGTHS.index(19), :2, :19]
    verdict = judge({"logits": right}, {"logits": torch.cat(eager, 1)}, {"logits": torch.cat(logits, 1)},
                    torch.float32)  # fmt: skip
    assert verdict.ok, verdict.reason
    assert len(reports) == 3, "the prompt, a step, and a step behind any number of tokens"
    step, any_step = reports[1:]
    assert ours_of(step) == ours_of(any_step) and step.counts["cache_update"] == 4
