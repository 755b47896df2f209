"""Tiny random models and a tiny tokenizer, written as real checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.architecture import auto_class, building
from tests.architectures import (
    DEPTHS,
    FEWEST,
    at_depth,
    derive_layers,
    layers_of,
    merge,
    parts_of,
    stated_values,
    states_layout,
)
from tests.tiny_fields import ALWAYS, FEATURES, SIZES
from tests.tiny_fields import EOS as EOS
from tests.tiny_fields import VOCAB_SIZE as VOCAB_SIZE

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_MOST_PARAMETERS = 16_000_000

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
        {"model_type": "gemma3_text", **FEATURES["gemma3_text"]},
        {**_TOWER, "model_type": "siglip_vision_model"},
    ),
}
MULTIMODAL_TYPES = tuple(_MULTIMODAL)


def tiny_multimodal_fields(model_type: str) -> dict[str, Any]:
    """Overrides of `tiny_config` for one of `MULTIMODAL_TYPES`; the tower has more layers than the text."""
    from transformers import CONFIG_MAPPING

    text, tower = _MULTIMODAL[model_type]
    kind = CONFIG_MAPPING[text["model_type"]]()
    return {
        "text_config": {**_tiny_fields(kind), **at_depth(kind, FEWEST), **text},
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
    """A config of `model_type` with hidden size 64, 4 heads of 16, vocabulary 256 and every kind of layer.

    The layers are derived from the type's default config (`tests.architectures`), at least 3 of them. If
    the layers are stated here, there are 3 unless another number is.

    Args:
        overrides: Fields of the config that replace those above.
    """
    from transformers import CONFIG_MAPPING

    laid_out = states_layout(CONFIG_MAPPING[model_type](), {**FEATURES.get(model_type, {}), **overrides})
    return CONFIG_MAPPING[model_type](**{**_derived_fields(model_type, laid_out), **overrides})


@cache
def _derived_fields(model_type: str, laid_out: bool) -> dict[str, Any]:
    """Fields of a tiny config, with a depth of 3 if its layers are laid out elsewhere."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    small = _tiny_fields(kind())
    features = FEATURES.get(model_type, {})
    if laid_out:
        return merge(merge(small, at_depth(kind(), FEWEST)), features)
    return derive_layers(kind, merge(small, features), features)


def _tiny_fields(default: PreTrainedConfig) -> dict[str, Any]:
    """Small sizes of everything that `default` states a size for, its parts included.

    A size that is None or 0 turns something off, and stays so; heads are stated anyway. A part that is not
    the language model has 2 layers.
    """
    values = stated_values(default)
    fields = {
        name: size if name.endswith("_token_id") else _shrink(values[name], size)
        for name, size in SIZES.items()
        if name in values and (values[name] or name in ALWAYS)
    }
    if "is_decoder" in values:
        fields["is_decoder"] = True
    if values.get("kv_lora_rank"):  # latent attention unpacks keys and values for every head
        fields["num_key_value_heads"] = SIZES["num_attention_heads"]
    text = default.get_text_config(decoder=True)
    for name, part in parts_of(default).items():
        declared = stated_values(part)
        own = {k: v for k, v in part.to_diff_dict().items() if k in declared}
        if part is not text:
            own = dict.fromkeys(DEPTHS & declared.keys(), 2)
        fields[name] = {"model_type": part.model_type, **own, **_tiny_fields(part)}
    return fields


def _shrink(value: Any, size: Any) -> Any:
    if isinstance(value, (list, tuple)) and not isinstance(size, (list, tuple)):
        return [_shrink(each, size) for each in value]
    return min(value, size) if isinstance(value, int) else size


def build_tiny_model(
    model_type: str, seed: int = 0, gain: float | None = None, **overrides: Any
) -> PreTrainedModel:
    """A float32 model of `tiny_config` in eval mode, with weights that leave no part of it idle.

    Matrices are normal with a deviation of 0.15, so that attention is far from uniform; vectors
    (norms, biases) are moved from where transformers puts them by a deviation of 0.1.

    Args:
        gain: The deviation of the layers' matrices, times the root of their inputs, and the factor of their
            norms' weights.

    Raises:
        ValueError: A size of this config goes by a name that is not known here, so it is not tiny.
    """
    import torch

    config = tiny_config(model_type, **overrides)
    auto = auto_class(config)
    with torch.device("meta"), building():
        parameters = sum(p.numel() for p in auto.from_config(config).parameters())
    if parameters > _MOST_PARAMETERS:
        raise ValueError(f"a tiny {model_type} would have {parameters} parameters; override its sizes")
    torch.manual_seed(seed)
    with building():
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    inside = set() if gain is None else {id(p) for layer in layers_of(model) for p in layer.parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            inner = gain if id(parameter) in inside else None
            if parameter.ndim < 2:
                scale = inner if inner is not None and name.endswith("weight") else 1.0
                parameter.mul_(scale).add_(0.1 * noise)
            else:
                scale = 0.15 if inner is None else inner * parameter.shape[-1] ** -0.5
                parameter.copy_(scale * noise)
    return model.eval()


def save_tiny_model(
    model_type: str,
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    tokenizer: bool = False,
    max_shard_size: int | str = "50GB",
    gain: float | None = None,
    **overrides: Any,
) -> Path:
    """Write `build_tiny_model` to `folder` with `save_pretrained`, and return `folder`.

    Args:
        dtype: Type of the stored weights; None for float32.
        tokenizer: Also write `save_tiny_tokenizer`.
        max_shard_size: Bytes per safetensors file.
        gain: As for `build_tiny_model`.
    """
    model = build_tiny_model(model_type, seed, gain, **overrides)
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
