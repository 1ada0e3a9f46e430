"""Example inputs of any transformers model, read off its main input and its signature."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

import torch

from graphopt.errors import OptionError

SAMPLES = 800  # of raw audio, 0.05 s; doubled where they become fewer than two positions
BATCH = 3  # rows
FIRST_TOKEN = 3  # those before are padding, begin and end
FRAMES = 32  # of features, where the config does not say how many there must be


def example(
    model: torch.nn.Module,
    *,
    batch: int = BATCH,
    length: int = 9,
    padding: str = "none",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Keyword arguments of one call: random tokens, images, videos or sound, and a mask for padded rows.

    Args:
        length: tokens of a row; the decoder of an encoder-decoder gets half of them.
        seed: another one gives other values of the same shapes.
        padding: "none" (no mask is given), "left" or "right": each row is two tokens shorter than the last.

    Raises:
        OptionError: the model takes something of which no example is known.
    """
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator("cpu").manual_seed(length + 1009 * seed)
    main = _main(model, takes)
    given: dict[str, torch.Tensor] = {}
    if main == "inputs" and hasattr(model.config, "vocab_size"):  # bytes
        given[main] = _tokens(model, (batch, length), generator)
    both = {"input_ids", "pixel_values"} <= takes.keys() and not _writes_text(model)
    if main == "input_ids" or both or _needs(takes, "input_ids"):
        given |= _text(model, batch, length, padding if "attention_mask" in takes else "none", generator)
    if main == "pixel_values" or both:
        given |= _pictures(model, batch, takes, generator)
        _place_images(model, given)
    elif main == "pixel_values_videos":
        frames = _find(model, "num_frames")
        given[main] = _noise((batch, frames if isinstance(frames, int) else 2, *_image(model)), generator)
    elif main == "input_features":
        given[main] = _noise((batch, *_features(model)), generator)
    elif main == "input_values":
        given[main] = _noise((batch, *_sound(model)), generator)
    each = _find(model, "audio_length_per_tok")  # frames: every token has its sound
    if isinstance(each, int) and "input_features" in takes:
        given["input_features"] = _noise((batch, *_features(model, each * length)), generator)
    if not given:
        raise OptionError(f"{type(model).__name__} takes {main}, of which no example is known here")
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        shape = _token_shape(model, "decoder_input_ids", batch, (length + 1) // 2)
        given["decoder_input_ids"] = _tokens(model, shape, generator)
    device = next(model.parameters()).device
    return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in given.items()}


def _main(model: torch.nn.Module, takes: Mapping[str, object]) -> str:
    """The name of a model's main input; of a composite that only says "inputs", its encoder's."""
    main = str(getattr(model, "main_input_name", "input_ids"))
    inner = str(getattr(getattr(model, "encoder", None), "main_input_name", main))
    return inner if main == "inputs" and inner in takes else main


