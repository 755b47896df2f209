"""Tiny random models and a tiny tokenizer, written as real checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.architecture import auto_class

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 256
_MOST_PARAMETERS = 16_000_000
BOS, EOS, PAD = 1, 2, 0

# The architectures that every station is tested on.
MODEL_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
    "granite",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "opt",
    "falcon",
    "starcoder2",
    "stablelm",
    "mixtral",
    "qwen3_moe",
)

# Names under which configs state their sizes. Each config gets those that its class declares.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
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
    "decoder_layers": 3,
    "num_encoder_layers": 3,
    "num_decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "dim_ff": 96,
    "emb_dim": 64,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 16,
    "word_embed_proj_dim": 64,
    "sliding_window": 8,
    "attention_window": 8,
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
    "shared_expert_intermediate_size": 32,
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
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rotary_dim": 16,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}

# What an architecture needs beyond its sizes, so that all of its features are in use.
_FEATURES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": True},
    "granite": {
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "mixtral": {"sliding_window": 8},
}

# Multimodal models: the language model's fields, and the tower's.
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_TOWER |= {"image_size": 28, "patch_size": 14}
_QWEN_TOWER = {"depth": 4, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 14}
_MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": ({"model_type": "qwen2_5_vl_text", "rope_parameters": _MROPE}, _QWEN_TOWER),
    "qwen3_vl": (
        {"model_type": "qwen3_vl_text", "rope_parameters": _MROPE},
        {**_QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "llava": (
        {"model_type": "llama"},
        {**_TOWER, "num_hidden_layers": 5, "model_type": "clip_vision_model", "projection_dim": 16},
    ),
    "gemma3": (
        {"model_type": "gemma3_text", **_FEATURES["gemma3_text"]},
        {**_TOWER, "model_type": "siglip_vision_model"},
    ),
}
MULTIMODAL_TYPES = tuple(_MULTIMODAL)


def tiny_multimodal_fields(model_type: str) -> dict[str, Any]:
    """Overrides of `tiny_config` for one of `MULTIMODAL_TYPES`; the tower has more layers than the text."""
    from transformers import CONFIG_MAPPING

    text, tower = _MULTIMODAL[model_type]
    return {
        "text_config": {**_tiny_fields(CONFIG_MAPPING[text["model_type"]]), **text},
        "vision_config": tower,
        "image_token_id": 3,
        "image_token_index": 3,
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": False,
    }


def longrope(switch: int) -> dict[str, Any]:
    """Rotary embedding of a tiny model that takes its long factors beyond `switch` tokens."""
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
        "original_max_position_embeddings": switch,
    }


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A config of `model_type` with hidden size 64, 3 layers, 4 heads of 16, vocabulary 256.

    Args:
        overrides: Fields of the config that replace those above.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind(**{**_tiny_fields(kind), **_FEATURES.get(model_type, {}), **overrides})


def _tiny_fields(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    declared = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    fields = {name: value for name, value in _SIZES.items() if name in declared}
    if "is_decoder" in declared:
        fields["is_decoder"] = True
    if "kv_lora_rank" in declared:  # latent attention unpacks keys and values for every head
        fields["num_key_value_heads"] = _SIZES["num_attention_heads"]
    parts = {name: part for name, part in kind.sub_configs.items() if getattr(part, "model_type", "")}
    return fields | {name: _tiny_fields(part) for name, part in parts.items()}


def build_tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model of `tiny_config` in eval mode, with weights that leave no part of it idle.

    Matrices are normal with a deviation of 0.15, so that attention is far from uniform; vectors
    (norms, biases) are moved from where transformers puts them by a deviation of 0.1.

    Raises:
        ValueError: A size of this config goes by a name that is not known here, so it is not tiny.
    """
    import torch

    config = tiny_config(model_type, **overrides)
    auto = auto_class(config)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in auto.from_config(config).parameters())
    if parameters > _MOST_PARAMETERS:
        raise ValueError(f"a tiny {model_type} would have {parameters} parameters; override its sizes")
    torch.manual_seed(seed)
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.ndim < 2 else 0.15 * noise)
    return model.eval()


def save_tiny_model(
    model_type: str,
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    tokenizer: bool = False,
    max_shard_size: int | str = "50GB",
    **overrides: Any,
) -> Path:
    """Write `build_tiny_model` to `folder` with `save_pretrained`, and return `folder`.

    Args:
        dtype: Type of the stored weights; None for float32.
        tokenizer: Also write `save_tiny_tokenizer`.
        max_shard_size: Bytes per safetensors file.
    """
    model = build_tiny_model(model_type, seed, **overrides)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        save_tiny_tokenizer(folder)
    return folder


def save_tiny_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """Write a byte-level BPE tokenizer with a chat template to `folder`, and return `folder`.

    It has 3 special tokens, the 95 printable ASCII bytes and the line feed, and merges of a short
    text up to `vocab_size`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "the quick brown fox jumps over the lazy dog; a compiler reads a model and writes a program. "
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False)
    printable = "".join(map(chr, range(32, 127))) + "\n"
    initial = sorted({c for piece, _ in alphabet.pre_tokenize_str(printable) for c in piece})
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=initial, show_progress=False
    )
    words = text.split()
    tokenizer.train_from_iterator(
        [text, *(" ".join(words[i:] + words[:i]) for i in range(len(words)))], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    fast.chat_template = (
        "{% for message in messages %}{{ bos_token }}{{ message['role'] }}: {{ message['content'] }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}"
    )
    fast.save_pretrained(folder)
    return folder
