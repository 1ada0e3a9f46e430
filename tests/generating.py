"""What tests of Hugging Face `generate` share: how it is told to compile, a run of it, a clean start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import nn

from tests.clean_start import forget
from tests.models import zoo

TOKENS = 7


@contextmanager
def clean() -> Iterator[None]:
    """No compiled code, prepared weights or reports of other tests; nothing stays on the shared models."""
    forget()
    yield
    torch.compiler.reset()
    for name in zoo.FAMILIES:
        model = zoo.model(name)
        model._compiled_call_impl = None
        model.__dict__.pop("_compiled_call", None)
        model.__dict__.pop("_last_compile_config", None)


def compile_config(**fields: object) -> transformers.CompileConfig:
    """On a CPU, `generate` compiles only if told so."""
    config = transformers.CompileConfig(**fields)
    config._compile_all_devices = True
    return config


def strict_config() -> transformers.CompileConfig:
    """To `generate` with our backend, under strict."""
    return compile_config(backend="graphopt", mode=None, options={"strict": True})


def generate(model: nn.Module, padding: str = "none", batch: int = 3, **fields: object) -> torch.Tensor:
    """TOKENS tokens, greedy unless told otherwise: [batch, length + TOKENS]; with an encoder, 1 + TOKENS."""
    given = zoo.inputs(model, zoo.Case(batch=batch, padding=padding))
    greedy = {"do_sample": False, "eos_token_id": None, "max_new_tokens": TOKENS}
    with torch.no_grad():
        return model.generate(**given, **{**greedy, **fields})
