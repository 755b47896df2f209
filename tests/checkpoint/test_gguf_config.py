"""Metadata and tensors of GGUF files: applied, known to change nothing, or refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.checkpoint import open_checkpoint
from llmc.errors import CheckpointError, UnsupportedError
from tests.checkpoint.tiny_gguf import HEADS, HIDDEN, INNER, LAYER, LAYERS, write_gguf


@pytest.mark.parametrize(
    ("architecture", "facts", "field", "value"),
    [
        ("gemma2", {"attn_logit_softcapping": 20.0}, "attn_logit_softcapping", 20.0),
        ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping", None),
        ("gemma2", {}, "query_pre_attn_scalar", HIDDEN // HEADS),
        ("gemma2", {"attention.scale": 0.125}, "query_pre_attn_scalar", 64),
        ("gemma3", {"attention.sliding_window": 32}, "sliding_window", 32),
        (
            "gemma3",
            {"attention.sliding_window_pattern": [False, True]},
            "layer_types",
            ["full_attention", "sliding_attention"],
        ),
        ("qwen3moe", {"expert_feed_forward_length": 96}, "moe_intermediate_size", 96),
        ("qwen3moe", {"expert_weights_norm": False}, "norm_topk_prob", False),
        ("llama", {"attention.layer_norm_rms_epsilon": 0.5}, "rms_norm_eps", 0.5),
        ("llama", {"attention.head_count_kv": [2] * LAYERS}, "num_key_value_heads", 2),
    ],
)
def test_key_reaches_the_config(
    architecture: str, facts: dict[str, Any], field: str, value: object, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", architecture, facts=facts)))
    assert getattr(checkpoint.config, field) == value


@pytest.mark.parametrize(
    "facts",
    [
        {"attention.value_length": HIDDEN // HEADS, "attention.causal": True, "pooling_type": 0},
        {"logit_scale": 1.0, "residual_scale": 0.0, "expert_count": 0, "attention.clamp_kqv": 0.0},
        {"vocab_size": 256, "tensor_data_layout": "Meta AI original pth", "expert_weights_scale": 1.0},
        {"general.tags": ["a"], "tokenizer.ggml.eot_token_id": 251},
    ],
)
def test_key_that_changes_nothing(facts: dict[str, Any], tmp_path: Path) -> None:
    assert open_checkpoint(str(write_gguf(tmp_path / "x.gguf", facts=facts))).notes == ()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"attention.scale": 0.5}, r"llama\.attention\.scale = 0\.5, which llmc does not know"),
        ({"attention.sliding_window": 64}, r"llama\.attention\.sliding_window = 64"),
        ({"attn_logit_softcapping": 30.0}, r"llama\.attn_logit_softcapping = 30\.0"),
        ({"logit_scale": 0.25}, r"llama\.logit_scale = 0\.25"),
        ({"residual_scale": 0.5}, r"llama\.residual_scale = 0\.5"),
        ({"embedding_scale": 12.0}, r"llama\.embedding_scale = 12\.0"),
        ({"attention.clamp_kqv": 8.0}, r"llama\.attention\.clamp_kqv = 8\.0"),
        ({"expert_count": 4, "expert_used_count": 2}, r"llama\.expert_count = 4"),
        ({"attention.value_length": 8}, r"llama\.attention\.value_length = 8"),
        ({"attention.head_count_kv": [2, 1]}, r"llama\.attention\.head_count_kv = an array"),
        ({"some_new_factor": 1.5}, r"llama\.some_new_factor = 1\.5"),
        ({"some_new_list": ["a", "b"]}, r"llama\.some_new_list = an array"),
        ({"nextn_predict_layers": 1}, r"llama\.nextn_predict_layers = 1"),
        ({"pooling_type": 1}, r"embedding or ranking model: llama\.pooling_type = 1 \(mean\)"),
        ({"attention.causal": False}, r"attends in both directions"),
        ({"general.type": "adapter"}, "holds a LoRA adapter"),
        ({"general.type": "mmproj"}, "holds the encoder of images or sound"),
    ],
)
def test_key_that_is_not_understood(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        open_checkpoint(str(write_gguf(tmp_path / "x.gguf", facts=facts)))
    assert caught.value.hint is not None


def test_stored_rotary_tables_are_left_out_and_told(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_rot_embd": np.ones(HIDDEN // HEADS // 2, np.float32)}
    notes = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors=tensors))).notes
    assert notes == ("Not used: blk.0.attn_rot_embd (stored rotary tables, which the config determines).",)


def test_biases_of_all_projections_are_taken(tmp_path: Path) -> None:
    sizes = {"attn_q": HIDDEN, "attn_k": HIDDEN // 2, "attn_v": HIDDEN // 2, "attn_output": HIDDEN}
    tensors = {
        f"blk.{i}.{name}.bias": np.arange(size, dtype=np.float32)
        for i in range(LAYERS)
        for name, size in sizes.items()
    }
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors=tensors)))
    assert checkpoint.config.attention_bias
    bias = checkpoint.tensors.read("model.layers.1.self_attn.o_proj.bias")
    np.testing.assert_array_equal(bias, np.arange(HIDDEN))


@pytest.mark.parametrize(("facts", "ends"), [({}, 251), ({"tokenizer.ggml.eot_token_id": 255}, [251, 255])])
def test_generation_ends_at_the_end_of_a_turn(facts: dict[str, Any], ends: object, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", facts=facts)))
    assert checkpoint.generation_config().eos_token_id == ends


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"rope.scaling.factor": "x"}, r"rope\.scaling\.factor = 'x', which must be a number"),
        ({"rope.freq_base": 0.0}, r"rope\.freq_base = 0\.0, which must be a number above 0"),
        ({"rope.scaling.attn_factor": float("nan")}, "= nan, which must be a number"),
        ({"embedding_length": "64"}, "which must be a whole number"),
        ({"embedding_length": [64]}, "embedding_length = an array, which must be a whole number above 0"),
        ({"context_length": 0}, "context_length = 0, which must be a whole number above 0"),
        ({"attention.head_count": 0}, r"does not describe a llama model \(.*attention\.head_count = 0"),
        ({"embedding_length": 128}, "hidden_size is 128 in .*, but no tensor"),
        ({"tokenizer.ggml.bos_token_id": [1, 2]}, r"bos_token_id = an array, which must be a whole number"),
        ({"tokenizer.ggml.add_bos_token": 1.5}, "which must be true or false"),
        ({"tokenizer.ggml.pre": 3}, "which must be a string"),
        ({"block_count": 2**31}, r"has tensors for 2 blocks, but llama\.block_count is 2147483648"),
        ({"block_count": 1}, r"has tensors for 2 blocks, but llama\.block_count is 1"),
        ({"rope.dimension_count": 1}, "a rotary embedding of 1 dimensions"),
    ],
)
def test_value_that_no_key_can_have(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(write_gguf(tmp_path / "x.gguf", facts=facts)))


def test_default_token_beyond_the_vocabulary_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = {"attn_qkv.weight": (2 * HIDDEN, HIDDEN), "ffn_up.weight": (2 * INNER, HIDDEN)}
    kept = ("attn_norm.weight", "ffn_norm.weight", "attn_output.weight", "ffn_down.weight")
    layer = {name: LAYER["llama"][name] for name in kept}
    monkeypatch.setitem(LAYER, "phi3", layer | fused)
    config = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", "phi3"))).config
    assert (config.pad_token_id, config.eos_token_id) == (None, 251)
