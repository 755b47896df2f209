"""Quantized Hugging Face folders: what is read is what their packers put there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from llmc.arrays import Array
from llmc.checkpoint import Checkpoint, open_checkpoint
from llmc.checkpoint.quantization import ModuleFormat
from llmc.checkpoint.recipes import parse_quantization
from llmc.errors import CheckpointError, ExitCode, UnsupportedError
from tests.checkpoint.quantized_folders import (
    Pack,
    compressed_config,
    draw_fp8,
    gptq_config,
    pack_awq,
    pack_compressed,
    pack_gptq,
    pack_int8,
    write_codes,
    write_folder,
)
from tests.models import save_tiny_model

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}

LAYOUTS: dict[str, tuple[Mapping[str, Any], Pack, dict[str, Any]]] = {
    "gptq": (gptq_config(), pack_gptq(), {}),
    "gptq-2": (gptq_config(2), pack_gptq(), {"bits": 2}),
    "gptq-3": (gptq_config(3), pack_gptq(), {"bits": 3}),
    "gptq-8": (gptq_config(8), pack_gptq(), {"bits": 8}),
    "gptq-v2": (gptq_config(checkpoint_format="gptq_v2"), pack_gptq(0), {}),
    "gptq-v2-by-other-keys": (
        {"method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "format": "gptq_v2"},
        pack_gptq(0),
        {},
    ),
    "gptq-sym": (gptq_config(sym=True), pack_gptq(), {"symmetric": True}),
    "gptq-channel": (gptq_config(group_size=-1), pack_gptq(), {"group": -1}),
    "gptq-desc-act": (gptq_config(desc_act=True), pack_gptq(), {"scattered": True}),
    "awq": (AWQ, pack_awq, {}),
    "compressed": (compressed_config("pack-quantized", **PACKED), pack_compressed, {}),
    "compressed-sym": (
        compressed_config("pack-quantized", **PACKED),
        pack_compressed,
        {"symmetric": True, "scale_dtype": np.float32},
    ),
    "compressed-int8": (
        compressed_config("int-quantized", **INT8),
        pack_int8,
        {"bits": 8, "group": -1, "symmetric": True},
    ),
}


def check(folder: Path, values: Mapping[str, Array]) -> None:
    """Whole tensors, ranges of rows and PyTorch's model against `values`; every tensor has its place."""
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.unused == ()
    check_values(checkpoint, values)


