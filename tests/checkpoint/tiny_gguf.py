"""Writes tiny random models as GGUF files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 64, 4, 2, 96, 2
EXPERTS, EXPERT_INNER = 4, 96
TOKENS = [f"t{i}" for i in range(250)] + ["<s>", "</s>", "a", "b", "ab", "c"]

_KV = HIDDEN // HEADS * KV_HEADS
_ATTENTION = {
    "attn_norm.weight": (HIDDEN,),
    "ffn_norm.weight": (HIDDEN,),
    "attn_q.weight": (HIDDEN, HIDDEN),
    "attn_k.weight": (_KV, HIDDEN),
    "attn_v.weight": (_KV, HIDDEN),
    "attn_output.weight": (HIDDEN, HIDDEN),
}
_GATED = {
    "ffn_gate.weight": (INNER, HIDDEN),
    "ffn_up.weight": (INNER, HIDDEN),
    "ffn_down.weight": (HIDDEN, INNER),
}
_TOP = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}

# Tensors of one layer by llama.cpp's names, per architecture; shapes as numpy has them.
LAYER: dict[str, dict[str, tuple[int, ...]]] = {
    "llama": _ATTENTION | _GATED,
    "gemma2": _ATTENTION
    | _GATED
    | {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)},
    "gemma3": _ATTENTION
    | _GATED
    | {
        "attn_q_norm.weight": (HIDDEN // HEADS,),
        "attn_k_norm.weight": (HIDDEN // HEADS,),
        "post_attention_norm.weight": (HIDDEN,),
        "post_ffw_norm.weight": (HIDDEN,),
    },
    "qwen3moe": _ATTENTION
    | {
        "attn_q_norm.weight": (HIDDEN // HEADS,),
        "attn_k_norm.weight": (HIDDEN // HEADS,),
        "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
        "ffn_gate_exps.weight": (EXPERTS, EXPERT_INNER, HIDDEN),
        "ffn_up_exps.weight": (EXPERTS, EXPERT_INNER, HIDDEN),
        "ffn_down_exps.weight": (EXPERTS, HIDDEN, EXPERT_INNER),
    },
    "gpt2": {
        "attn_norm.weight": (HIDDEN,),
        "attn_norm.bias": (HIDDEN,),
        "ffn_norm.weight": (HIDDEN,),
        "ffn_norm.bias": (HIDDEN,),
        "attn_qkv.weight": (3 * HIDDEN, HIDDEN),
        "attn_qkv.bias": (3 * HIDDEN,),
        "attn_output.weight": (HIDDEN, HIDDEN),
        "attn_output.bias": (HIDDEN,),
        "ffn_up.weight": (4 * HIDDEN, HIDDEN),
        "ffn_up.bias": (4 * HIDDEN,),
        "ffn_down.weight": (HIDDEN, 4 * HIDDEN),
        "ffn_down.bias": (HIDDEN,),
    },
    "lfm2": _GATED
    | {
        "attn_norm.weight": (HIDDEN,),
        "ffn_norm.weight": (HIDDEN,),
        "shortconv.in_proj.weight": (3 * HIDDEN, HIDDEN),
        "shortconv.out_proj.weight": (HIDDEN, HIDDEN),
        "shortconv.conv.weight": (HIDDEN, 3),
    },
}
LAYER["bloom"] = LAYER["gpt2"]
TOP: dict[str, dict[str, tuple[int, ...]]] = {
    "bloom": _TOP
    | {"token_embd_norm.weight": (HIDDEN,), "token_embd_norm.bias": (HIDDEN,), "output_norm.bias": (HIDDEN,)},
    "gpt2": _TOP | {"position_embd.weight": (1024, HIDDEN), "output_norm.bias": (HIDDEN,)},
    "lfm2": {"token_embd.weight": (len(TOKENS), HIDDEN), "token_embd_norm.weight": (HIDDEN,)},
}


#: Bytes of a block at which its float16 scales and minimums stand.
SCALES_AT = {
    GGMLQuantizationType[name]: places
    for name, places in {
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
        "IQ4_NL": (0,),
        "IQ4_XS": (0,),
        "IQ2_XXS": (0,),
        "NVFP4": (),  # its scales are float8
    }.items()
}


def write_gguf(
    file: Path,
    architecture: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
    omit: str = "",
    vocabulary: bool = True,
    kinds: Mapping[str, GGMLQuantizationType] | None = None,
    scale: int = 1,
    deviation: float = 1.0,
    facts: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A tiny model with random weights: matrices in `kind`, vectors and convolutions in F32.

    An architecture that is not in `LAYER` gets the tensors of a llama.

    Args:
        kinds: Types of tensors whose name ends so, in the place of `kind`.
        scale: Every width is that many times as large, for types with blocks of 256.
        deviation: Of the values of matrices; scales of random blocks are that many times as large.
        facts: More metadata by key, `ARCHITECTURE.` left out, in the place of what is stated by default.
        tensors: More tensors, stored as they are.
    """
    writer = GGUFWriter(str(file), architecture)
    _add_metadata(writer, architecture, scale)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([1] * 250 + [3, 3] + [1] * 4)
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(250)
        writer.add_eos_token_id(251)
    add_facts(writer, architecture, facts or {})
    layer = LAYER.get(architecture, LAYER["llama"])
    shapes = TOP.get(architecture, _TOP) | {
        f"blk.{i}.{n}": s for i in range(LAYERS) for n, s in layer.items()
    }
    for name, shape in shapes.items():
        if name == omit:
            continue
        shape = tuple(size if size == len(TOKENS) else size * scale for size in shape)
        values = tensor_values(name, shape) * np.float32(1.0 if len(shape) == 1 else deviation)
        own = next((k for end, k in (kinds or {}).items() if name.endswith(end)), kind)
        if len(shape) == 1 or shape[-1] % 32 or own == GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        elif own in SCALES_AT:
            writer.add_tensor(name, random_blocks(own, shape, deviation=deviation), raw_dtype=own)
        else:
            writer.add_tensor(name, quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def random_blocks(
    kind: GGMLQuantizationType, shape: tuple[int, ...], seed: int = 0, deviation: float = 1.0
) -> np.ndarray:
    """Random bytes of a tensor of a type that the gguf package does not write.

    Scales are about `deviation` times 0.01, or 0.0002 in blocks of 256, which have further factors.
    """
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng([seed, *shape])
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)
    blocks = raw.reshape(-1, size)
    for at in SCALES_AT[kind]:
        scales = deviation * rng.normal(0, 2e-4 if block == 256 else 1e-2, (len(blocks), 1))
        blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8)
    if kind is GGMLQuantizationType.NVFP4:
        blocks[:, :4] &= 0x3F
    return raw


