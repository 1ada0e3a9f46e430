"""graphopt.tools.zoo: the shrink of configs, which class builds a type, and weights that let errors show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from graphopt.errors import OptionError
from graphopt.tools.zoo.build import build, kinds, tiny_config, zoo_types
from graphopt.tools.zoo.census import watching
from graphopt.tools.zoo.shrink import HEAD_DIM, VOCABULARY, shrink
from graphopt.tools.zoo.sizes import SIZES_OF
from graphopt.tools.zoo.weights import fill, in_dtype, scale
from tests.tolerances import DRAWN

# ------------------------------------------------------------------------------------------------ shrink


def test_sizes_are_small_and_ugly() -> None:
    config = shrink(transformers.LlamaConfig(num_key_value_heads=8))
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert config.vocab_size == VOCABULARY and config.pad_token_id in (0, None)


def test_sub_configs_are_shrunk_and_changes_reach_them() -> None:
    config = shrink(transformers.CLIPConfig(), {"text_config.num_hidden_layers": 1, "projection_dim": 8})
    assert config.text_config.num_hidden_layers == 1 and config.vision_config.num_hidden_layers == 2
    assert config.vision_config.image_size == 24 and config.projection_dim == 8


def test_one_layer_of_each_kind_stays() -> None:
    kinds_of = ["sliding_attention"] * 5 + ["full_attention"]
    config = shrink(transformers.Gemma3TextConfig(num_hidden_layers=12, layer_types=kinds_of * 2))
    assert config.num_hidden_layers == 2 and set(config.layer_types) == set(kinds_of)


def test_tokens_are_inside_the_vocabulary() -> None:
    config = shrink(transformers.Gemma3Config())
    assert config.image_token_id < VOCABULARY
    assert config.text_config.eos_token_id == 2


def test_rotary_sections_fit_the_head() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
    config = shrink(transformers.AutoConfig.for_model("qwen2_vl_text", rope_parameters=rope))
    assert sum(config.rope_parameters["mrope_section"]) <= HEAD_DIM // 2


def test_mel_bins_are_more_than_the_subsampling_swallows() -> None:
    config = shrink(transformers.AutoConfig.for_model("parakeet_ctc")).encoder_config
    assert config.num_mel_bins == 2 * config.subsampling_factor


def test_sizes_that_differ_from_layer_to_layer_are_never_read_as_one() -> None:
    config = shrink(transformers.AutoConfig.for_model("dots3_note_text"), SIZES_OF["dots3_note_text"])
    latent, local = config.per_layer_config[0], config.per_layer_config[2]
    assert latent.num_key_value_heads == latent.num_attention_heads == 4
    assert local.kv_lora_rank > latent.kv_lora_rank


def test_a_type_with_several_classes_of_a_head_gets_its_first() -> None:
    assert type(build(tiny_config("deit"))).__name__ == kinds()["deit"].architecture


def test_the_size_table_names_types_that_exist() -> None:
    newest = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
    unknown = SIZES_OF.keys() - kinds().keys()
    assert not unknown or not newest, "types that transformers does not have; remove their rows"


def test_types_have_heads_and_image_types_attend() -> None:
    types = zoo_types()
    assert {"llama", "bert", "t5", "whisper", "vit", "clip"} <= set(types) and len(types) == len(set(types))
    assert "resnet" not in types
    with pytest.raises(OptionError, match="no model of type 'none'"):
        build(_typed("none"))


def _typed(name: str) -> transformers.PretrainedConfig:
    config = transformers.PretrainedConfig()
    config.model_type = name
    return config


# ------------------------------------------------------------------------------------------------ weights


def test_norms_keep_their_constant_and_matrices_have_unit_gain() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(400), nn.Linear(400, 300))
    with torch.no_grad():
        fill(model)
    norm, linear = model
    assert abs(float(norm.weight.mean()) - 1) < DRAWN < float(norm.weight.std())
    assert abs(float(linear.weight.std()) * 20 - 1) < DRAWN and abs(float(linear.bias.std()) - 0.3) < DRAWN


def test_scaling_finds_the_weight_that_logits_are_proportional_to() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q, self.out = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            x = self.norm(x)
            return {"y": self.out(F.scaled_dot_product_attention(self.q(x), x, x))}

    torch.manual_seed(0)
    model, given = Attend().eval().requires_grad_(False), {"x": 9 * torch.randn(1, 2, 7, 16)}
    norm = model.norm.weight.clone()
    with torch.no_grad():
        scale(model, given)
        with watching(model) as seen:
            output = model(**given)["y"]
    assert abs(float(seen.logits[0].std()) - 2) < DRAWN and abs(float(output.std()) - 1) < DRAWN
    assert torch.equal(model.norm.weight, norm)
    assert not any(p.requires_grad for p in model.parameters())


def test_what_has_no_gradient_keeps_unit_gain() -> None:
    class Reversible(torch.autograd.Function):
        @staticmethod
        def forward(_: object, x: torch.Tensor) -> torch.Tensor:
            return x * 9

        @staticmethod
        def backward(_: object, *__: torch.Tensor) -> torch.Tensor:
            raise AssertionError("only in training")

    class Layers(nn.Linear):
        def forward(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": Reversible.apply(super().forward(input))}

    model = Layers(4, 4).requires_grad_(False)
    weight = model.weight.clone()
    scale(model, {"input": torch.randn(3, 4)})
    assert torch.equal(model.weight, weight) and not model.weight.requires_grad


def test_what_a_model_keeps_in_fp32_stays() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model._keep_in_fp32_modules_strict = {"1.weight"}  # type: ignore[assignment]  # as classes of transformers have it
    in_dtype(model, torch.bfloat16)
    assert [p.dtype for p in model.parameters()] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    ]


def test_buffers_are_in_the_dtype_that_their_class_makes_them_in() -> None:
    class Tables(nn.Module):
        def __init__(self, config: transformers.PretrainedConfig) -> None:
            super().__init__()
            self.config = config
            self.register_buffer("positions", torch.ones(2))
            self.register_buffer("frequencies", torch.ones(2, dtype=torch.float32))
            self.register_buffer("places", torch.ones(2, dtype=torch.int64))
            self.register_buffer("codec", torch.ones(2))

    model = Tables(transformers.PretrainedConfig())
    model._keep_in_fp32_modules_strict = ["codec"]  # type: ignore[assignment]  # as classes of transformers have it
    in_dtype(model, torch.bfloat16)
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert dtypes == {
        "positions": torch.bfloat16,
        "frequencies": torch.float32,
        "places": torch.int64,
        "codec": torch.float32,
    }
    assert model.positions.tolist() == [1, 1] and torch.get_default_dtype() == torch.float32
    assert model.config.dtype == torch.bfloat16
