"""Any transformers config made tiny, by what its keys mean: sizes, layers, heads, experts, tokens.

shrink(config) -> a new config of the same type. Sub-configs (text, vision, audio, encoder, decoder) are
shrunk too. Sizes are ugly where the architecture allows: kv heads < heads, heads * head_dim != width, an odd
vocabulary, a window shorter than the example's rows. Per-layer lists keep one layer of each kind.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYERS = 2
MOST_LAYERS = 4  # where a list names more kinds of layers than two
VOCABULARY = 101
POSITIONS = 64
WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER = 64, 4, 2, 24, 112
WINDOW = 4  # shorter than any example
EXPERTS, CHOSEN = 4, 2

# Keys of one meaning -> their size. A key that is None, absent or smaller already stays as it is.
SIZES: Mapping[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "embed_dim", "embedding_dim",
         "word_embed_proj_dim", "projection_dim", "lru_width", "true_hidden_size", "hidden_size_global",
         "attention_hidden_size", "pooler_hidden_size", "input_embedding_size", "output_embedding_size",
         "out_hidden_size", "output_hidden_size", "d_latents", "projector_input_dim", "projector_output_dim",
         "output_dim", "entity_emb_size", "pooler_output_size", "projection_size", "width",
         "dim_model_base", "pronunciation_embed_dim", "shape_embed_dim", "backbone_hidden_size",
         "cross_hidden_size"),
        WIDTH,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
         "num_decoder_layers", "num_encoder_layers", "depth", "max_window_layers", "num_global_layers",
         "num_self_attends_per_block", "num_blocks", "num_layers_per_stack", "conf_num_hidden_layers",
         "encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_spatial_layers",
         "num_temporal_layers", "num_auxiliary_layers"),
        LAYERS,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
         "attention_heads", "swa_num_attention_heads", "conf_num_attention_heads", "index_n_heads",
         "num_self_attention_heads", "num_cross_attention_heads", "linear_num_heads",
         "encoder_num_attention_heads", "decoder_num_attention_heads", "cross_num_attention_heads",
         "encoder_num_key_value_heads", "decoder_num_key_value_heads"),
        HEADS,
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups",
         "linear_num_key_heads", "cross_num_key_value_heads"),
        KV_HEADS,
    ),
    "linear_num_value_heads": 4,
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "d_head", "swa_head_dim", "dim_head",
                     "attention_head_size", "cross_head_dim"), HEAD_DIM),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    "index_head_dim": 16,
    # Latent attention: a head has a rotated part and one that is not.
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "qk_head_dim": 20, "v_head_dim": 16,
    "kv_lora_rank": 20, "q_lora_rank": 28, "o_lora_rank": 16, "rotary_dim": 8,
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "d_ff", "dff", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim",
         "decoder_ffn_dim", "dim_ff", "hidden_dim", "mlp_dim", "shared_intermediate_size",
         "intermediate_size_mlp", "feed_forward_size", "d_inner", "dense_intermediate_size"),
        INNER,
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size",
         "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"),
        48,
    ),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"),
        EXPERTS,
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "n_group", "num_expert_group"),
        CHOSEN,
    ),
    "topk_group": 1, "first_k_dense_replace": 1,
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "audio_vocab_size",
         "entity_vocab_size", "unpadded_vocab_size", "codebook_size", "pronunciation_vocab_size",
         "shape_vocab_size", "encoder_hash_byte_group_vocab", "src_vocab_size", "tgt_vocab_size",
         "codebook_vocab_size"),
        VOCABULARY,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length",
         "context_length", "max_source_positions", "max_target_positions", "original_max_position_embeddings",
         "max_2d_position_embeddings", "num_position_embeddings", "rel_extent"),
        POSITIONS,
    ),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "local_attention",
         "attention_chunk_size", "attention_window", "local_attention_window_len", "index_topk"),
        WINDOW,
    ),
    **dict.fromkeys(
        ("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head", "mamba_head_dim", "mamba_headdim"),
        16,
    ),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 8),
    "n_groups": 2, "mamba_d_ssm": 128, "mamba_chunk_size": 8, "chunk_size": 8,
    "hidden_size_per_layer_input": 16, "laurel_rank": 8, "num_kv_shared_layers": 0,
    "adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH, "adapter_rank": 8, "router_hidden_size": 32,
    "subsampling_conv_channels": 16, "conv_channels": 32, "num_frames": 3, "num_patches": 9, "num_filters": 2,
    "mm_tokens_per_image": 1,
    "image_size": 24, "patch_size": 8, "num_mel_bins": 10, "input_feat_size": 10, "encoder_stride": 8,
    "query_pre_attn_scalar": 23, "num_latents": 8, "num_buckets": 8,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "position_bias_num_buckets": 8, "position_bias_max_distance": 16,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    "embedding_rank": 16, "gated_norm_rank": 8, "loop_gate_rank": 8, "hc_lowrank": 8, "ple_embed_dim": 16,
    "ngram_vocab_size_base": 101, "n_layers_per_attn_res_block": 1,
    "attn_layer_period": 2, "attn_layer_offset": 1,
    "num_centroids": 16, "centroid_intermediate_top_k": 4, "global_attn_every_n_layers": 2,
    "intra_bottleneck_size": 32, "prompt_mid_dim": 32,
}  # fmt: skip
EPSILONS = (
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    *("norm_eps", "norm_epsilon", "layernorm_epsilon"),
)
TOKENS = ("_token_id", "_token_index", "_index")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def shrink(config: PretrainedConfig, changes: Mapping[str, object] | None = None) -> PretrainedConfig:
    """A new, tiny config of the same type.

    Args:
        config: the type's defaults.
        changes: sizes that come before the generic ones; "vision_config.depth" is one of a sub-config.

    Raises:
        whatever the config's class raises for sizes that it does not accept.
    """
    own, below = _split(changes or {})
    kept = _layers_kept(config)
    values: dict[str, object] = {}
    for key, value in _fields(config).items():
        if _is_config(value):
            values[key] = shrink(value, below.get(key))
        elif key in own:
            values[key] = own[key]
        else:
            new = _shrunken(key, value, config, kept)
            if new is not value:
                values[key] = new
    values |= {key: value for key, value in own.items() if key not in values}
    try:
        made = type(config)(**values)  # derived values are computed anew
    except Exception:
        made = copy.deepcopy(config)
    for key, value in values.items():  # what the constructor did not take over
        with contextlib.suppress(Exception):  # a property that the type computes from others
            if getattr(made, key, None) != value:
                setattr(made, key, value)
    return made


def _fields(config: PretrainedConfig) -> dict[str, object]:
    """A config's own keys, without what every config has."""
    return {k: v for k, v in vars(config).items() if k[0] != "_" and k not in ("id2label", "label2id")}


