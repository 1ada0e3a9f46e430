"""Tiny real models with ugly sizes and weights that let errors show; their inputs, runs and fp64 oracle."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import transformers
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.accuracy import raise_to_fp64
from graphopt.tools.zoo.census import watching
from graphopt.tools.zoo.weights import fill, scale

if TYPE_CHECKING:
    from graphopt.report import Report

Result = TypeVar("Result")

DECODES = 2  # steps after the prefill
STATIC_LENGTH = 16  # of the static cache: longer than any run here, so that some of it stays empty


@dataclass(frozen=True)
class Case:
    """One way of calling a model. `window` and `tied` choose the variant of the model, where it has one."""

    batch: int = 3
    length: int = 7
    padding: str = "none"  # "none" | "left" | "right"
    cache: str = "none"  # "none" | "dynamic" | "static"
    tied: bool = True
    window: int = 4

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        return f"b{self.batch}s{self.length}-{self.padding}-{self.cache}-{tied}-w{self.window}"


@dataclass(frozen=True)
class Family:
    """How a model is built, and whether it has caches."""

    build: Callable[[Case], nn.Module]
    caches: bool = True


# ------------------------------------------------------------------------------------------------- models


def _causal(config_class: type, case: Case, **sizes: object) -> nn.Module:
    """A causal model from a configuration of 2 layers; eps is large, so that a wrong one shows in bf16."""
    config = config_class(
        num_hidden_layers=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rms_norm_eps=1e-2, tie_word_embeddings=case.tied, **sizes,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def _llama(case: Case) -> nn.Module:
    return _causal(
        transformers.LlamaConfig, case, hidden_size=48, num_attention_heads=6, num_key_value_heads=2,
        head_dim=20, intermediate_size=77, vocab_size=101, attention_bias=case.tied, mlp_bias=case.tied,
    )  # fmt: skip


def _qwen3(case: Case) -> nn.Module:
    return _causal(
        transformers.Qwen3Config, case, hidden_size=40, num_attention_heads=4, num_key_value_heads=2,
        head_dim=14, intermediate_size=59, vocab_size=97,
    )  # fmt: skip


def _gemma2(case: Case) -> nn.Module:
    return _causal(
        transformers.Gemma2Config, case, hidden_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=18, intermediate_size=71, vocab_size=109, query_pre_attn_scalar=23,
        sliding_window=case.window, attn_logit_softcapping=7.0, final_logit_softcapping=6.0,
    )  # fmt: skip


def _gpt2(case: Case) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=45, n_head=5, n_inner=83, n_layer=2, n_positions=64, vocab_size=103, layer_norm_epsilon=1e-2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=case.tied,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def _bert(case: Case) -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=42, num_attention_heads=3, num_hidden_layers=2, intermediate_size=65, vocab_size=107,
        max_position_embeddings=64, layer_norm_eps=1e-2, pad_token_id=0, tie_word_embeddings=case.tied,
    )  # fmt: skip
    return transformers.AutoModelForMaskedLM.from_config(config)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(_llama),
    "qwen3": Family(_qwen3),
    "gemma2": Family(_gemma2),
    "gpt2": Family(_gpt2),
    "bert": Family(_bert, caches=False),
}


@functools.cache
def model(name: str, *, tied: bool = True, window: int = 4, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny model of a family, in eval mode; the same weights in every dtype (all are bf16 numbers)."""
    if dtype != torch.float32:
        narrow = copy.deepcopy(model(name, tied=tied, window=window))
        for parameter in narrow.parameters():  # parameters only: checkpoints keep rotary frequencies in fp32
            parameter.data = parameter.data.to(dtype)
        narrow.config.dtype = dtype
        return narrow
    case = Case(tied=tied, window=window)
    family = FAMILIES[name]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sum(map(ord, name)))
        built = family.build(case).eval().requires_grad_(False)
        fill(built)
        scale(built, inputs(built, case))
        for parameter in built.parameters():
            parameter.data = parameter.data.bfloat16().float()
    return built


def measure(built: nn.Module, example: Mapping[str, torch.Tensor]) -> tuple[list[float], float]:
    """Standard deviations of each attention's visible logits (after softcap) and of the outputs, in eager."""
    with torch.no_grad(), watching(built) as seen:
        output = built(**example).logits
    return [float(logits.std()) for logits in seen.logits], float(output.std())


# ------------------------------------------------------------------------------------------------ inputs


