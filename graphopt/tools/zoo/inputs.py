"""Example inputs of any transformers model, read off its main input and its signature."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch

from graphopt.errors import OptionError

SAMPLES = 800  # of raw audio, 0.05 s
FIRST_TOKEN = 3  # those before are padding, begin and end


def example(
    model: torch.nn.Module,
    *,
    batch: int = 3,
    length: int = 9,
    padding: str = "none",
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Keyword arguments of one call: random tokens, images or sound, and a mask where rows are padded.

    Args:
        length: tokens of a row; the decoder of an encoder-decoder gets half of them.
        padding: "none" (no mask is given), "left" or "right": each row is two tokens shorter than the last.

    Raises:
        OptionError: the model takes something of which no example is known.
    """
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator("cpu").manual_seed(length)
    main = str(getattr(model, "main_input_name", "input_ids"))
    given: dict[str, torch.Tensor] = {}
    if main == "inputs" and hasattr(model.config, "vocab_size"):  # bytes
        given[main] = _tokens(model, (batch, length), generator)
    both = {"input_ids", "pixel_values"} <= takes.keys() and not _writes_text(model)
    if main == "input_ids" or both:
        given["input_ids"] = _tokens(model, (batch, length), generator)
        if padding != "none" and "attention_mask" in takes:
            mask = padding_mask(batch, length, padding)
            given |= {"input_ids": given["input_ids"] * mask, "attention_mask": mask}
    if main == "pixel_values" or both:
        given["pixel_values"] = _noise((batch, *_image(model)), generator).to(dtype)
    elif main == "input_features":
        given[main] = _noise((batch, *_features(model)), generator).to(dtype)
    elif main == "input_values":
        given[main] = _noise((batch, SAMPLES), generator).to(dtype)
    if not given:
        raise OptionError(f"{type(model).__name__} takes {main}, of which no example is known here")
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        given["decoder_input_ids"] = _tokens(model, (batch, (length + 1) // 2), generator)
    device = next(model.parameters()).device
    return {name: x.to(device) for name, x in given.items()}


def _writes_text(model: torch.nn.Module) -> bool:
    """Whether a model gives tokens: it then reads images only if it is asked to."""
    head = getattr(model, "get_output_embeddings", None)
    return head is not None and head() is not None


def padding_mask(batch: int, length: int, side: str) -> torch.Tensor:
    """int64 [batch, length]: 1 at tokens. The first row is full, each other two shorter, one at least."""
    lengths = torch.tensor([max(length - 2 * row, 1) for row in range(batch)], device="cpu")
    positions = torch.arange(length, device="cpu").expand(batch, length)
    left = side == "left"
    return (positions >= (length - lengths)[:, None] if left else positions < lengths[:, None]).long()


def configs(model_or_config: object) -> Iterator[object]:
    """A config and the configs inside it."""
    config = getattr(model_or_config, "config", model_or_config)
    yield config
    for value in vars(config).values():
        if type(value).__name__.endswith("Config") and hasattr(value, "to_dict"):
            yield from configs(value)


def _find(model: torch.nn.Module, *names: str) -> int | tuple[int, ...] | None:
    """The first of these keys that the model's config, or one inside it, has."""
    for name in names:
        for config in configs(model):
            value = getattr(config, name, None)
            if isinstance(value, (int, list, tuple)):
                return tuple(value) if isinstance(value, (list, tuple)) else value
    return None


def _tokens(model: torch.nn.Module, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    vocabulary = _find(model, "vocab_size")
    end = vocabulary if isinstance(vocabulary, int) else 100
    return torch.randint(FIRST_TOKEN, end, shape, generator=generator, device="cpu")


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device="cpu")


def _image(model: torch.nn.Module) -> tuple[int, int, int]:
    channels, size = _find(model, "num_channels", "in_channels"), _find(model, "image_size")
    high, wide = size[-2:] if isinstance(size, tuple) else (size or 24, size or 24)
    return channels if isinstance(channels, int) else 3, int(high), int(wide)


def _features(model: torch.nn.Module) -> tuple[int, int]:
    """Mel bins x frames: two frames become one position."""
    bins = _find(model, "num_mel_bins", "feature_size", "input_feat_size")
    positions = _find(model, "max_source_positions")
    return bins if isinstance(bins, int) else 80, 2 * (positions if isinstance(positions, int) else 16)
