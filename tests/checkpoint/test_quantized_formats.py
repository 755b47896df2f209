"""Small floats, tables and affine integers of quantized folders, and who says how they were quantized."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc.arrays import Array
from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.declared import find_declarations
from llmc.errors import CheckpointError, UnsupportedError
from tests.checkpoint import packed_formats as formats
from tests.checkpoint.quantized_folders import (
    compressed_config,
    draw_codes,
    draw_fp8,
    gptq_config,
    pack_awq,
    pack_gptq,
    write_codes,
    write_folder,
)
from tests.checkpoint.test_quantized import check, check_values
from tests.models import save_tiny_model

Pack = Callable[[tuple[int, int]], formats.Packed]

MODELOPT: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
MLX = {"group_size": 32, "bits": 4}
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}

FORMATS: dict[str, tuple[Mapping[str, Any], Pack]] = {
    "modelopt-nvfp4": (MODELOPT, partial(formats.pack_nvfp4, divides=False)),
    "modelopt-int8": (
        MODELOPT | {"quant_algo": "W8A8_SQ_PER_CHANNEL"},
        formats.pack_int8_by_output,
    ),
    "modelopt-int4": (
        MODELOPT | {"quant_algo": "W4A16_AWQ"},
        partial(formats.pack_modelopt_int4, scaled=False),
    ),
    "modelopt-awq": (
        MODELOPT | {"quant_algo": "W4A16_AWQ"},
        partial(formats.pack_modelopt_int4, scaled=True),
    ),
    "modelopt-mxfp4": (
        MODELOPT | {"quant_algo": "W4A8_MXFP4_FP8"},
        partial(formats.pack_mxfp4, part="weight"),
    ),
    "modelopt-mxfp8": (MODELOPT | {"quant_algo": "MXFP8"}, formats.pack_mxfp8),
    "compressed-nvfp4": (
        compressed_config(
            "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
        ),
        partial(formats.pack_nvfp4, divides=True),
    ),
    "compressed-mxfp4": (
        compressed_config("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        formats.pack_mxfp4,
    ),
    "auto-round-mxfp4": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_fp"},
        formats.pack_mxfp4,
    ),
    "nf4": (BNB, partial(formats.pack_bitsandbytes, nested=False)),
    "nf4-nested": (BNB, partial(formats.pack_bitsandbytes, nested=True)),
    "nf4-blocks-over-rows": (BNB, partial(formats.pack_bitsandbytes, nested=False, block=256)),
    "nf4-in-words": (BNB, partial(formats.pack_bitsandbytes, nested=True, storage="<i4")),
    "llm-int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        partial(formats.pack_int8_by_output, part="SCB"),
    ),
    **{f"mlx-{bits}": (MLX | {"bits": bits}, partial(formats.pack_mlx, bits=bits)) for bits in (3, 4, 6)},
}


def save(folder: Path, config: Mapping[str, Any], pack: Pack) -> dict[str, Array]:
    return write_folder(folder, config, lambda _, shape: pack(shape))


def pack_fp8(shape: tuple[int, int]) -> formats.Packed:
    codes = draw_fp8(shape[0], shape)
    scale = np.array(0.005, np.float32)
    return {"weight": codes, "weight_scale": scale}, codes.astype(np.float32) * scale


def edit(folder: Path, drop: str = "", **fields: Any) -> None:
    """Change fields of config.json."""
    config = json.loads((folder / "config.json").read_text()) | fields
    config.pop(drop, None)
    (folder / "config.json").write_text(json.dumps(config))


def move_to_side(folder: Path, name: str, fields: Mapping[str, Any]) -> None:
    """Say in a side file what config.json says no more."""
    edit(folder, drop="quantization_config")
    (folder / name).write_text(json.dumps(fields))


def add_tensor(folder: Path, name: str, value: Array) -> None:
    """Add a tensor to the first layer, or put it in the place of another."""
    stored = load_file(folder / "model.safetensors")
    added = {f"model.layers.0.{name}": torch.from_numpy(value.copy())}
    save_file(stored | added, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read_as_it_was_packed(name: str, tmp_path: Path) -> None:
    config, pack = FORMATS[name]
    check(tmp_path, save(tmp_path, config, pack))


GPT_OSS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def write_gpt_oss(folder: Path, **sizes: Any) -> dict[str, Array]:
    """A tiny gpt-oss whose experts are mxfp4 as published; values by transformers' own function."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    save_tiny_model("gpt_oss", folder, num_hidden_layers=1, **sizes)
    tensors = load_file(folder / "model.safetensors")
    values = {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes, exponents = formats.draw_fp4((experts, outputs, inputs), 32)
        blocks = torch.from_numpy(formats.pairs(codes).reshape(experts, outputs, inputs // 32, 16))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": torch.from_numpy(exponents)}
        values[name] = convert_moe_packed_tensors(
            blocks, torch.from_numpy(exponents), dtype=torch.float32
        ).numpy()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit(folder, quantization_config=GPT_OSS)
    return values


def test_experts_of_gpt_oss_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    values = write_gpt_oss(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    state = checkpoint.load_reference().state_dict()
    assert (len(values), checkpoint.unused) == (2, ())
    assert checkpoint.notes == ("4-bit floats (2 matrices) are read as 8-bit integers, without loss.",)
    for name, wanted in values.items():
        np.testing.assert_array_equal(checkpoint.tensors.read(name), wanted)
        np.testing.assert_array_equal(checkpoint.tensors.read(name, 1, 3), wanted[1:3])
        np.testing.assert_array_equal(state[name].numpy(), wanted)


AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}


@pytest.mark.parametrize(
    ("fields", "offset"),
    [
        ({"packing_format": "auto_round:auto_gptq"}, 1),
        ({"backend": "auto_round:gptq:exllamav2"}, 1),
        ({"packing_format": "auto_round"}, 0),
        ({"packing_format": "auto_round:gptqmodel"}, 0),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:exllamav2"}, 0),
    ],
)
def test_zero_points_of_auto_round_are_those_of_its_layout(
    fields: Mapping[str, Any], offset: int, tmp_path: Path
) -> None:
    check(tmp_path, write_codes(tmp_path, AUTO_ROUND | fields, pack_gptq(offset)))


def test_auto_round_in_the_layout_of_awq(tmp_path: Path) -> None:
    config = AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}
    check(tmp_path, write_codes(tmp_path, config, pack_awq))


def test_rules_by_module_of_gptq(tmp_path: Path) -> None:
    def pack(module: str, shape: tuple[int, int]) -> tuple[Mapping[str, Array], Array]:
        wide = module.endswith("down_proj")
        codes = draw_codes(len(module), shape, bits=8 if wide else 4, group=48 if wide else 32)
        if module.endswith("o_proj"):
            return {"weight": codes.values()}, codes.values()
        tensors = pack_gptq()(codes)
        return {part: tensors[part] for part in ("qweight", "qzeros", "scales")}, codes.values()

    rules = {r"+:.*\.down_proj": {"bits": 8, "group_size": 48}, r"-:.*\.o_proj": {}}
    check(tmp_path, write_folder(tmp_path, gptq_config(dynamic=rules), pack))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}),
        ("quantize_config.json", gptq_config(4)),
    ],
)
def test_a_side_file_alone_describes_gptq(name: str, fields: Mapping[str, Any], tmp_path: Path) -> None:
    values = write_codes(tmp_path, gptq_config(), pack_gptq())
    move_to_side(tmp_path, name, fields)
    check(tmp_path, values)


