"""Tiny models whose heads and widths four ranks can share; their vocabularies they cannot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import transformers
from torch import nn

from graphopt.capture import Captured, capture
from graphopt.tools.zoo.weights import fill, scale
from tests.models.zoo import Case as ZooCase
from tests.models.zoo import inputs

CAUSAL: Mapping[str, tuple[Callable[..., object], Mapping[str, object]]] = {
    "llama": (transformers.LlamaConfig, dict(
        hidden_size=40, num_attention_heads=8, num_key_value_heads=2, head_dim=10, intermediate_size=92,
        vocab_size=101, attention_bias=True, mlp_bias=True,
    )),
    "qwen3": (transformers.Qwen3Config, dict(
        hidden_size=36, num_attention_heads=4, num_key_value_heads=2, head_dim=14, intermediate_size=60,
        vocab_size=97,
    )),
    "gemma2": (transformers.Gemma2Config, dict(
        hidden_size=44, num_attention_heads=4, num_key_value_heads=2, head_dim=18, intermediate_size=76,
        vocab_size=109, query_pre_attn_scalar=23, sliding_window=4, attn_logit_softcapping=7.0,
        final_logit_softcapping=6.0,
    )),
}  # fmt: skip


def _causal(name: str) -> Callable[[ZooCase], nn.Module]:
    def build(case: ZooCase) -> nn.Module:
        kind, sizes = CAUSAL[name]
        config = kind(
            num_hidden_layers=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            rms_norm_eps=1e-2, tie_word_embeddings=case.tied, **sizes,
        )  # fmt: skip
        return transformers.AutoModelForCausalLM.from_config(config)

    return build


def _gpt2(case: ZooCase) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=44, n_head=4, n_inner=84, n_layer=2, n_positions=64, vocab_size=103, layer_norm_epsilon=1e-2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=case.tied,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def _bert(case: ZooCase) -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=44, num_attention_heads=4, num_hidden_layers=2, intermediate_size=68, vocab_size=107,
        max_position_embeddings=64, layer_norm_eps=1e-2, pad_token_id=0, tie_word_embeddings=case.tied,
    )  # fmt: skip
    return transformers.AutoModelForMaskedLM.from_config(config)


BUILD = {**{name: _causal(name) for name in CAUSAL}, "gpt2": _gpt2, "bert": _bert}
LAYERS = 2


@functools.cache
def model(name: str, *, tied: bool = True) -> nn.Module:
    """The tiny model of a family, in eval mode, with weights that let errors show; equal in every process."""
    case = ZooCase(tied=tied)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sum(map(ord, name)))
        built = BUILD[name](case).eval().requires_grad_(False)
        fill(built)
        scale(built, inputs(built, case))
    return built


def given(name: str, length: int = 7, *, tied: bool = True) -> dict[str, torch.Tensor]:
    """Token ids and a mask that hides the beginnings of some rows."""
    return inputs(model(name, tied=tied), ZooCase(length=length, padding="left"))


@functools.cache
def captured(name: str, *, tied: bool = True, length: int = 7) -> Captured:
    """The graph of the model without a cache."""
    built = model(name, tied=tied)
    extra = {} if name == "bert" else {"use_cache": False}
    return capture(built, **given(name, length, tied=tied), **extra)