def check_values(checkpoint: Checkpoint, values: Mapping[str, Array]) -> None:
    assert checkpoint.quantization is not None
    assert not hasattr(checkpoint.config, "quantization_config")
    state = checkpoint.load_reference(None).state_dict()
    for name, wanted in values.items():
        assert wanted.std() > 0.01
        np.testing.assert_array_equal(checkpoint.tensors.read(name), wanted)
        np.testing.assert_array_equal(checkpoint.tensors.read(name, 5, 19), wanted[5:19])
        np.testing.assert_array_equal(checkpoint.tensors.read(name, 19), wanted[19:])
        np.testing.assert_array_equal(state[name].numpy(), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_are_read_as_they_were_packed(layout: str, tmp_path: Path) -> None:
    config, pack, drawn = LAYOUTS[layout]
    check(tmp_path, write_codes(tmp_path, config, pack, **drawn))


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("config", "part", "tile"),
    [
        (FP8 | {"weight_block_size": [32, 48]}, "weight_scale_inv", (32, 48)),
        (FP8 | {"weight_block_size": None}, "weight_scale_inv", None),
        (
            compressed_config("float-quantized", num_bits=8, type="float", strategy="channel"),
            "weight_scale",
            (1, 1 << 20),
        ),
    ],
)
def test_fp8_is_read_with_its_scales(
    config: Mapping[str, Any], part: str, tile: tuple[int, int] | None, tmp_path: Path
) -> None:
    def pack(module: str, shape: tuple[int, int]) -> tuple[Mapping[str, Array], Array]:
        codes = draw_fp8(len(module), shape)
        rng = np.random.default_rng(1)
        if tile is None:
            scales = wide = np.float32(rng.uniform(0.004, 0.006)) * np.ones((), np.float32)
        else:
            scales = rng.uniform(0.004, 0.006, [-(-n // t) for n, t in zip(shape, tile, strict=True)])
            scales = scales.astype(np.float32)
            wide = np.repeat(np.repeat(scales, tile[0], 0), min(tile[1], shape[1]), 1)
            wide = wide[: shape[0], : shape[1]]
        return {"weight": codes.view(np.uint8), part: scales}, codes.astype(np.float32) * wide

    values = write_folder(tmp_path, config, pack)
    tensors = load_torch(tmp_path / "model.safetensors")
    as_fp8 = {n: t.view(torch.float8_e4m3fn) if t.dtype == torch.uint8 else t for n, t in tensors.items()}
    save_torch(as_fp8, tmp_path / "model.safetensors", {"format": "pt"})
    check(tmp_path, values)


def test_scales_in_bfloat16(tmp_path: Path) -> None:
    config, pack, _ = LAYOUTS["compressed"]
    values = write_codes(tmp_path, config, pack, scale_dtype=np.float32)
    tensors = load_torch(tmp_path / "model.safetensors")
    rounded = {n: t.bfloat16() if n.endswith("weight_scale") else t for n, t in tensors.items()}
    save_torch(rounded, tmp_path / "model.safetensors", {"format": "pt"})
    read = open_checkpoint(str(tmp_path)).tensors
    for name, wanted in values.items():
        scale = tensors[name.replace(".weight", ".weight_scale")].numpy()
        levels = np.rint(wanted / np.repeat(scale, 32, 1))
        expected = levels * np.repeat(scale.astype(ml_dtypes.bfloat16).astype(np.float32), 32, 1)
        np.testing.assert_array_equal(read.read(name), expected)


def rotation(location: str) -> dict[str, Any]:
    use = {"targets": ["Linear"], "location": location, "inverse": False}
    return {"config_groups": {"R1": {"type": "hadamard", "apply": [use]}}}


def test_rotations_of_weights_are_part_of_them(tmp_path: Path) -> None:
    config = compressed_config("pack-quantized", **PACKED) | {"transform_config": rotation("weight_input")}
    write_codes(tmp_path, config, pack_compressed, symmetric=True)
    assert open_checkpoint(str(tmp_path)).quantization is not None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq", "quant_config": {}}, "is quantized by hqq; supported are gptq"),
        ({"bits": 4}, "is quantized by an unnamed method"),
        (gptq_config(checkpoint_format="marlin"), "by gptq with layout marlin, which is not supported"),
        (gptq_config(5), "by gptq with 5 bits"),
        (AWQ | {"version": "gemv"}, "by awq with layout gemv"),
        (AWQ | {"version": None, "checkpoint_format": "gemv_fast"}, "by awq with layout gemv_fast"),
        (compressed_config("marlin-24"), "by compressed-tensors with format marlin-24"),
        ({"quant_method": "auto-round", "bits": 5, "group_size": 32}, "by auto-round with 5 bits"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "by modelopt with algorithm W4A8_AWQ"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"}, "by modelopt with algorithm NVFP4_SVD"),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "by mlx with mode mxfp4"),
        (
            compressed_config("pack-quantized", **PACKED) | {"sparsity_config": {"format": "sparse-24"}},
            "with sparse format sparse-24",
        ),
        (
            compressed_config("pack-quantized", **PACKED) | {"transform_config": rotation("input")},
            r"with rotated activations \(transform_config\)",
        ),
        (gptq_config(hadamard_size=64), r"by gptq with rotated activations \(hadamard_size\)"),
    ],
)
def test_other_layouts_are_refused(config: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    with pytest.raises(UnsupportedError, match=message) as caught:
        open_checkpoint(str(tmp_path))
    assert caught.value.exit_code == ExitCode.UNSUPPORTED
    assert caught.value.hint == "compile the original checkpoint in float instead"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is damaged: KeyError: 'group_size'"),
        (gptq_config(group_size=0), "is damaged: ValueError: group_size 0"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "KeyError: 'config_groups'"),
    ],
)
def test_damaged_settings(config: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    write_codes(tmp_path, config, pack_gptq())
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("qzeros", None, "the files lack .*q_proj.qzeros, which a quantized module needs"),
        ("scales", np.ones((2, 8), np.float16), r"q_proj.scales has shape \[2, 8\], but .* imply \[2, 64\]"),
        ("qweight", np.ones(8, np.int32), r"q_proj.qweight has shape \[8\], but a matrix"),
        ("g_idx", np.full(64, 7, np.int32), "q_proj.g_idx names groups beyond the 2"),
    ],
)
def test_tensors_that_do_not_fit(part: str, changed: Array | None, message: str, tmp_path: Path) -> None:
    write_codes(tmp_path, gptq_config(), pack_gptq())
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{part}"
    del tensors[name]
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path)).tensors.read("model.layers.0.self_attn.q_proj.weight")


def test_activations_scaled_by_awq_are_refused(tmp_path: Path) -> None:
    write_codes(tmp_path, AWQ, pack_awq)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.act_fn.scales"] = np.ones(96, np.float16)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"scales an activation function \(model.layers.0.mlp.act_fn"):
        open_checkpoint(str(tmp_path))


def test_the_group_of_a_module_is_found_by_its_name_first() -> None:
    config = compressed_config("pack-quantized", **PACKED)
    config["config_groups"]["group_1"] = {
        "targets": [r"re:.*\.down_proj$"],
        "weights": INT8,
        "format": "int-quantized",
    }
    found = parse_quantization(config, Path("model"))
    assert found.format_of("model.layers.0.mlp.down_proj") == ModuleFormat(8)
    assert found.format_of("model.layers.0.mlp.up_proj") == ModuleFormat(4, 32)
    del config["config_groups"]["group_0"]
    with pytest.raises(CheckpointError, match="up_proj is quantized, but no group of quantization_config"):
        parse_quantization(config, Path("model")).format_of("model.layers.0.mlp.up_proj")