def test_a_side_file_alone_describes_awq(tmp_path: Path) -> None:
    values = write_codes(tmp_path, {}, pack_awq)
    fields = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    move_to_side(tmp_path, "quant_config.json", fields)
    check(tmp_path, values)


MIXED = {
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {
        "model.layers.0.mlp.up_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.down_proj": {"quant_algo": "NVFP4", "group_size": 16},
    },
}


@pytest.mark.parametrize(
    ("quantization", "pack"),
    [
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, pack_fp8),
        ({"quant_algo": "NVFP4", "group_size": 16}, partial(formats.pack_nvfp4, divides=False)),
        ({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, formats.pack_int8_by_output),
        (
            MIXED,
            lambda shape: pack_fp8(shape) if shape[0] == 96 else formats.pack_nvfp4(shape, divides=False),
        ),
    ],
    ids=["fp8", "nvfp4", "int8", "mixed"],
)
def test_a_side_file_alone_describes_modelopt(
    quantization: Mapping[str, Any], pack: Pack, tmp_path: Path
) -> None:
    values = save(tmp_path, {}, pack)
    side = {"producer": {"name": "modelopt"}, "quantization": quantization}
    move_to_side(tmp_path, "hf_quant_config.json", side)
    add_tensor(tmp_path, "self_attn.k_proj.k_scale", np.ones((), np.float32))
    add_tensor(tmp_path, "mlp.up_proj.input_scale", np.ones((), np.float32))
    checkpoint = open_checkpoint(str(tmp_path))
    check_values(checkpoint, values)
    assert checkpoint.notes[-2:] == (
        "Not used: model.layers.0.mlp.up_proj.input_scale (scales of quantized activations; the artifact "
        "uses only the weights).",
        "Not used: model.layers.0.self_attn.k_proj.k_scale (scales of a quantized KV cache; the artifact "
        "uses only the weights).",
    )


