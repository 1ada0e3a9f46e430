"""Who calls us: Hugging Face `generate` and `generate_batch` with real tiny models, and several threads."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
import transformers
from torch import nn
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import graphopt
from graphopt import backend
from graphopt.tools.zoo.census import expected_counts, recognised_counts
from tests.block import MERGED, agree, block, counted, example
from tests.generating import TOKENS, clean, compile_config, generate, strict_config
from tests.models import zoo
from tests.threads import in_threads

# Two layers; in each Q, K, V and gate, up are merged, weights and biases.
# Gemma-2's norms (9) have 1 + w prepared; GPT-2's Q, K, V are packed, and its weights stored [in, out].
PREPARED = {"llama": 8, "qwen3": 4, "gemma2": 13, "gpt2": 8}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A clean start, and no traces."""
    with clean():
        yield


# ------------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", PREPARED)
def test_three_calls_of_generate_are_one_compile(name: str, padding: str) -> None:
    model = zoo.model(name)
    eager = generate(model, padding)
    config = strict_config()
    with counted() as counts:
        for _ in range(3):
            ours = generate(model, padding, cache_implementation="static", compile_config=config)
            assert torch.equal(ours, eager)
    # The decode: generate runs its prefill in eager. A window's cache has another graph before it is full.
    assert counts == {"graphs": 1 + (name == "gemma2"), "prepared": PREPARED[name]}
    expected = expected_counts(model, **zoo.inputs(model, zoo.Case()))
    assert recognised_counts(backend.reports()[-1].counts) == expected


def test_generate_may_send_a_mode() -> None:
    model = zoo.model("llama")
    config = compile_config(backend="graphopt", mode="reduce-overhead")
    with counted() as counts:
        ours = generate(model, cache_implementation="static", compile_config=config)
    assert counts["graphs"] == 1 and not backend.reports()[-1].fallback
    assert torch.equal(ours, generate(model))


def test_generate_under_enable_needs_no_word_of_us() -> None:
    model = zoo.model("llama")
    eager = generate(model, "left")
    with graphopt.enable(strict=True), counted() as counts:
        for _ in range(3):
            ours = generate(model, "left", cache_implementation="static", compile_config=compile_config())
            assert torch.equal(ours, eager)
    assert counts == {"graphs": 1, "prepared": PREPARED["llama"]}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_an_optimized_model_generates(cache: str) -> None:
    model = zoo.model("llama")
    eager = generate(model, "left")
    graphopt.optimize(model, strict=True)
    with counted() as counts:
        assert torch.equal(generate(model, "left", cache_implementation=cache), eager)
    first = counts["graphs"]
    assert 1 < first <= 5 and counts["prepared"] == PREPARED["llama"], "prefill and decode share"
    with counted() as counts:
        assert torch.equal(generate(model, "left", cache_implementation=cache), eager)
    assert counts == {"graphs": 0, "prepared": 0}


def test_a_weight_changed_between_two_calls_of_generate_shows() -> None:
    model = zoo.model("qwen3")
    weight = model.get_submodule("model.layers.1.self_attn.v_proj").weight
    assert isinstance(weight, nn.Parameter)
    config = strict_config()
    before = generate(model, cache_implementation="static", compile_config=config)
    with torch.no_grad():
        weight.mul_(-2)
    with counted() as counts:
        ours = generate(model, cache_implementation="static", compile_config=config)
    eager = generate(model)
    with torch.no_grad():
        weight.mul_(-0.5)
    assert torch.equal(ours, eager) and not torch.equal(ours, before)
    assert counts == {"graphs": 0, "prepared": 1}


# ------------------------------------------------------------------------------------- continuous batching

PROMPTS = ((5, 61, 7, 38, 9), (11, 82, 13), (20, 91, 22, 33, 24, 95, 26, 47, 60), (77,))


