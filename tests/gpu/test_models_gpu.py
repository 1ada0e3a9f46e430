"""Tiny real models on a GPU: right in every dtype, no op without a kernel, replayed from a CUDA graph."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

from graphopt import backend
from graphopt.accuracy import judge
from graphopt.lowering.select import REFERENCE
from tests.models import zoo
from tests.tolerances import ANOTHER_DEVICE, INT8_ON_ANOTHER_DEVICE

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("llama", "qwen3", "gemma2", "gpt2", "bert")


def on_gpu(name: str, case: zoo.Case, dtype: torch.dtype) -> torch.nn.Module:
    return copy.deepcopy(zoo.model(name, tied=case.tied, window=case.window, dtype=dtype)).cuda()


def compiled(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    """By the function, not by its name: the package need not be installed."""
    torch.compiler.reset()
    made = torch.compile(model, backend=backend.graphopt, options={"strict": True, **options})
    assert isinstance(made, torch.nn.Module)
    return made


def on_cpu(results: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in results.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_right_and_leaves_nothing_to_references(name: str, dtype: torch.dtype) -> None:
    cache = "static" if zoo.FAMILIES[name].caches else "none"
    case = zoo.Case(batch=3, length=7, padding="left", cache=cache)
    model = on_gpu(name, case, dtype)
    given = {k: v.cuda() for k, v in zoo.inputs(model, case).items()}
    with torch.no_grad():
        eager = on_cpu(zoo.real(zoo.run(model, given, cache), given))
        ours = compiled(model)
        outcome, reports = zoo.reports_of(lambda: zoo.run(ours, given, cache))
    verdict = judge(zoo.oracle(name, case), eager, on_cpu(zoo.real(outcome, given)), dtype)
    assert verdict.ok, verdict.reason
    assert reports and not any(r.fallback for r in reports)
    without = {op for r in reports for op, kernels in r.kernels.items() if REFERENCE in kernels}
    assert not without, f"no kernel for {without}"


def decode(
    model: torch.nn.Module, call: torch.nn.Module, ids: torch.Tensor, steps: int
) -> list[torch.Tensor]:
    """Greedy tokens: a prefill, then one at a time on a static cache."""
    past = transformers.StaticCache(config=model.config, max_cache_len=48)
    tokens = []
    with torch.no_grad():
        for _ in range(steps):
            logits = call(input_ids=ids, past_key_values=past, use_cache=True).logits
            ids = logits[:, -1:].argmax(-1)
            tokens.append(ids)
    return tokens


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_greedy_tokens_are_eagers_with_and_without_a_cuda_graph(name: str) -> None:
    case = zoo.Case(batch=2, length=7, cache="static", window=32)
    model = on_gpu(name, case, torch.float32)
    ids = zoo.inputs(model, case)["input_ids"].cuda()
    expected = decode(model, model, ids, 24)
    for graphs in (False, True):
        ours = compiled(model, cuda_graphs=graphs)
        found, reports = zoo.reports_of(functools.partial(decode, model, ours, ids, 24))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"cuda_graphs={graphs}"
        assert not any(r.fallback for r in reports)


def test_threads_on_streams_of_their_own_decode_what_one_does() -> None:
    case = zoo.Case(batch=2, length=7, cache="static")
    model = on_gpu("llama", case, torch.float32)
    ids = zoo.inputs(model, case)["input_ids"].cuda()
    expected = decode(model, model, ids, 12)
    ours = compiled(model)
    decode(model, ours, ids, 12)
    torch.cuda.synchronize()

    def on_a_stream(stream: torch.cuda.Stream) -> list[torch.Tensor]:
        with torch.cuda.stream(stream):
            return decode(model, ours, ids, 12)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(on_a_stream, [torch.cuda.Stream() for _ in range(2)]))
    torch.cuda.synchronize()
    for tokens in found:
        assert all(torch.equal(a, b) for a, b in zip(tokens, expected, strict=True))


def test_a_decode_step_is_one_launch_of_a_graph() -> None:
    """From the third step on the host launches one graph, and copies in and out: few calls of the driver."""
    case = zoo.Case(batch=1, length=7, cache="static")
    model = on_gpu("llama", case, torch.bfloat16)
    ids = zoo.inputs(model, case)["input_ids"].cuda()
    ours = compiled(model)
    decode(model, ours, ids, 4)
    past = transformers.StaticCache(config=model.config, max_cache_len=48)
    with torch.no_grad():
        for _ in range(5):  # a new cache has new addresses: plain, captured, replayed
            ids = ours(input_ids=ids, past_key_values=past, use_cache=True).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            ours(input_ids=ids, past_key_values=past, use_cache=True)
            torch.cuda.synchronize()
    seen = profile.key_averages()
    launched = [e.key for e in seen if "GraphLaunch" in e.key]
    single = sum(e.count for e in seen if e.key.startswith(("cudaLaunchKernel", "cuLaunch")))
    assert launched and single < 12, (launched, single)


def test_weights_that_change_are_seen_by_a_replayed_graph() -> None:
    case = zoo.Case(batch=1, length=7, cache="none")
    model = on_gpu("llama", case, torch.float32)
    given = {k: v.cuda() for k, v in zoo.inputs(model, case).items()}
    ours = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            ours(**given, use_cache=False)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        expected = model(**given, use_cache=False).logits
        for _ in range(3):
            torch.testing.assert_close(ours(**given, use_cache=False).logits, expected, **ANOTHER_DEVICE)


def test_an_int8_model_is_right_on_the_gpu() -> None:
    case = zoo.Case(batch=2, length=7, cache="static")
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = transformers.LlamaConfig(
        **sizes, intermediate_size=192, num_hidden_layers=2, vocab_size=199, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().cuda()
    ids = zoo.inputs(model, case)["input_ids"].cuda()
    cpu = copy.deepcopy(model).cpu()
    with torch.no_grad():
        ours = compiled(model, quantize="int8")(input_ids=ids, use_cache=False).logits.cpu()
        theirs = compiled(cpu, quantize="int8")(input_ids=ids.cpu(), use_cache=False).logits
    torch.testing.assert_close(ours, theirs, **INT8_ON_ANOTHER_DEVICE)