@pytest.mark.parametrize(
    ("key", "wrap"),
    [
        ("compression_config", lambda fields: fields),
        ("compression_config", lambda fields: {"quantization_config": fields, "sparsity_config": None}),
    ],
)
def test_other_places_in_config(key: str, wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    config, pack = FORMATS["compressed-nvfp4"]
    values = save(tmp_path, {}, pack)
    edit(tmp_path, drop="quantization_config", **{key: wrap(dict(config))})
    check(tmp_path, values)


def test_the_config_of_a_language_model_inside_another(tmp_path: Path) -> None:
    (found,) = find_declarations(tmp_path, {"text_config": {"quantization_config": gptq_config()}})
    assert (found.source, found.parse().method) == ("config.json", "gptq")


def test_the_key_of_mlx(tmp_path: Path) -> None:
    values = save(tmp_path, {}, partial(formats.pack_mlx, bits=4))
    edit(tmp_path, drop="quantization_config", quantization=MLX)
    check(tmp_path, values)


@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_quantization_config_means_floats(empty: Any, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    edit(tmp_path, quantization_config=empty)
    checkpoint = open_checkpoint(str(tmp_path))
    assert (checkpoint.quantization, checkpoint.notes) == (None, ())


def test_floats_that_are_said_to_be_quantized_are_told(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    edit(tmp_path, quantization_config=BNB)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.quantization is None
    assert checkpoint.notes == (
        "config.json says that the weights are quantized by bitsandbytes, but the files hold floats, which "
        "are read as they are.",
    )


def test_side_files_of_other_tools_do_not_matter_to_floats(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    (tmp_path / "quantization_config.json").write_text(json.dumps({"ratio": 0.8}))
    assert "quantization_config.json says" in open_checkpoint(str(tmp_path)).notes[0]


def test_the_declaration_that_fits_the_codes_counts(tmp_path: Path) -> None:
    values = write_codes(tmp_path, {"quant_method": "awq", "bits": 4, "group_size": 64}, pack_gptq())
    (tmp_path / "quantize_config.json").write_text(json.dumps(gptq_config()))
    check(tmp_path, values)
    assert open_checkpoint(str(tmp_path)).notes == (
        "config.json says awq, but the files match quantize_config.json (gptq), and are read accordingly.",
    )


def test_zero_points_of_floats_must_be_zero(tmp_path: Path) -> None:
    values = save(tmp_path, FP8, pack_fp8)
    name = "self_attn.q_proj.weight_zero_point"
    add_tensor(tmp_path, name, np.zeros((), np.int8))
    check(tmp_path, values)
    add_tensor(tmp_path, name, np.ones((), np.int8))
    with pytest.raises(UnsupportedError, match=r"q_proj.weight_zero_point has zero points for small floats"):
        open_checkpoint(str(tmp_path))


def test_bits_and_groups_are_those_of_the_codes(tmp_path: Path) -> None:
    values = write_codes(tmp_path, gptq_config(8, 64), pack_gptq())
    tensors = load_file(tmp_path / "model.safetensors")
    without = {name: t for name, t in tensors.items() if not name.endswith("g_idx")}
    save_file(without, tmp_path / "model.safetensors", {"format": "pt"})
    check(tmp_path, values)


@pytest.mark.parametrize(("declared", "stored"), [("gptq", 0), ("gptq_v2", 1)])
def test_symmetric_codes_tell_the_layout_of_their_zero_points(
    declared: str, stored: int, tmp_path: Path
) -> None:
    config = gptq_config(checkpoint_format=declared, sym=True)
    check(tmp_path, write_codes(tmp_path, config, pack_gptq(stored), symmetric=True))


def test_zero_points_that_nothing_tells_are_refused(tmp_path: Path) -> None:
    write_codes(tmp_path, gptq_config(checkpoint_format="gptq"), pack_gptq())
    side = gptq_config(checkpoint_format="gptq_v2")
    (tmp_path / "quantize_config.json").write_text(json.dumps(side))
    with pytest.raises(
        CheckpointError, match=r"config.json and quantize_config.json state different layouts"
    ):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "pack", "message"),
    [
        (
            {},
            formats.pack_int8_by_output,
            "is stored as int8, but neither config.json nor a file beside it",
        ),
        ({}, pack_fp8, "is stored as fp8, but neither"),
        (
            {},
            partial(formats.pack_mlx, bits=4),
            "is stored as integers with scales and biases, but neither",
        ),
        (gptq_config(), pack_fp8, r"is stored as fp8, but config.json says gptq \(gptq\)"),
        (BNB, formats.pack_mxfp4, "is stored as mxfp4, but config.json says bitsandbytes"),
        (
            {},
            lambda shape: ({"weight": np.ones(shape, np.int8)}, np.ones(shape)),
            r"integers \(INT8\) where LlamaForCausalLM has floats",
        ),
    ],
)
def test_codes_that_nothing_describes_are_refused(
    config: Mapping[str, Any], pack: Pack, message: str, tmp_path: Path
) -> None:
    save(tmp_path, config, pack)
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "part", "changed", "message"),
    [
        (
            "modelopt-nvfp4",
            "weight_scale_2",
            np.zeros((), np.float32),
            "is not one finite number other than 0",
        ),
        ("nf4", "weight.quant_map", np.zeros(8, np.float32), r"has shape \[8\], but .* imply \[16\]"),
        ("nf4", "weight.absmax", np.zeros(3, np.float32), "bytes and 3 blocks for 64 x 64 codes"),
        (
            "nf4",
            "weight.quant_state.bitsandbytes__nf4",
            np.zeros(4, np.uint8),
            "bitsandbytes__nf4 is damaged: JSONDecodeError",
        ),
        ("llm-int8", "weight_format", np.array(2, np.uint8), "is stored in the order of a GPU's kernels"),
        ("mlx-4", "scales", np.ones((64, 3), np.float16), "has 8 words for 3 groups of 32 inputs"),
        ("modelopt-awq", "pre_quant_scale", np.ones(5, np.float32), r"has shape \[5\] for 64 inputs"),
    ],
)
def test_parts_that_do_not_fit(name: str, part: str, changed: Array, message: str, tmp_path: Path) -> None:
    config, pack = FORMATS[name]
    save(tmp_path, config, pack)
    add_tensor(tmp_path, f"self_attn.q_proj.{part}", changed)
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        open_checkpoint(str(tmp_path))
