"""graphopt.tools.zoo.inputs: what models take, in the shapes that config, layers and documentation say."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from graphopt.errors import OptionError
from graphopt.tools.zoo.build import build, tiny_config
from graphopt.tools.zoo.inputs import example, padding_mask


def test_padding() -> None:
    left, right = (padding_mask(3, 4, side) for side in ("left", "right"))
    assert left.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert torch.equal(left, right.flip(1))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("bert", {"input_ids", "attention_mask"}),
        ("t5", {"input_ids", "attention_mask", "decoder_input_ids"}),
        ("vit", {"pixel_values"}),
        ("clip", {"input_ids", "attention_mask", "pixel_values"}),
        ("whisper", {"input_features", "decoder_input_ids"}),
        ("wav2vec2", {"input_values"}),
        ("perceiver", {"inputs"}),
        ("speech-encoder-decoder", {"input_values", "decoder_input_ids"}),
        (
            "siglip2",
            {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "spatial_shapes"},
        ),
        ("videoprism", {"input_ids", "attention_mask", "pixel_values_videos"}),
        ("voxtral_realtime", {"input_ids", "attention_mask", "input_features"}),
    ],
)
def test_inputs_are_what_a_model_takes(name: str, keys: set[str]) -> None:
    given = example(_shapes_of(name), padding="left")
    assert set(given) == keys and all(x.device.type == "meta" for x in given.values())


def _shapes_of(name: str) -> nn.Module:
    with torch.device("meta"):
        model = build(tiny_config(name))
    return model.to("meta")  # some parameters ignore where they are asked to be


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("whisper", "input_features", (3, 10, 128)),  # bins are channels of a convolution
        ("lasr_ctc", "input_features", (3, 32, 10)),  # a linear takes a frame
        ("granite_speech5_ctc", "input_features", (3, 32, 40)),  # of four frames' bins
        ("wav2vec2-bert", "input_features", (3, 128, 160)),  # a norm takes a frame
        ("speech_to_text", "input_features", (3, 128, 80)),  # its convolution's channels, given last
        ("parakeet_ctc", "input_features", (3, 128, 16)),  # a picture's convolution: bins of the config
        ("voxtral_realtime", "input_features", (3, 10, 72)),  # eight frames a token
        ("wav2vec2", "input_values", (3, 800)),
        ("moonshine", "input_values", (3, 1600)),  # 800 samples are less than two positions
        ("omniasr_ctc", "input_values", (3, 1, 800)),  # with a channel
        ("musicgen", "input_ids", (12, 9)),  # a row for each of four codebooks
        ("dia", "decoder_input_ids", (3, 5, 9)),  # nine codes at each place
        ("kyutai_speech_to_text", "input_ids", (3, 9, 33)),  # text and 32 codes at each place
        ("videoprism", "pixel_values_videos", (3, 3, 3, 24, 24)),
        ("siglip2", "pixel_values", (3, 9, 192)),  # patches
    ],
)
def test_inputs_have_the_shape_that_a_model_takes(name: str, key: str, shape: tuple[int, ...]) -> None:
    assert example(_shapes_of(name))[key].shape == shape


def test_images_given_as_patches_differ_in_shape() -> None:
    given = example(_on_cpu("siglip2"))
    assert given["spatial_shapes"].tolist() == [[3, 3], [3, 2], [3, 1]]
    assert given["pixel_attention_mask"].sum(-1).tolist() == [9, 6, 3]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_text_has_a_place_for_each_token_of_its_image(padding: str) -> None:
    model = _on_cpu("shieldgemma2")
    given = example(model, padding=padding)
    places = given["input_ids"] == model.config.image_token_index
    assert places.sum(-1).tolist() == [model.config.mm_tokens_per_image] * 3
    assert padding == "none" or bool(given["attention_mask"][places].all())


def test_a_mask_hides_whole_places_of_codes_and_rows_of_codebooks_have_none() -> None:
    given = example(_on_cpu("kyutai_speech_to_text"), padding="left")
    assert torch.equal(given["input_ids"].ne(0).all(-1).long(), given["attention_mask"])
    assert "attention_mask" not in example(_on_cpu("musicgen"), padding="left")


def _on_cpu(name: str) -> nn.Module:
    return build(tiny_config(name))


def test_what_no_example_is_known_of_is_an_error() -> None:
    class Odd(nn.Linear):
        main_input_name, config = "smell", transformers.PretrainedConfig()

    with pytest.raises(OptionError, match="Odd takes smell"):
        example(Odd(2, 2))
