"""Sizes of single types, where the shrink by meaning gives what a type's class refuses: the only place of the
zoo that knows model types by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Type -> keys of its config ("sub_config.key" inside) and their values; the reason where it is not plain.
SIZES_OF: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "align": {
            "vision_config.width_coefficient": 0.25, "vision_config.depth_coefficient": 0.5,
            "vision_config.image_size": 64, "projection_dim": 80,  # the width of the last block
        },
        "blip-2": {"qformer_config.use_qformer_text_input": True},  # this head gives it the text
        "blt": {f"{part}_config.head_dim": 16 for part in ("patcher", "encoder", "decoder", "global")},
        # A composite's parts whose values are not their class's own.
        "canary": {"encoder_config.scale_input": False},
        "cohere_asr": {"encoder_config.scale_input": False},
        "nemo_speechlm": {"text_config.num_key_value_heads": 2, "text_config.routed_scaling_factor": 2.5},
        "speech-encoder-decoder": {"decoder.is_decoder": True, "decoder.add_cross_attention": True},
        "cohere_compass_text": {
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
        },
        "dbrx": {
            "attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0, "ffn_config.ffn_hidden_size": 48,
        },
        "deepseek_v2": {"num_experts_per_tok": 2},
        "dots1": {
            "n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        },
        # Its third layer, a local one, has heads of its own: a part that is not rotated, and one of 8.
        "dots3_note": {"text_config.per_layer_config": {2: {"qk_nope_head_dim": 16, "kv_lora_rank": 24}}},
        "dots3_note_text": {"per_layer_config": {2: {"qk_nope_head_dim": 16, "kv_lora_rank": 24}}},
        "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
        "esmc": {"num_key_value_heads": 4, "head_dim": 16},
        "flint": {"mlp_only_layers": [0]},  # experts in the other one
        "gemma3n_text": {"intermediate_size": [112] * 4},
        "granite_speech5_ctc": {"encoder_config.context_size": 8, "encoder_config.num_key_value_heads": 4},
        "gemma4_text": {
            "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48,
        },
        "helium": {"head_dim": 16},
        "kyutai_speech_to_text": {
            "codec_config.codebook_size": 64, "codec_config.upsample_groups": 64,  # a power of two; the width
        },
        "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "mamba2": {"num_heads": 8, "head_dim": 16},  # heads * head_dim is the inner width
        "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32},
        "moonshine_streaming": {"num_key_value_heads": 4},  # has no default
        "moshi": {"codebook_size": 64},  # a power of two
        "mpnet": {"relative_attention_num_buckets": 32},  # its code says 32, whatever the config says
        "nemotron": {"num_key_value_heads": 2},
        "neomme": {"head_dim": 32},  # a quarter of it rotates, in two axes
        "phi4_multimodal": {"audio_config.nemo_conv_channels": 16, "audio_config.ext_pw_out_channel": 32},
        "qwen4_exp": {
            "text_config.indexer_n_heads": 4, "text_config.indexer_kv_heads": 1,
            "text_config.indexer_head_dim": 24, "text_config.indexer_budget": 4,
            "text_config.indexer_compress_ratio": 2,
        },
        "qwen4_exp_text": {
            "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 24, "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        },
        "reformer": {"axial_pos_embds_dim": (24, 40), "axial_pos_shape": (8, 8)},
        "shieldgemma2": {  # its checkpoints have no vision head; its tokens are in no default config
            "yes_token_index": 5, "no_token_index": 7, "vision_config.vision_use_head": False,
        },
        "videoprism": {"vision_config.tubelet_size": (1, 8, 8)},
        "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        "wav2vec2-bert": {"vocab_size": 101},
        "wav2vec2-conformer": {"vocab_size": 101},
        "xlnet": {"d_head": 16},
        "xmod": {"default_language": "en_XX"},
        "zamba": {
            "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "attention_hidden_size": 128, "attention_head_dim": 32,  # twice the width
        },
        "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    }
)  # fmt: skip