def add_facts(writer: GGUFWriter, architecture: str, facts: Mapping[str, Any]) -> None:
    """Add metadata by key, with the architecture in front unless the key is of the file."""
    for name, value in facts.items():
        whole = name.startswith(("general.", "tokenizer.", "split."))
        key = name if whole else f"{architecture}.{name}"
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        writer.kv_data[0].pop(key, None)
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def tensor_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What `write_gguf` stores as `name`, before quantization."""
    return np.random.default_rng(list(name.encode())).standard_normal(shape, np.float32)


def _add_metadata(writer: GGUFWriter, architecture: str, scale: int) -> None:
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN * scale)
    writer.add_block_count(LAYERS)
    inner = 4 * HIDDEN if architecture in ("gpt2", "bloom") else INNER
    writer.add_feed_forward_length(inner * scale)
    writer.add_head_count(HEADS)
    writer.add_rope_freq_base(10000.0)
    if architecture in ("gpt2", "bloom"):
        writer.add_layer_norm_eps(1e-5)
        return
    writer.add_head_count_kv([0] * LAYERS if architecture == "lfm2" else KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_key_length(HIDDEN * scale // HEADS)
    if architecture == "lfm2":
        writer.add_shortconv_l_cache(3)
    if architecture == "qwen3moe":
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