def generate_batch(model: nn.Module, level: int) -> list[list[int]]:
    """The TOKENS new tokens of each prompt; level 0 does not compile."""
    config = ContinuousBatchingConfig(
        default_compile_level=level, num_blocks=16, page_size=16, max_batch_tokens=16, use_cuda_graph=False
    )
    greedy = transformers.GenerationConfig(
        max_new_tokens=TOKENS, do_sample=False, eos_token_id=999, pad_token_id=0
    )
    with torch.no_grad():
        results = model.generate_batch(
            [list(p) for p in PROMPTS],
            generation_config=greedy,
            continuous_batching_config=config,
            progress_bar=False,
        )
    by_prompt = {tuple(r.prompt_ids): list(r.generated_tokens) for r in results.values()}
    return [by_prompt[p] for p in PROMPTS]


def one_by_one(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same in eager, a prompt at a time."""
    greedy = {"do_sample": False, "eos_token_id": None, "max_new_tokens": TOKENS}
    with torch.no_grad():
        return [model.generate(torch.tensor([p]), **greedy)[0, len(p) :].tolist() for p in prompts]


def test_continuous_batching_under_enable() -> None:
    model = zoo.model("llama")
    eager = one_by_one(model, PROMPTS)
    assert len({tuple(tokens) for tokens in eager}) == len(PROMPTS), "prompts that give the same show nothing"
    with graphopt.enable(strict=True):
        with counted() as counts:
            assert generate_batch(model, level=1) == eager
        assert counts["prepared"] == PREPARED["llama"], "each layer's once, though they share fragments"
        fragments = backend.reports()[-counts["graphs"] :]
        with counted() as counts:
            assert generate_batch(model, level=1) == eager
        assert counts == {"graphs": 0, "prepared": 0}
    assert len(fragments) >= 5 and not [r.fallback for r in fragments if r.fallback]
    ops = sum((Counter(r.counts) for r in fragments), Counter())
    # Attention runs outside the graphs; fragments are shared by the two layers.
    assert ops["rope"] and ops["gated_activation"] and ops["add_rms_norm"] and ops["linear"] >= 7
    assert all(r.unmatched_share == 0 for r in fragments if r.matches)


# ------------------------------------------------------------------------------------------------- threads


THREADS = 8


def test_threads_compile_and_run_their_own_models_at_once() -> None:
    models = [nn.Sequential(block(1), block(2)), *(block(i) for i in range(3, THREADS + 2))]

    def task(model: nn.Module, own: int) -> None:
        ours = torch.compile(model, backend="graphopt", options={"strict": True})
        for length in (5, 8, 5, 3) * 3:
            agree(ours(example(length + own)), model(example(length + own)))

    with counted() as counts:
        in_threads(*(functools.partial(task, model, i) for i, model in enumerate(models)))
    assert counts["graphs"] >= 2 and counts["prepared"] == (THREADS + 1) * MERGED


def test_one_compiled_model_runs_in_many_threads() -> None:
    model, x = block(), example()
    ours = torch.compile(model, backend="graphopt", options={"strict": True})
    results: list[torch.Tensor] = []
    with counted() as counts:
        in_threads(*[lambda: results.extend(ours(x) for _ in range(10))] * THREADS)
    # Threads that wait for Dynamo's lock compile again when they get it; weights are prepared once, still.
    assert counts["graphs"] <= THREADS and counts["prepared"] == MERGED and len(results) == 10 * THREADS
    for result in results:
        agree(result, model(x))


def test_threads_change_the_weights_that_others_have_not() -> None:
    """Half of the threads share a model, the others change their own between two calls."""
    shared, own = block(1), [block(i) for i in range(2, 2 + THREADS // 2)]

    def read() -> None:
        ours = torch.compile(shared, backend="graphopt", options={"strict": True})
        for length in (5, 7) * 4:
            agree(ours(example(length)), shared(example(length)))

    def change(model: nn.Module) -> None:
        ours = torch.compile(model, backend="graphopt", options={"strict": True})
        for length in (5, 7) * 4:
            model.k.weight.mul_(1.5)
            agree(ours(example(length)), model(example(length)))

    in_threads(*[read] * (THREADS // 2), *(functools.partial(change, model) for model in own))
