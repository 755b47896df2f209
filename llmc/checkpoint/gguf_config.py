"""Build the transformers config of a GGUF model from every key of the file that affects its numbers.

transformers maps some of llama.cpp's keys (`integrations.ggml`, `integrations.gguf`) and leaves the rest at
the defaults of its config class, whatever the file says. Here each `ARCHITECTURE.*` key is applied, is known
to change nothing, or is the reason to refuse the file. Source of the keys: `gguf.constants.Keys`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llmc.checkpoint.gguf_header import GgufHeader
from llmc.checkpoint.gguf_outline import write_outline
from llmc.checkpoint.gguf_rope import rope_parameters
from llmc.errors import CheckpointError, UnsupportedError, first_lines

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_TOKENS = "tokenizer.ggml.tokens"
_ORIGINAL = "compile the original Hugging Face checkpoint instead"

# Key -> fields of transformers' configs with the same meaning; the first field that the config class has is
# set.
_FIELDS: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
}

# Values of a key that have the same effect as leaving the key out.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.head_count": (0,),
    "attention.head_count_kv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_norm": (False,),
    "expert_weights_scale": (0, 1),
    "feed_forward_length": (0,),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0, 1),
    "n_deepstack_layers": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "router_logit_softcapping": (0,),
    "ssm.dt_b_c_rms": (False,),
}

# Fields that older files state only by the shape of a tensor: its name, and the axis.
_WIDTHS = {
    "moe_intermediate_size": ("blk.0.ffn_gate_exps.weight", 1),
    "shared_expert_intermediate_size": ("blk.0.ffn_gate_shexp.weight", 0),
}

# The tensors decide on StableLM's parallel residuals, since converters state the key for all of its models.
_DESCRIPTIVE = frozenset(
    {"block_count", "embedding_length", "tensor_data_layout", "use_parallel_residual", "vocab_size"}
)
_SPECIAL = frozenset({"attention.sliding_window_pattern"})  # read by `_implied_fields`
_OFF_WHEN_ZERO = frozenset({"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"})
_POOLING = {1: "mean", 2: "the first token", 3: "the last token", 4: "ranking"}

# Number of layers of the models that scale attention by the width of the model divided by the heads.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}


def load_gguf_config(header: GgufHeader) -> PreTrainedConfig:
    """Build the config of a GGUF model.

    Raises:
        CheckpointError: The keys do not describe a model of the file's architecture.
        UnsupportedError: The model is not a causal language model, transformers cannot read its architecture
            out of a GGUF file, or llmc does not know how to apply one of its keys.
    """
    _refuse_kinds(header)
    _check_blocks(header)
    fields, read = _transformers_fields(header)
    config_class = _config_class(header, fields["model_type"])
    field_names = {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    stated = _stated_fields(header, read, field_names)
    fields |= _unstated_tokens(config_class, fields)
    fields |= _implied_fields(header, field_names) | {field: value for field, (_, value) in stated.items()}
    config = _make(header, config_class, fields)
    rope = rope_parameters(header, config)
    if rope is not None:
        fields = {k: v for k, v in fields.items() if k not in ("rope_theta", "rope_scaling")}
        fields["rope_parameters"] = rope
        if "original_max_position_embeddings" in field_names and "original_max_position_embeddings" in rope:
            fields["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        config = _make(header, config_class, fields)
    for field, (key, value) in stated.items():
        if getattr(config, field) != value:
            raise _not_applied(header, key, value)
    return config


def stop_tokens(header: GgufHeader) -> list[int]:
    """Return the ids that end a text, a turn or a message, as the file states them, without repetition."""
    stated = [header.value(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    return list(dict.fromkeys(index for index in stated if index is not None))


def _refuse_kinds(header: GgufHeader) -> None:
    """Refuse files that hold anything other than a whole causal language model."""
    file, kind = header.files[0], header.value("general.type")
    if kind == "adapter":
        raise UnsupportedError(
            f"{file} holds a LoRA adapter, not a model", hint="merge it into its base model first"
        )
    if kind in ("mmproj", "imatrix") or header.architecture == "clip":
        content = "an importance matrix" if kind == "imatrix" else "the encoder of images or sound"
        raise UnsupportedError(
            f"{file} holds {content}, not a language model",
            hint="give the file of the language model itself",
        )
    pooling = header.value("pooling_type")
    if pooling:
        raise UnsupportedError(
            f"{file} is an embedding or ranking model: {header.architecture}.pooling_type = {pooling} "
            f"({_POOLING.get(pooling, 'unknown')})",
            hint="llmc compiles decoder-only language models",
        )
    if header.value("attention.causal") is False:
        raise UnsupportedError(
            f"{file} attends in both directions ({header.architecture}.attention.causal = false)",
            hint="llmc compiles decoder-only language models",
        )
    if header.architecture == "falcon" and _uniform(header.value("attention.head_count_kv")) not in (None, 1):
        raise UnsupportedError(
            f"{file} is a Falcon with {header.value('attention.head_count_kv')} key/value heads, "
            "whose joined projection transformers does not reorder",
            hint=_ORIGINAL,
        )


def _check_blocks(header: GgufHeader) -> None:
    """Compare the number of blocks in the metadata with the tensors."""
    matches = [re.match(r"blk\.(\d+)\.", tensor.name) for tensor in header.tensors]
    count = 1 + max((int(match[1]) for match in matches if match is not None), default=-1)
    stated = header.value("block_count")
    if count and stated != count:
        raise CheckpointError(
            f"{header.files[0]} has tensors for {count} blocks, "
            f"but {header.architecture}.block_count is {stated}",
            hint="download it again, or convert the original model again",
        )


def _transformers_fields(header: GgufHeader) -> tuple[dict[str, Any], set[str]]:
    """Return the fields that transformers derives from the keys, and the keys that it reads for them."""
    from transformers import PreTrainedConfig
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS, get_gguf_config
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    names = tuple(tensor.name for tensor in header.tensors)
    mapped: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    try:
        if header.architecture in GGUF_CONFIG_ARCHS:
            recorded = _Recorded(header.metadata | {_TOKENS: header.array_lengths.get(_TOKENS, 0)})
            fields = dict(get_gguf_config(recorded, names))
            read = recorded.read
        else:
            with TemporaryDirectory() as folder, _without_warnings():
                outline = Path(folder) / "outline.gguf"
                write_outline(header, outline)
                parsed: Any = PreTrainedConfig.get_config_dict(folder, gguf_file=outline.name)
                fields = dict(parsed[0])
            model_type = fields["model_type"].removesuffix("_text")
            read = {key for key, field in mapped.get(model_type, {}).items() if field is not None}
    except Exception as error:  # transformers raises ValueError, KeyError or a type of its own
        if "not supported" in str(error) or header.architecture not in {*GGUF_CONFIG_ARCHS, *mapped}:
            raise UnsupportedError(
                f"{header.files[0]} is a GGUF of architecture {header.architecture}, "
                "which transformers cannot read",
                hint=_ORIGINAL,
            ) from error
        raise _not_described(header, error) from error
    rows = {tensor.name: tensor.shape[0] for tensor in header.tensors if tensor.shape}
    if "token_embd.weight" in rows:
        fields["vocab_size"] = rows["token_embd.weight"]
    if "position_embd.weight" in rows:
        fields["n_positions"] = rows["position_embd.weight"]
    return fields, {key.removeprefix(f"{header.architecture}.") for key in read}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress the warning that the outline lacks a vocabulary."""
    logger = logging.getLogger("transformers.modeling_gguf_pytorch_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Recorded(dict[str, Any]):
    """Metadata that records which keys were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def _config_class(header: GgufHeader, model_type: str) -> type[PreTrainedConfig]:
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"{header.files[0]} is a GGUF of architecture {header.architecture}, "
            "which the installed transformers does not have",
            hint=_ORIGINAL,
        )
    mapped_class: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    return mapped_class


def _unstated_tokens(config_class: type[PreTrainedConfig], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Set token ids to None that the file does not name and the class defaults beyond the vocabulary."""
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: defaults.get(name) for name in names if name not in fields}
    rows = fields.get("vocab_size", 0)
    return {name: None for name, index in ids.items() if isinstance(index, int) and index >= rows}


