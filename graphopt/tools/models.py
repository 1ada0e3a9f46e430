"""A model and its example inputs from one word on the command line: a model type, a config, or a function."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graphopt.errors import OptionError
from graphopt.tools.zoo.build import build, tiny_config
from graphopt.tools.zoo.inputs import example

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
CACHES = ("none", "dynamic", "static")

FUNCTION = "give package.module:function, a function that returns (model, args, kwargs)"


@dataclass(frozen=True)
class Example:
    """A model and a call of it; `model` may also be an fx.GraphModule to look at, with no call."""

    model: torch.nn.Module
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = field(default_factory=dict)


def choice(word: str, known: Iterable[str], what: str) -> str:
    """The word if it is known. Raises OptionError that names the nearest right one, or all of a few."""
    names = tuple(known)
    if word in names:
        return word
    near = get_close_matches(word, names, n=1)
    if near:
        way_out = f"did you mean {near[0]!r}?"
    else:
        way_out = f"it is one of {', '.join(names)}" if len(names) <= 12 else FUNCTION
    raise OptionError(f"unknown {what} {word!r}; {way_out}")


def load(
    spec: str,
    *,
    batch: int = 2,
    length: int = 7,
    dtype: str = "float32",
    cache: str = "none",
    decode: bool = False,
) -> Example:
    """The model that a word names, with example inputs of `batch` rows of `length` tokens.

    With `decode` the call is the one after that: one more token a row, on a static cache that holds the rows.

    A transformers model type (`bert`) gives a tiny random model; a directory or file with a config gives the
    model of its true size on the meta device, without weights; `package.module:function` is called.

    Raises OptionError for an unknown word, with the nearest right one, where transformers is missing, and for
    `decode` of a model without a cache.
    """
    kind, cached = DTYPES[choice(dtype, DTYPES, "dtype")], choice(cache, CACHES, "cache")
    if ":" in spec:
        return _called(spec)
    try:
        import transformers
    except ImportError as error:
        raise OptionError(
            f"{spec!r} needs transformers: pip install 'graphopt[transformers]'; or {FUNCTION}"
        ) from error
    if Path(spec).exists():
        config, device = transformers.AutoConfig.from_pretrained(spec), torch.device("meta")
    else:
        name = choice(spec, transformers.CONFIG_MAPPING, "model type")
        config, device = _tiny(name), torch.device("cpu")
    torch.manual_seed(0)
    with device:
        model = _built(config).to(kind)
        if decode:
            return Example(model, (), _one_token(model, batch, length, kind))
        return Example(model, (), _example(model, batch, length, "left", kind, cached))


def _tiny(model_type: str) -> PretrainedConfig:
    try:
        return tiny_config(model_type)
    except Exception as error:  # whatever the type's class says of sizes
        raise OptionError(f"no tiny config of {model_type} ({error}); {FUNCTION}") from error


def _built(config: PretrainedConfig) -> torch.nn.Module:
    """A model with random weights, with the head that its type is known for."""
    try:
        return build(config)
    except Exception as error:
        raise OptionError(
            f"no {config.model_type} of this config can be built ({error}); {FUNCTION}"
        ) from error


def _example(
    model: torch.nn.Module, batch: int, length: int, padding: str, dtype: torch.dtype, cache: str
) -> dict[str, object]:
    """Keyword arguments for one call, with the cache that is asked for, where the model has one."""
    kwargs: dict[str, object] = dict(example(model, batch=batch, length=length, padding=padding, dtype=dtype))
    if "input_ids" not in kwargs or getattr(model.config, "use_cache", None) is None:
        return kwargs
    kwargs["use_cache"] = cache != "none"
    if cache == "static":
        from transformers import StaticCache

        kwargs["past_key_values"] = StaticCache(config=model.config, max_cache_len=2 * length)
    return kwargs


def _one_token(model: torch.nn.Module, batch: int, length: int, dtype: torch.dtype) -> dict[str, object]:
    """Keyword arguments for the step after a prompt of `length` tokens, on a static cache of twice that."""
    config: PretrainedConfig = model.config
    if config.is_encoder_decoder or not getattr(model, "can_generate", bool)():
        raise OptionError(f"{config.model_type} has no cache to decode with; leave decode out")
    prompt = _example(model, batch, length, "none", dtype, "static")
    with torch.no_grad():
        model(**prompt)
    ids = prompt["input_ids"]
    assert isinstance(ids, torch.Tensor)
    return {**prompt, "input_ids": ids[:, -1:].clone()}


def _called(spec: str) -> Example:
    """What `package.module:function` returns; the current directory is on the path, as for `python -m`."""
    place, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise OptionError(f"no module {place!r} ({error}); {FUNCTION}") from error
    choice(name, [n for n in vars(module) if callable(getattr(module, n))], f"function of {place}")
    made = getattr(module, name)()
    if isinstance(made, torch.nn.Module):
        return Example(made)
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[1], tuple):
        raise OptionError(f"{spec} returned {type(made).__name__}, not (model, args, kwargs); {FUNCTION}")
    return Example(*made)
