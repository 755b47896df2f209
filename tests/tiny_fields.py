"""Sizes of tiny models, and what single architectures need besides."""

from typing import Any

VOCAB_SIZE = 256
BOS, EOS, PAD = 1, 2, 0

# Names under which configs state their sizes. Each config gets those that its class declares.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "encoder_layers": 3,
    "num_encoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "dim_ff": 96,
    "emb_dim": 64,
    "embed_dim": 64,
    "intermediate_size_mlp": 96,
    "shared_intermediate_size": 96,
    "global_head_dim": 32,
    "swa_head_dim": 16,
    "unpadded_vocab_size": VOCAB_SIZE,
    "projection_hidden_dim": 64,
    "codebook_dim": 64,
    "rel_extent": 64,
    "hidden_size_global": 64,
    "encoder_hash_byte_group_vocab": VOCAB_SIZE,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "adapter_in_dim": 64,
    "hidden_sizes": 64,
    "moe_hidden_size": 64,
    "adapter_input_size": 64,
    "adapter_out_dim": 64,
    "projector_hidden_size": 64,
    "projection_dim": 64,
    "projection_intermediate_size": 96,
    "num_embeddings": VOCAB_SIZE,
    "base_channels": 32,
    "latent_channels": 32,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 16,
    "word_embed_proj_dim": 64,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_window": 8,
    "attention_window_size": 8,
    "attention_chunk_size": 8,
    "index_topk": 16,
    "index_head_dim": 32,
    "index_n_heads": 16,
    "window_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 2,
    "router_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_ssm": 128,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_mamba_heads": 8,
    "ssm_state_size": 16,
    "state_size": 16,
    "n_groups": 2,
    "mamba_n_groups": 2,
    "mamba_ngroups": 2,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rotary_dim": 16,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}

# Sizes that are stated although the default config has none: transformers computes them from others.
ALWAYS = {
    "num_key_value_heads",
    "num_kv_heads",
    "head_dim",
    "n_inner",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}

_HYBRID = ["linear_attention", "full_attention"] * 2
_CONVOLUTIONS = {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]}
_SHARED_KEYS = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
}
_COMPASS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "full_attention": None,
    },
}
_SECTIONS = {"text_config": {"rope_parameters": {"mrope_section": [2, 3, 3]}}}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_TWO_WIDTHS = {
    "num_hidden_layers": 4,
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "per_layer_config": {
        f"{layer:02}": {
            "kv_lora_rank": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "qk_nope_head_dim": 24,
            "head_dim": 40,
        }
        for layer in (1, 3)
    },
}

# What an architecture needs beyond its sizes, so that all of its features are in use.
FEATURES: dict[str, dict[str, Any]] = {
    # transformers saves the language model alone with a type that no class of it loads.
    "mllama": {"architectures": ["MllamaForConditionalGeneration"]},
    "emu3": {
        "architectures": ["Emu3ForConditionalGeneration"],
        "vocabulary_map": {"<image>": 5, "<|extra_200|>": 6, "<|visual token 000000|>": 7},
    },
    "mistral": {"sliding_window": 8},
    "recurrent_gemma": {"max_position_embeddings": 256},  # its code runs token by token, and states no bound
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"sliding_window": 8},
    "phimoe": {"sliding_window": 8},
    "starcoder2": {"sliding_window": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 8},
    "granite": {
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "mixtral": {"sliding_window": 8},
    # The default config has fewer kinds of layers than the released models.
    "lfm2": _CONVOLUTIONS,
    "lfm2_vl": {"text_config": _CONVOLUTIONS},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": _HYBRID, "attention_multiplier": 0.25},
    "gemma4_text": _SHARED_KEYS,
    "gemma4": {"text_config": _SHARED_KEYS},
    # The default config lacks fields that the model reads.
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "lfm2_moe": {**_CONVOLUTIONS, "num_dense_layers": 1},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "chameleon": {"vocabulary_map": {"<image>": 3, "IMGIMGAZ": 4, "IMGIMGBZ": 5, "IMGIMGCZ": 250}},
    "cohere_compass_text": _COMPASS,
    "cohere_compass": {"text_config": _COMPASS},
    "qwen4_exp_text": _INDEXED,
    "qwen4_exp": {"text_config": _INDEXED},
    "deepseek_ocr2": {
        "text_config": {
            "num_hidden_layers": 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_experts_per_tok": 2,
        }
    },
    "hunyuan_vl": {"text_config": {"rope_parameters": {"mrope_section": [2, 2, 2, 2]}}},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xmod": {"default_language": "en_XX"},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 1, 2, 1],
        "downsample_rate": "4/8",
    },
    # Sizes that depend on each other in ways of their own.
    "falcon_h1": {"mamba_d_head": 16},
    "dots3_note_text": _TWO_WIDTHS,
    "dots3_note": {"vision_config": {"mlp_layer_types": ["dense", "sparse"]}, "text_config": _TWO_WIDTHS},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [2, 2, 4]}}},
    "glm4v_moe": {
        "text_config": {"rope_parameters": {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}
    },
    **dict.fromkeys(
        (
            "cosmos3_edge",
            "glm46v",
            "glm4v",
            "glm_ocr",
            "glmga",
            "hy_v4_vl",
            "paddleocr_vl",
            "qwen2_5_omni_thinker",
            "qwen2_5_vl",
            "qwen2_vl",
        ),
        _SECTIONS,
    ),
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 16)},
    "apertus1p5": {
        "vision_config": {"codebook_size": 64},
        "audio_config": {"codebook_size": 32},
        "image_token_offset": 96,
        "audio_token_offset": 160,
    },
    "fast_vlm": {"vision_config": {"hidden_size": 64}},
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 64}}},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}},
    # The number of layers is too few, that of the encoder, rewritten by the config, or a sum of counts.
    "bloom": {"n_layer": 3},
    "blenderbot": {"encoder_layers": 3},
    "hrm_text": {"num_hidden_layers": 3},
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "initializer_range": 0.5,  # the unit of the scales of queries, which move by 0.1
    },
    # Scores without a scale would leave every token with one key, and multiply differences of rounding.
    "granitemoe": {"attention_multiplier": 0.25},
    "granitemoeshared": {"attention_multiplier": 0.25},
    # One block of weights is shared by several layers; the prefix would have it once.
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