def _stated_fields(header: GgufHeader, read: set[str], field_names: set[str]) -> dict[str, tuple[str, Any]]:
    """Return, for each config field, the key that states it and its value.

    Raises:
        UnsupportedError: A key is neither understood nor known to change nothing.
    """
    stated: dict[str, tuple[str, Any]] = {}
    whole = header.architecture in ("lfm2", "qwen35", "qwen35moe")  # transformers applies all keys it reads
    settled = {*_DESCRIPTIVE, "context_length"} if _has_positions(header) else _DESCRIPTIVE
    for key, suffix, raw in _model_keys(header):
        value = _uniform(raw)
        field = next((name for name in _FIELDS.get(suffix, ()) if name in field_names), None)
        if suffix in settled or (whole and suffix in read):
            continue
        if field is not None and not isinstance(value, list):
            stated[field] = (key, None if field in _OFF_WHEN_ZERO and not value else value)
        elif isinstance(value, list) or not (
            suffix in read or _changes_nothing(header, suffix, value, field_names)
        ):
            raise _not_applied(header, key, raw)
    return stated


def _has_positions(header: GgufHeader) -> bool:
    """Return whether the model has a table of positions, whose rows are its context."""
    return any(tensor.name == "position_embd.weight" for tensor in header.tensors)