def inputs(built: nn.Module, case: Case) -> dict[str, torch.Tensor]:
    """Token ids and, where padded, their mask: rows have their own lengths, the first is full."""
    generator = torch.Generator().manual_seed(case.length)
    shape = (case.batch, case.length)
    ids = torch.randint(3, built.config.vocab_size, shape, generator=generator)
    if case.padding == "none":
        return {"input_ids": ids}
    lengths = torch.tensor([max(case.length - 2 * row, 1) for row in range(case.batch)])
    positions = torch.arange(case.length).expand(shape)
    left = case.padding == "left"
    mask = positions >= (case.length - lengths)[:, None] if left else positions < lengths[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def run(call: nn.Module, given: Mapping[str, torch.Tensor], cache: str) -> list[object]:
    """Prefill and two decode steps of fixed tokens; without a cache the prompt, then the prompt grown by two.

    Returns the logits [batch, length, vocabulary] of each call, then (keys, values) of each layer's cache.
    """
    ids, mask = given["input_ids"], given.get("attention_mask")
    tokens = (ids[:, :DECODES] if ids.shape[1] >= DECODES else ids.repeat(1, DECODES)).flip(0) % 89 + 3

    def masked(extra: int) -> dict[str, torch.Tensor]:
        grown = None if mask is None else torch.cat([mask, mask.new_ones(mask.shape[0], extra)], 1)
        return {} if grown is None else {"attention_mask": grown}

    if cache == "none":
        prompts = ids, torch.cat([ids, tokens], 1)
        return [
            call(input_ids=x, use_cache=False, **masked(x.shape[1] - ids.shape[1])).logits for x in prompts
        ]
    past = (
        transformers.DynamicCache(config=call.config)
        if cache == "dynamic"
        else transformers.StaticCache(config=call.config, max_cache_len=STATIC_LENGTH)
    )
    steps = [ids, *tokens.split(1, 1)]
    logits = [call(input_ids=x, past_key_values=past, **masked(i)).logits for i, x in enumerate(steps)]
    return [*logits, *((layer.keys, layer.values) for layer in past.layers)]


def real(outcome: Sequence[object], given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a run's results means something: logits, keys and values of real tokens."""
    ids = given["input_ids"]
    mask = given.get("attention_mask", torch.ones_like(ids)).bool()
    total = torch.cat([mask, mask.new_ones(mask.shape[0], DECODES)], 1)
    kept: dict[str, torch.Tensor] = {}
    for i, x in enumerate(outcome):
        if isinstance(x, torch.Tensor):
            rows = total[:, : x.shape[1]] if i == 0 or x.shape[1] > 1 else total[:, -1:]
            kept[f"logits{i}"] = x[rows]
            continue
        for name, cached in zip(("keys", "values"), x, strict=True):
            length = cached.shape[2]  # a window keeps the last tokens; a longer cache has an empty tail
            tail = total.new_ones(total.shape[0], max(length - total.shape[1], 0))
            visible = torch.cat([total[:, -length:], tail], 1)
            kept[f"{name}{i}"] = cached * visible[:, None, :, None]
    return kept


def trace(function: Callable[..., object], given: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """The function of named tensors as one raw ATen graph of their values, with the weights as constants."""
    # Fake tensors: transformers then takes the same way round the masks as under a compiler.
    tracer = make_fx(
        lambda *values: function(**dict(zip(given, values, strict=True))),
        pre_dispatch=True,
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )
    with torch.no_grad():
        traced = tracer(*given.values())
    for node in list(traced.graph.nodes):
        # To run it would switch the caller's mode.
        if getattr(node.target, "__name__", "") == "_set_grad_enabled":
            traced.graph.erase_node(node)
    traced.recompile()
    return traced


def traced(built: nn.Module, given: Mapping[str, torch.Tensor], cache: str) -> fx.GraphModule:
    """All calls of a run in one raw ATen graph: takes the inputs' values, gives what `run` gives."""
    return trace(lambda **inputs: run(built, inputs, cache), given)


@functools.cache
def oracle(name: str, case: Case) -> dict[str, torch.Tensor]:
    """The results of a run in fp64, for every dtype (the weights are the same numbers in all of them)."""
    built = model(name, tied=case.tied, window=case.window)
    given = inputs(built, case)
    return real(raise_to_fp64(traced(built, given, case.cache))(*given.values()), given)


def eager(name: str, case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The results of the unmodified model."""
    built = model(name, tied=case.tied, window=case.window, dtype=dtype)
    given = inputs(built, case)
    with torch.no_grad():
        return real(run(built, given, case.cache), given)


def reports_of(call: Callable[[], Result]) -> tuple[Result, list[Report]]:
    """What a call returns, and the reports of the graphs that the backend compiled during it."""
    from graphopt import backend

    backend.clear_reports()  # the backend keeps a limited number of them
    result = call()
    return result, list(backend.reports())
