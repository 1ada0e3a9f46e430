"""Hugging Face `generate` beyond greedy tokens: sampling, beams, helpers, chunks, windows, encoders."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import graphopt
from graphopt import backend
from graphopt.report import Report
from graphopt.tools.zoo.census import expected_counts, recognised_counts
from tests.block import agree, counted
from tests.generating import clean, compile_config, generate, strict_config
from tests.models import caching, zoo
from tests.tolerances import INT8

STATIC = {"cache_implementation": "static"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A clean start, and no traces."""
    with clean():
        yield


def ran(most: int) -> list[Report]:
    """The graphs that were compiled, and that they are ours: at least one, at most so many."""
    reports = list(backend.reports())
    assert 1 <= len(reports) <= most, "the backend was called"
    assert not [r.fallback for r in reports if r.fallback]
    assert all(r.counts["attention"] == 2 and r.unmatched_share == 0 for r in reports)
    return reports


def sample(model: nn.Module, seed: int, **fields: object) -> torch.Tensor:
    """Sampled tokens; the same seed draws the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return generate(model, "left", do_sample=True, temperature=0.9, top_k=20, **fields)


@pytest.mark.parametrize("how", ["config", "enable"])
def test_sampling_draws_what_eager_draws(how: str) -> None:
    model = zoo.model("llama" if how == "config" else "gemma2")
    eager = sample(model, 3)
    if how == "config":
        ours = sample(model, 3, **STATIC, compile_config=strict_config())
    else:
        with graphopt.enable(strict=True):
            ours = sample(model, 3, **STATIC, compile_config=compile_config())
    assert torch.equal(ours, eager) and not torch.equal(eager, sample(model, 4)), "the seed decides"
    ran(most=2)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beam_search_of_an_optimized_model(cache: str) -> None:
    model = caching.build("llama")
    beams = {"num_beams": 3, "num_return_sequences": 2}
    eager = generate(model, "left", **beams)
    assert not torch.equal(eager[::2], generate(model, "left")), (
        "beams that give the greedy tokens show nothing"
    )
    graphopt.optimize(model, strict=True)
    assert torch.equal(generate(model, "left", **beams, cache_implementation=cache), eager)
    ran(most=3)
    with counted() as counts:
        generate(model, "left", **beams, cache_implementation=cache)
    assert counts == {"graphs": 0, "prepared": 0}


def test_an_assistant_and_its_model_are_both_compiled() -> None:
    model, assistant = zoo.model("llama"), copy.deepcopy(zoo.model("llama", tied=False))
    assistant.generation_config.update(
        num_assistant_tokens=3, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    eager = generate(model, batch=1)
    graphopt.optimize(assistant, strict=True)  # generate gives it no compile_config
    ours = generate(model, batch=1, assistant_model=assistant, **STATIC, compile_config=strict_config())
    assert torch.equal(ours, eager)
    prepared = {r.weights_prepared for r in ran(most=8)}
    assert prepared == {4, 8}, "the assistant has no biases to merge"


def test_tokens_looked_up_in_the_prompt() -> None:
    model = copy.deepcopy(zoo.model("llama"))
    eager = generate(model, batch=1)
    graphopt.optimize(model, strict=True)
    assert torch.equal(generate(model, batch=1, prompt_lookup_num_tokens=3), eager)
    ran(most=4)


def test_a_prompt_in_chunks_past_a_window() -> None:
    model = caching.build("gemma3")
    eager = generate(model, "left")
    ours = generate(model, "left", **STATIC, prefill_chunk_size=3, compile_config=strict_config())
    assert torch.equal(ours, eager)
    assert len(ran(most=4)) > 2, "chunks are compiled, not the decode alone"


def test_windows_that_roll() -> None:
    model = caching.build("mistral")
    eager = generate(model, "left")
    assert torch.equal(generate(model, "left", **STATIC, compile_config=strict_config()), eager)
    ran(most=2)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_with_an_encoder(name: str) -> None:
    model = caching.build(name)
    eager = generate(model, "right")
    assert len(set(map(tuple, eager.tolist()))) == 3, "sources that give the same show nothing"
    for _ in range(2):
        ours = generate(model, "right", **STATIC, compile_config=strict_config())
        assert torch.equal(ours, eager)
    (decode,) = backend.reports()
    assert decode.fallback is None and decode.counts["attention"] == 4 and decode.counts["cache_update"] == 4


@pytest.mark.parametrize("first", ["generate", "forward"])
def test_an_optimized_encoder_runs_by_itself_and_in_its_model(first: str) -> None:
    model = caching.build("bart")
    given, decoder_ids = zoo.inputs(model, zoo.Case(padding="right")), torch.full((3, 4), 5)
    with torch.no_grad():
        eager, whole = generate(model, "right"), model(**given, decoder_input_ids=decoder_ids).logits
    encoder = expected_counts(model.get_encoder(), **given)
    graphopt.optimize(model, strict=True, quantize="int8", quantize_group=2)
    with counted() as counts:
        for what in (first, "generate", "forward"):
            if what == "generate":
                assert torch.equal(generate(model, "right"), eager)
                continue
            ours = model(**given, decoder_input_ids=decoder_ids).logits
            assert 0 < (ours - whole).abs().max() < INT8
    seen = backend.reports()
    assert encoder in [recognised_counts(r.counts) for r in seen], "by itself"
    assert {r.counts["attention"] for r in seen} == {2, 4, 6}, "and in one graph with its decoder"
    # 6 in each layer of the encoder, 10 in one of the decoder; Q, K, V are one, and K, V of attention across.
    assert counts["prepared"] == 16, "one form a weight, whoever calls"


def test_an_excluded_encoder_stays_as_it_is_when_it_is_called_alone() -> None:
    model = caching.build("bart")
    given, decoder_ids = zoo.inputs(model, zoo.Case(padding="right")), torch.full((3, 4), 5)
    with torch.no_grad():
        encoded = model.get_encoder()(**given).last_hidden_state
    options = {"quantize": "int8", "quantize_group": 2, "quantize_exclude": ("model.encoder",)}
    graphopt.optimize(model, strict=True, **options)
    agree(model.get_encoder()(**given).last_hidden_state, encoded)
    model(**given, decoder_input_ids=decoder_ids)
    alone, whole = backend.reports()
    assert alone.quantized == 0 and whole.quantized
    assert {r.module_path.split(".")[1] for r in whole.kept if "excluded" in r.reason} == {"encoder"}
