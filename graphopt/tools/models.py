"""A model and its example inputs from one word on the command line: a model type, a config, or a function."""

from __future__ import annotations

import contextlib
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

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
CACHES = ("none", "dynamic", "static")

# Small and ugly: no two sizes are equal and heads * head_dim is not the width, so that a mixed-up axis shows.
TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "d_ff": 80,
    "num_decoder_layers": 2,
    "vocab_size": 99,
    "max_position_embeddings": 128,
    "image_size": 24,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
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
        config, device = tiny(transformers.AutoConfig.for_model(name)), torch.device("cpu")
    torch.manual_seed(0)
    with device:
        model = _built(config).eval().to(kind)
        if decode:
            return Example(model, (), _one_token(config, model, batch, length, kind))
        return Example(model, (), _inputs(config, model, batch, length, kind, cached))


def tiny(config: PretrainedConfig) -> PretrainedConfig:
    """The config shrunk in place to the sizes of `TINY`, as far as it has them."""
    for name, value in TINY.items():
        if hasattr(config, name):
            with contextlib.suppress(AttributeError):  # a property that the type computes from others
                setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def _built(config: PretrainedConfig) -> torch.nn.Module:
    """A model with random weights, with the head that its kind is known for."""
    import transformers
    from transformers.models.auto import modeling_auto as heads

    kinds = (
        (heads.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM),
        (heads.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
    )
    plain = config.is_encoder_decoder
    auto = next((a for names, a in kinds if config.model_type in names and not plain), transformers.AutoModel)
    try:
        return auto.from_config(config)
    except Exception as error:
        raise OptionError(
            f"no {config.model_type} of this config can be built ({error}); {FUNCTION}"
        ) from error


def _inputs(
    config: PretrainedConfig, model: torch.nn.Module, batch: int, length: int, dtype: torch.dtype, cache: str
) -> dict[str, object]:
    """Keyword arguments for one call: random tokens, a padded position in the first row; or random images."""
    name = str(getattr(model, "main_input_name", "input_ids"))
    if name == "pixel_values":
        size = config.image_size
        return {name: torch.randn(batch, config.num_channels, size, size, dtype=dtype)}
    if name != "input_ids":
        raise OptionError(f"{config.model_type} takes {name}, of which no example is known here; {FUNCTION}")
    ids = torch.randint(3, config.vocab_size, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, 0] = int(length == 1)  # a row without any token has no meaning
    kwargs: dict[str, object] = {"input_ids": ids, "attention_mask": mask}
    if config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = ids[:, : (length + 1) // 2].clone()
    if getattr(config, "use_cache", None) is not None:
        kwargs["use_cache"] = cache != "none"
    if cache == "static" and "use_cache" in kwargs:
        from transformers import StaticCache

        kwargs["past_key_values"] = StaticCache(config=config, max_cache_len=2 * length)
    return kwargs


def _one_token(
    config: PretrainedConfig, model: torch.nn.Module, batch: int, length: int, dtype: torch.dtype
) -> dict[str, object]:
    """Keyword arguments for the step after a prompt of `length` tokens, on a static cache of twice that."""
    if config.is_encoder_decoder or not getattr(model, "can_generate", bool)():
        raise OptionError(f"{config.model_type} has no cache to decode with; leave decode out")
    prompt = _inputs(config, model, batch, length, dtype, "static")
    del prompt["attention_mask"]
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