def _model_keys(header: GgufHeader) -> Iterator[tuple[str, str, Any]]:
    """Yield each key of the model except those of its rotary embedding: key, key without prefix, value."""
    prefix = f"{header.architecture}."
    for key in header.spans:
        suffix = key.removeprefix(prefix)
        if key.startswith(prefix) and not suffix.startswith("rope.") and suffix not in _SPECIAL:
            yield key, suffix, header.metadata.get(key, [])


def _changes_nothing(header: GgufHeader, suffix: str, value: Any, field_names: set[str]) -> bool:
    heads, width = _uniform(header.value("attention.head_count")), header.value("embedding_length")
    head = width // heads if heads and width else 0
    key_length = header.value("attention.key_length") or head
    same = {
        "attention.key_length": head,
        "attention.value_length": key_length,
        "attention.key_length_swa": key_length,
        "attention.value_length_swa": key_length,
        "attention.head_count_kv": heads,
        "embedding_length_out": width,
        "feed_forward_length": 4 * width if width else None,
    }
    if suffix == "context_length":  # for a model without positions, or with a table of them
        return "max_position_embeddings" not in field_names
    if suffix == "attention.scale" and "query_pre_attn_scalar" in field_names:
        return True  # read by `_implied_fields`
    if suffix == "attention.max_alibi_bias" and header.architecture == "bloom":
        return bool(value == 8.0)
    return value in _NEUTRAL.get(suffix, ()) or (suffix in same and value == same[suffix])


def _implied_fields(header: GgufHeader, field_names: set[str]) -> dict[str, Any]:
    """Return the fields that llama.cpp derives from other keys, tensors or the architecture's name."""
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    heads, width = _uniform(header.value("attention.head_count")), header.value("embedding_length")
    implied: dict[str, Any] = {}
    for field, (tensor, axis) in _WIDTHS.items():
        if field in field_names and len(shapes.get(tensor, ())) > axis:
            implied[field] = shapes[tensor][axis]
    if heads and width and "head_dim" in field_names:
        implied["head_dim"] = header.value("attention.key_length") or width // heads
    if header.value("attention.head_count_kv") is None and "num_key_value_heads" in field_names:
        implied["num_key_value_heads"] = heads
    if "attention_bias" in field_names:
        implied["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if "mlp_bias" in field_names:
        implied["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if "query_pre_attn_scalar" in field_names and heads and width:
        whole = header.value("block_count") == _LARGEST_GEMMA.get(header.architecture)
        scale = header.value("attention.scale")
        divisor = width // heads if whole else implied["head_dim"]
        implied["query_pre_attn_scalar"] = round(scale**-2) if scale else divisor
    pattern = header.value("attention.sliding_window_pattern")
    if pattern is not None:
        implied["layer_types"] = _layer_types(header, pattern, field_names)
    return implied


def _layer_types(header: GgufHeader, pattern: Any, field_names: set[str]) -> list[str]:
    """Return each layer's type: every `pattern`th is global, or those not flagged as sliding."""
    count = header.value("block_count")
    if "layer_types" not in field_names or not count or (isinstance(pattern, list) and len(pattern) != count):
        raise _not_applied(header, f"{header.architecture}.attention.sliding_window_pattern", pattern)
    if not isinstance(pattern, list | int):
        raise _not_applied(header, f"{header.architecture}.attention.sliding_window_pattern", pattern)
    slides = pattern if isinstance(pattern, list) else [bool((i + 1) % max(pattern, 1)) for i in range(count)]
    return ["sliding_attention" if flag else "full_attention" for flag in slides]


def _make(
    header: GgufHeader, config_class: type[PreTrainedConfig], fields: Mapping[str, Any]
) -> PreTrainedConfig:
    try:
        return config_class.from_dict(dict(fields))
    except Exception as error:  # transformers' config classes raise any type of error
        raise _not_described(header, error) from error


def _uniform(value: Any) -> Any:
    """Return the element of a list whose elements are all equal; return other values unchanged."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]
    return value


def _not_described(header: GgufHeader, error: Exception) -> CheckpointError:
    sizes = ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv")
    stated = ", ".join(f"{key} = {header.value(key)}" for key in sizes)
    return CheckpointError(
        f"{header.files[0]} does not describe a {header.architecture} model ({stated}): {first_lines(error)}",
        hint="download it again, or convert the original model again",
    )


def _not_applied(header: GgufHeader, key: str, value: Any) -> UnsupportedError:
    shown = "an array" if isinstance(value, list) else value
    return UnsupportedError(
        f"{header.files[0]} has {key} = {shown}, which llmc does not know how to apply", hint=_ORIGINAL
    )
