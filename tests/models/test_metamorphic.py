"""What must not change a model's answers: the batch's order, padding, chunks, a pass that runs twice."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch
import transformers
from torch import Tensor

from graphopt import defaults
from graphopt import graph as g
from graphopt.accuracy import judge
from graphopt.capture import capture
from graphopt.passes.merge import Merge
from graphopt.passes.quantize import Quantize
from graphopt.passes.recognise import Recognise
from graphopt.pipeline import Pass, Pipeline
from graphopt.tools.zoo.census import expected_counts, recognised_counts
from tests.models import zoo

# One model of each kind of attention: grouped, windowed with a softcap, packed, of an encoder.
KINDS = ("llama", "gemma2", "gpt2", "bert")
CAUSAL = KINDS[:3]
CHUNKED = (
    ("llama", "dynamic"),
    ("gemma2", "dynamic"),
    ("gemma2", "static"),
    ("gpt2", "static"),
    ("qwen3", "static"),
)
IDEMPOTENT = (
    *((name, p) for name in zoo.FAMILIES for p in (Recognise(), Merge())),
    ("llama", Quantize("int8", 8)),
)


pytestmark = pytest.mark.usefixtures("fresh")


def compiled(name: str) -> torch.nn.Module:
    """The tiny model, whatever is not recognised raises."""
    return torch.compile(zoo.model(name), backend="graphopt", options={"strict": True})


def assert_like(name: str, ours: Tensor, other: Tensor, eager: Tensor) -> None:
    """Two of our runs differ by no more than the accuracy rule lets one run differ from fp64."""
    verdict = judge({"logits": other.double()}, {"logits": eager}, {"logits": ours}, torch.float32)
    assert verdict.ok, f"{name}: {verdict.reason}"


@pytest.mark.parametrize("name", KINDS)
def test_the_batch_may_come_in_any_order(name: str) -> None:
    given = zoo.inputs(zoo.model(name), zoo.Case(batch=4, padding="left"))
    order = torch.tensor([2, 0, 3, 1])
    ours, there = compiled(name), given["attention_mask"].bool()
    logits = ours(**given).logits
    moved = ours(**{key: x[order] for key, x in given.items()}).logits
    eager = zoo.model(name)(**given).logits
    assert_like(name, moved[there[order]], logits[order][there[order]], eager[order][there[order]])


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    """A row alone, and beside a longer one; positions are counted from its own first token."""
    model, ours, pad = zoo.model(name), compiled(name), 3
    ids = zoo.inputs(model, zoo.Case(batch=2, length=6))["input_ids"]
    padded = torch.cat([ids.new_zeros(2, pad), ids], 1)
    mask = (torch.arange(pad + 6) >= pad).long().expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wide = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_like(name, ours(**wide).logits[:, pad:], ours(**plain).logits, model(**plain).logits)


@pytest.mark.parametrize(("name", "cache"), CHUNKED)
def test_a_prompt_in_chunks_is_the_whole_prompt(name: str, cache: str) -> None:
    model, ours = zoo.model(name), compiled(name)
    ids = zoo.inputs(model, zoo.Case(batch=2, length=9))["input_ids"]

    def run(chunks: tuple[int, ...]) -> Tensor:
        past = (
            transformers.DynamicCache(config=model.config)
            if cache == "dynamic"
            else transformers.StaticCache(config=model.config, max_cache_len=zoo.STATIC_LENGTH)
        )
        return torch.cat([ours(input_ids=x, past_key_values=past).logits for x in ids.split(chunks, 1)], 1)

    eager = model(input_ids=ids).logits
    assert_like(name, run((4, 3, 2)), run((9,)), eager)


# -------------------------------------------------------------------------------------------------- passes


def program(name: str) -> tuple[object, Mapping[str, Tensor]]:
    """A model's captured program and its inputs."""
    given = zoo.inputs(zoo.model(name), zoo.Case(padding="left"))
    return capture(zoo.model(name), **given, use_cache=False), given


@pytest.mark.parametrize(("name", "again"), IDEMPOTENT, ids=lambda x: getattr(x, "name", x))
def test_a_pass_twice_is_the_pass_once(name: str, again: Pass) -> None:
    """Canonicalize comes before recognised ops by its contract; that it is idempotent is tested with it."""
    captured, _ = program(name)
    road: list[Pass] = [*defaults.pipeline(until="merge").passes]
    if again.name == "quantize":
        road.append(again)
    cut = [p.name for p in road].index(again.name) + 1
    once, _ = Pipeline(tuple(road[:cut])).run(captured, defaults.context())
    twice, _ = Pipeline((*road[:cut], again)).run(captured, defaults.context())
    assert g.fingerprint(once.gm.graph) == g.fingerprint(twice.gm.graph)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_rules_in_any_order_are_right(monkeypatch: pytest.MonkeyPatch, name: str, seed: int) -> None:
    """Their order decides between spellings of one thing; the counts of a model that is written once stay."""
    rules = list(defaults.RULES)
    random.Random(seed).shuffle(rules)
    monkeypatch.setattr(defaults, "RULES", tuple(rules))
    model = zoo.model(name)
    captured, given = program(name)
    ours, report = defaults.pipeline().run(captured, defaults.context())
    there = given["attention_mask"].bool()
    eager = model(**given).logits
    assert_like(name, ours(**given, use_cache=False).logits[there], eager[there], eager[there])
    assert recognised_counts(report.counts) == expected_counts(model, **given), str(report)
