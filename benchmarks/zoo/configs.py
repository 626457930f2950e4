"""Tiny configurations: a type's default configuration with its sizes made small, and corrections where sizes depend on each other.

Sizes are chosen so that heads, groups, head width, hidden size and FFN width all differ: a mistake cannot hide behind two axes of
one size. No network is used.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

VOCABULARY = 97
IMAGE = 64
PATCH = 16

_TABLE = """
48  hidden_size n_embd d_model embed_dim embedding_size word_embed_proj_dim emb_dim dim_model input_embedding_size
48  embedding_dim output_embedding_size decoder_hidden_size lru_width backbone_hidden_size attention_hidden_size
48  encoder_hidden_size projection_dim vision_feature_layer_size hidden_size_global
6   num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
6   num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads attention_heads
6   conf_num_attention_heads num_hash_heads
2   linear_num_key_heads num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_hidden_layers n_layer
2   n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers depth num_blocks_per_stack
2   conf_num_hidden_layers num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k n_group num_expert_group
2   num_shared_experts moe_num_shared_experts num_global_layers num_hidden_groups num_codebooks num_quantizers
2   index_topk_blocks conv_kernel linear_conv_kernel_dim short_conv_kernel_size conv_kernel_size num_layers_per_stack
2   spatial_merge_size num_lstm_layers
1   topk_group n_shared_experts num_dense_layers first_k_dense_replace pretraining_tp
8   head_dim attention_head_size kv_channels d_kv swa_head_dim global_head_dim attention_head_dim d_head dim_head
8   qk_nope_head_dim linear_key_head_dim sliding_window attention_window_size local_attention sliding_window_size
8   index_topk mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size time_step_rank mamba_dt_rank rel_extent
8   attention_chunk_size index_head_dim d_rel router_hidden_size image_token_size linear_head_dim
8   hidden_size_per_layer_input laurel_rank adapter_rank
64  intermediate_size ffn_dim d_ff dff dim_ff ffn_hidden_size n_inner encoder_ffn_dim decoder_ffn_dim d_inner
64  feed_forward_size intermediate_size_mlp max_position_embeddings n_positions max_seq_len n_ctx mlp_dim
64  dense_intermediate_size max_source_positions max_target_positions context_length
40  moe_intermediate_size expert_ffn_hidden_size
24  shared_expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank shared_intermediate_size
24  shared_experts_intermediate_size
4   num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim linear_num_value_heads index_n_heads
4   rotary_dim zero_expert_num mamba_d_conv conv1d_width
16  kv_lora_rank linear_value_head_dim mamba_d_head mamba_head_dim mamba_headdim relative_attention_num_buckets
12  qk_head_dim
10  v_head_dim
32  relative_attention_max_distance
97  vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size audio_vocab_size
64  image_size crop_size
16  patch_size
"""
SIZES = {name: int(line.split()[0]) for line in _TABLE.split("\n") for name in line.split()[1:]}
"""Small sizes by the names that configurations use for them."""

SPECIAL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "mask_token_id": 3,
    "eod_token_id": 2,
    "image_token_id": 4,
    "image_token_index": 4,
    "video_token_id": 3,
}
LAYERS = "num_hidden_layers"


def shrink(default: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration table with small sizes; nested configurations are shrunk too.

    Lists with an entry a layer keep each kind of entry once, and the number of layers follows.
    """
    small: dict[str, Any] = {}
    for key, value in default.items():
        if isinstance(value, Mapping) and ("model_type" in value or key.endswith("_config")):
            small[key] = shrink(value)
        elif isinstance(value, bool):
            continue
        elif key in SPECIAL and (value is None or isinstance(value, int | list)):
            small[key] = SPECIAL[key]
        elif (key in SIZES and isinstance(value, int)) or (
            value is None and key in ("head_dim", "n_inner", "intermediate_size", "moe_intermediate_size")
        ):
            small[key] = SIZES[key]
    if "kv_lora_rank" in small and default.get("num_key_value_heads") == default.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "qk_rope_head_dim" in small and default.get("head_dim") == default.get("qk_rope_head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]
    layers = default.get(LAYERS)
    per_layer = {k: v for k, v in default.items() if isinstance(v, list) and layers and len(v) == layers}
    if per_layer:
        rows = list(zip(*(per_layer[k] for k in per_layer), strict=True))
        chosen = sorted({str(r): i for i, r in reversed(list(enumerate(rows)))}.values())[:4]
        while len(chosen) < 2:
            chosen.append(chosen[-1])
        small[LAYERS] = len(chosen)
        small |= {k: [SIZES[k] if k in SIZES else copy.deepcopy(v[i]) for i in chosen] for k, v in per_layer.items()}
    return small


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2}
_STAGES = {"hidden_sizes": [16, 24, 40, 56], "depths": [1, 2, 1, 1]}
_ATTENTION_STAGES = {**_STAGES, "num_attention_heads": [1, 2, 4, 4], "decoder_hidden_size": 48}
_BOTTLENECKS = {"hidden_sizes": [32, 48, 64, 96], "depths": [1, 2, 1, 1], "embedding_size": 24}
_WINDOWS = {"embed_dim": 24, "depths": [2, 1, 1], "num_heads": [2, 3, 6], "window_size": 4, "patch_size": 4}

CORRECTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 6, "attn_layer_indices": [1]},
    "bit": {**_BOTTLENECKS, "embedding_size": 16, "num_groups": 8},
    "convnext": {**_STAGES, "patch_size": 4},
    "convnextv2": {**_STAGES, "patch_size": 4},
    "cvt": {"embed_dim": [16, 24, 48], "num_heads": [1, 3, 6], "depth": [1, 2, 3]},
    "donut-swin": _WINDOWS,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "image_size": 64},
    "focalnet": {"embed_dim": 16, "hidden_sizes": [32, 64, 128, 128], "depths": [1, 1, 1, 1], "patch_size": 4},
    "hiera": {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]},
    "levit": {
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "down_ops": [["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 6, 4, 2, 2]],
    },
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {
        "hidden_sizes": [24, 32, 40],
        "neck_hidden_sizes": [8, 16, 16, 24, 24, 32, 48],
        "num_attention_heads": 4,
        "patch_size": 2,
    },
    "poolformer": _STAGES,
    "pvt": _ATTENTION_STAGES,
    "pvt_v2": _ATTENTION_STAGES,
    "regnet": {**_STAGES, "embedding_size": 16, "groups_width": 8},
    "resnet": _BOTTLENECKS,
    "segformer": _ATTENTION_STAGES,
    "squeezebert": {"num_attention_heads": 4},
    "swiftformer": {"embed_dims": [16, 24, 40, 56], "depths": [1, 1, 1, 1]},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "big_bird": {"attention_type": "original_full"},
    "codegen": {"n_head": 4},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {"adapter_in_dim": 48, "text_config": {"head_dim": 12, "per_layer_config": {}}},
    "dots3_note_text": {"head_dim": 12, "per_layer_config": {}},
    "esm": {"vocab_size": VOCABULARY},
    "esmc": {"num_key_value_heads": 6},
    "falcon_h1": {"mamba_d_ssm": 96, "mamba_n_heads": 6, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "got_ocr2": {"vision_config": {"output_channels": 16}},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
        "num_layers": 2,
        "window_size": 4,
    },
    "granitemoehybrid": {"mamba_n_heads": 6, "mamba_d_head": 16, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "kimi_linear": {"linear_num_heads": 6, "num_key_value_heads": 6},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 6, "head_dim": 16, "n_groups": 2},
    "mimo_v2_flash": {"num_attention_heads": 8},
    "mpnet": {"relative_attention_num_buckets": 32},
    "masked.reformer": {
        "is_decoder": False,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 32],
        "attn_layers": ["local", "lsh"],
    },
    "moshi": {"audio_vocab_size": 64, "audio_encoder_config": {"codebook_size": 64}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 6, "n_groups": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 32], "attn_layers": ["local", "lsh"]},
    "roc_bert": {"pronunciation_embed_dim": 20, "pronunciation_vocab_size": 30, "shape_embed_dim": 24, "shape_vocab_size": 40},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 96,
        "attention_head_dim": 16,
        "num_key_value_heads": 6,
        "n_mamba_heads": 2,
    },
    "wav2vec2-bert": {"vocab_size": VOCABULARY},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "n_mamba_heads": 6,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "num_key_value_heads": 6,
        "attention_head_dim": 16,
        "attention_hidden_size": 96,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type needs beyond small sizes, mostly where one size must be a product of others."""


def tiny(model_type: str, task: str = "") -> Any:
    """The tiny configuration of a model type, for a task where that makes a difference."""
    from transformers import AutoConfig

    corrections = CORRECTIONS.get(f"{task}.{model_type}", CORRECTIONS.get(model_type, {}))
    try:
        default = AutoConfig.for_model(model_type).to_dict()
    except ValueError:  # its defaults do not go together
        default = {}
    return AutoConfig.for_model(model_type, **_merged(shrink(default), corrections))


def _merged(small: dict[str, Any], corrections: Mapping[str, Any]) -> dict[str, Any]:
    nested = {k: _merged(small[k], v) for k, v in corrections.items() if isinstance(v, Mapping) and isinstance(small.get(k), dict)}
    return {**small, **corrections, **nested}
