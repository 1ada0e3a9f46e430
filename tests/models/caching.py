"""Tiny models with caches of each kind: windows, hybrids, encoder and decoder; how they are fed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from graphopt.accuracy import raise_to_fp64
from graphopt.tools.zoo.weights import fill
from tests.models import zoo

LENGTH = 9
ROOM = 16  # of static caches
SIZES = {
    "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 14,
    "intermediate_size": 59, "num_hidden_layers": 2, "vocab_size": 97, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-2,
}  # fmt: skip


def _llama() -> object:
    return transformers.LlamaConfig(**SIZES)


def _mistral() -> object:
    return transformers.MistralConfig(**SIZES, sliding_window=4)


def _gemma3() -> object:
    layers = ["sliding_attention", "full_attention"]
    return transformers.Gemma3TextConfig(
        **SIZES, sliding_window=4, query_pre_attn_scalar=14, layer_types=layers
    )


def _falcon() -> object:
    return transformers.FalconConfig(
        hidden_size=40, num_attention_heads=4, num_hidden_layers=2, vocab_size=97, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _t5() -> object:
    return transformers.T5Config(
        d_model=40, d_kv=14, d_ff=59, num_layers=2, num_heads=3, vocab_size=97,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, relative_attention_max_distance=12,
        layer_norm_epsilon=1e-2, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip


def _bart() -> object:
    return transformers.BartConfig(
        d_model=42, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=58, decoder_ffn_dim=62,
        encoder_attention_heads=3, decoder_attention_heads=3, vocab_size=97, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How a model is configured."""

    config: Callable[[], object]
    pair: bool = False  # of an encoder and a decoder


KINDS: Mapping[str, Kind] = {
    "llama": Kind(_llama),
    "mistral": Kind(_mistral),
    "gemma3": Kind(_gemma3),
    "t5": Kind(_t5, pair=True),
    "bart": Kind(_bart, pair=True),
    "falcon": Kind(_falcon),  # one that takes an input of no tokens
}


def build(name: str, seed: int = 1) -> nn.Module:
    """A new tiny model, in eval mode, of fp32 weights that are bf16 numbers."""
    kind = KINDS[name]
    auto = transformers.AutoModelForSeq2SeqLM if kind.pair else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = auto.from_config(kind.config()).eval().requires_grad_(False)
        fill(built)
    for parameter in built.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return built


@functools.cache
def model(name: str) -> nn.Module:
    """The tiny model of that kind."""
    return build(name)


# ------------------------------------------------------------------------------------------------- caches


def cache(of: nn.Module, kind: str) -> object:
    """A new cache: "dynamic", "bare" (dynamic, and told nothing of the model) or "static"."""
    config = of.config.get_text_config(decoder=True)

    def one(room: int) -> object:
        if kind == "bare":
            return transformers.DynamicCache()
        if kind == "dynamic":
            return transformers.DynamicCache(config=config)
        return transformers.StaticCache(config=config, max_cache_len=room)

    if not of.config.is_encoder_decoder:
        return one(ROOM)
    return transformers.EncoderDecoderCache(one(ROOM), one(inputs(of)["source"].shape[1]))


def inputs(of: nn.Module) -> dict[str, torch.Tensor]:
    """Two rows of `ids` [2, LENGTH] with their `mask`; with an encoder, also its `source` [2, 7].

    The second row is padded: a decoder's on the left, an encoder's on the right.
    """
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (2, LENGTH), generator=generator)
    if of.config.is_encoder_decoder:
        source = torch.randint(3, 90, (2, 7), generator=generator)
        mask = torch.ones_like(source)
        mask[1, 5:] = 0
        return {"ids": ids, "mask": mask, "source": source * mask}
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"ids": ids * mask, "mask": mask}


def feed(
    call: nn.Module,
    of: nn.Module,
    parts: Sequence[int],
    past: object | None,
    given: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The logits [2, LENGTH, vocabulary] of ids that are given part by part; no cache: at once."""
    ids, mask = given["ids"], given["mask"]
    encoded = None
    if of.config.is_encoder_decoder:
        encoded = of.get_encoder()(input_ids=given["source"], attention_mask=mask)
    logits, done = [], 0
    for part in parts:
        now = ids[:, done : done + part]
        done += part
        how = {"past_key_values": past} if past is not None else {"use_cache": False}
        if encoded is None:
            out = call(input_ids=now, attention_mask=mask[:, :done], **how)
        else:
            out = call(encoder_outputs=encoded, decoder_input_ids=now, attention_mask=mask, **how)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def real(of: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """The logits of real tokens: [tokens, vocabulary]."""
    return logits.flatten(0, 1) if of.config.is_encoder_decoder else logits[inputs(of)["mask"].bool()]


@functools.cache
def oracle(name: str) -> torch.Tensor:
    """What `feed` gives in fp64 without a cache: whatever the parts, the same is right."""
    of = model(name)
    given = inputs(of)
    graph = zoo.trace(lambda **values: feed(of, of, (LENGTH,), None, values), given)
    return real(of, raise_to_fp64(graph)(*given.values()))