def _needs(takes: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in takes and takes[name].default is inspect.Parameter.empty


def _said(model: torch.nn.Module) -> str:
    """What the documentation of a model's forward says of shapes."""
    return " ".join((inspect.getdoc(model.forward) or "").split())


def _text(
    model: torch.nn.Module, batch: int, length: int, padding: str, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Tokens, and their mask where rows are padded."""
    shape = _token_shape(model, "input_ids", batch, length)
    ids = _tokens(model, shape, generator)
    if padding == "none" or shape[0] != batch:  # rows of codebooks have no mask of their own
        return {"input_ids": ids}
    mask = padding_mask(batch, length, padding)
    return {"input_ids": ids * mask.view(batch, length, *[1] * (ids.dim() - 2)), "attention_mask": mask}


def _token_shape(model: torch.nn.Module, name: str, batch: int, length: int) -> tuple[int, ...]:
    """[batch, length]; with codebooks, as the documentation says, a row or a last dimension for each of them.

    Where codes have a vocabulary of their own, they stand beside the text's tokens.
    """
    said = f" {_said(model)}".partition(f" {name} (`torch.LongTensor` of shape `")[2].partition("`,")[0]
    codebooks = _find(model, "num_codebooks")
    if codebooks is None:
        codebooks = getattr(getattr(model.config, "decoder_config", None), "num_channels", None)
    if not isinstance(codebooks, int):
        return batch, length
    if said.endswith(", num_codebooks)"):
        return batch, length, codebooks
    if said.startswith("(batch_size * num_codebooks,"):
        return batch * codebooks, length
    beside = _find(model, "codebook_vocab_size") is not None
    return (batch, length, 1 + codebooks) if beside else (batch, length)


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


def _tokens(model: torch.nn.Module, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    vocabulary = _find(model, "vocab_size")
    end = vocabulary if isinstance(vocabulary, int) else 100
    return torch.randint(FIRST_TOKEN, end, shape, generator=generator, device="cpu")


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device="cpu")


# ------------------------------------------------------------------------------------------------ images


def _pictures(
    model: torch.nn.Module, batch: int, takes: Mapping[str, object], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Images; of a model that takes their shapes, as patches: each image one column smaller than the last."""
    channels, high, wide = _image(model)
    if "spatial_shapes" not in takes:
        return {"pixel_values": _noise((batch, channels, high, wide), generator)}
    patch = _find(model, "patch_size")
    side = patch if isinstance(patch, int) else 8
    rows, columns = high // side, wide // side
    shapes = torch.tensor([[rows, max(columns - i, 1)] for i in range(batch)], device="cpu")
    there = torch.arange(rows * columns, device="cpu") < shapes.prod(-1)[:, None]
    patches = _noise((batch, rows * columns, side * side * channels), generator)
    return {"pixel_values": patches, "pixel_attention_mask": there.long(), "spatial_shapes": shapes}


def _place_images(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> None:
    """Where a text has places for an image's tokens, put them at its middle, which no padding reaches."""
    places, token = _find(model, "mm_tokens_per_image"), _find(model, "image_token_id", "image_token_index")
    if "input_ids" in given and isinstance(places, int) and isinstance(token, int):
        middle = given["input_ids"].shape[1] // 2
        given["input_ids"][:, middle : middle + places] = token


def _image(model: torch.nn.Module) -> tuple[int, int, int]:
    channels, size = _find(model, "num_channels", "in_channels"), _find(model, "image_size")
    high, wide = size[-2:] if isinstance(size, tuple) else (size or 24, size or 24)
    return channels if isinstance(channels, int) else 3, int(high), int(wide)


# ------------------------------------------------------------------------------------------------- sound


def _sound(model: torch.nn.Module) -> tuple[int, ...]:
    """Samples, enough for two positions; with a channel in front where the padding's mask has one, too."""
    samples, positions = SAMPLES, getattr(model, "_get_feat_extract_output_lengths", None)
    while positions is not None and int(positions(torch.tensor(samples, device="cpu"))) < 2:
        samples *= 2
    return (1, samples) if "(batch_size, 1, sequence_length)" in _said(model) else (samples,)


def _features(model: torch.nn.Module, frames: int | None = None) -> tuple[int, int]:
    """Mel bins x frames where a convolution takes the bins as channels, else frames x what the first layer
    takes of one. Two frames become a position, or as many as the config says.
    """
    bins = _find(model, "num_mel_bins", "feature_size", "input_feat_size")
    if frames is None:
        positions, factor = _find(model, "max_source_positions"), _find(model, "subsampling_factor")
        frames = 16 * factor if isinstance(factor, int) else FRAMES
        frames = 2 * positions if isinstance(positions, int) else frames
    first = next(m for m in model.modules() if isinstance(getattr(m, "weight", None), torch.nn.Parameter))
    if isinstance(first, torch.nn.Conv1d) and first.in_channels == bins:
        return first.in_channels, frames
    if isinstance(first, (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Conv1d)):
        return frames, first.weight.shape[1 if isinstance(first, torch.nn.Conv1d) else -1]
    return frames, bins if isinstance(bins, int) else 80