def _is_config(value: object) -> bool:
    from transformers import PretrainedConfig

    return isinstance(value, PretrainedConfig)


def _split(changes: Mapping[str, object]) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """A config's own changes, and those of its sub-configs."""
    own: dict[str, object] = {}
    below: dict[str, dict[str, object]] = {}
    for key, value in changes.items():
        head, dot, rest = key.partition(".")
        if dot:
            below.setdefault(head, {})[rest] = value
        else:
            own[key] = value
    return own, below


def _layers_kept(config: PretrainedConfig) -> tuple[int, ...]:
    """Which layers stay, where per-layer lists say that they differ: the first of each kind, two at least."""
    depth = _depth(config)
    lists = [v for v in _fields(config).values() if _per_layer(v, depth)]
    if not lists:
        return ()
    firsts: dict[tuple[str, ...], int] = {}
    for i, kind in enumerate(zip(*(map(repr, values) for values in lists), strict=True)):
        firsts.setdefault(kind, i)
    kept = sorted(firsts.values())[:MOST_LAYERS]
    others = [i for i in range(depth) if i not in kept]
    return tuple(sorted([*kept, *others[: max(LAYERS - len(kept), 0)]]))


def _depth(config: PretrainedConfig) -> int:
    return next((d for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")
                 if isinstance(d := getattr(config, k, None), int)), 0)  # fmt: skip


def _per_layer(value: object, depth: int) -> TypeGuard[Sequence[object]]:
    return isinstance(value, (list, tuple)) and len(value) == depth > LAYERS


def _shrunken(key: str, value: object, config: PretrainedConfig, kept: tuple[int, ...]) -> object:
    """A key's value in the tiny config; the same object where it stays."""
    if kept and _per_layer(value, _depth(config)):
        return type(value)(value[i] for i in kept)  # type: ignore[call-arg]  # a list or a tuple
    if kept and key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        return len(kept)
    if key in SPECIAL and isinstance(value, (int, list)):
        return SPECIAL[key]
    if key.endswith(TOKENS) and isinstance(value, int) and not isinstance(value, bool):
        return value if value < VOCABULARY else 3 + sum(map(ord, key)) % 7
    if key in EPSILONS and isinstance(value, float):
        return 1e-2  # large, so that a wrong one shows
    if key == "conv_dim" and isinstance(value, (list, tuple)):
        return type(value)([WIDTH // 2] * len(value))  # of an audio encoder's convolutions
    if isinstance(value, dict) and "rope" in key:
        return _rope(value, config)
    size, own = SIZES.get(key), vars(config)  # getattr refuses a size that differs from layer to layer
    if key == "head_dim" and value is not None and value == own.get("qk_rope_head_dim"):
        return SIZES["qk_rope_head_dim"]  # of latent attention, what is rotated
    if key == "num_mel_bins" and isinstance(factor := own.get("subsampling_factor"), int):
        return 2 * factor  # so many bins become one
    if key == "num_key_value_heads" and "kv_lora_rank" in own:
        return value if value is None else HEADS  # latent attention has one for each head
    if value is None and key == "head_dim":
        return HEAD_DIM
    if size is None or not isinstance(value, int) or isinstance(value, bool) or value <= size:
        return value
    return size


def _rope(parameters: dict[str, object], config: PretrainedConfig) -> dict[str, object]:
    """Rotary parameters for the small head: sections and factors of its length, few original positions."""
    new: dict[str, object] = {}
    for key, value in parameters.items():
        if isinstance(value, dict):
            new[key] = _rope(value, config)
        elif key == "original_max_position_embeddings":
            new[key] = POSITIONS // 2
        elif key == "mrope_section" and isinstance(value, (list, tuple)):
            new[key] = [HEAD_DIM // 2 // len(value)] * len(value)
        elif key in ("short_factor", "long_factor") and isinstance(value, (list, tuple)):
            new[key] = list(value[: HEAD_DIM // 2])
        else:
            new[key] = value
    return new
