"""Tensors that are missing, or not what the model is made of."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from llmc.errors import UnsupportedError
from tests.checkpoint.refusals import edit_config, refused
from tests.models import save_tiny_model


def test_codes_that_nothing_describes(llama: Path, damaged: Callable[[Path], Path]) -> None:
    file = damaged(llama) / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, file)
    error = refused(
        file.parent, r"layers\.0\S+ and 20 more .* integers \(INT8\) .* has floats", UnsupportedError
    )
    assert "quantization_config" in str(error.hint)


def test_tensor_missing(llama: Path, damaged: Callable[[Path], Path]) -> None:
    file = damaged(llama) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    refused(file.parent, r"the files lack model\.layers\.1\.mlp\.up_proj\.weight, which LlamaForCausalLM has")


def test_tensor_of_the_wrong_shape(llama: Path, damaged: Callable[[Path], Path]) -> None:
    refused(
        edit_config(damaged(llama), intermediate_size=80),
        r"mlp\.\w+\.weight has shape \[96, 64\] in the files \(from .*\), but the config implies \[80, 64\]"
        r"|mlp\.\w+\.weight has shape \[64, 96\] in the files \(from .*\), but the config implies \[64, 80\]",
    )


def test_expert_missing(tmp_path: Path) -> None:
    file = save_tiny_model("mixtral", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    save_file(tensors, file)
    refused(tmp_path, r"model\.layers\.0\.mlp\.experts\.gate_up_proj cannot be made from .*7 tensors")


def test_tied_tensors_that_differ(tmp_path: Path) -> None:
    file = save_tiny_model("llama", tmp_path, tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(1)
    save_file(tensors, file)
    refused(tmp_path, "embed_tokens.weight and lm_head.weight differ in the files")
