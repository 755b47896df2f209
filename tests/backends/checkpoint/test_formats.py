"""Folders of GPTQ, AWQ and ModelOpt as llmc's own reader of quantized checkpoints sees them."""

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.backends.checkpoint.formats.awq import AwqLayout
from llmc.backends.checkpoint.formats.base import CodedMatrix, Format
from llmc.backends.checkpoint.formats.choice import format_of
from llmc.backends.checkpoint.formats.compressed_tensors import CompressedTensors
from llmc.backends.checkpoint.formats.gptq import GptqLayout
from llmc.backends.checkpoint.formats.modelopt import ModelOpt
from llmc.config import CheckpointFormat, EngineScheme, ServedCheckpoint, WeightScheme
from llmc.errors import UnsupportedError
from tests.backends.checkpoint.coded import MODULE, blocks, matrix, read_back, typed, values, write

Scheme = WeightScheme | EngineScheme

#: Every scheme that a format has besides those of compressed-tensors.
CASES: dict[str, tuple[Format, Scheme]] = {
    "gptq": (GptqLayout(), blocks(4, 128)),
    "gptq with zero points": (GptqLayout(), blocks(4, 32, symmetric=False)),
    "gptq 8 bits": (GptqLayout(), blocks(8, 32)),
    "gptq 8 bits with zero points": (GptqLayout(), blocks(8, 32, symmetric=False)),
    "gptq int8 by output": (GptqLayout(), typed("int8")),
    "awq": (AwqLayout(), blocks(4, 128)),
    "awq with zero points": (AwqLayout(), blocks(4, 32, symmetric=False)),
    "modelopt fp8": (ModelOpt(), typed("fp8", "static", "tensor")),
    "modelopt fp8 by output": (ModelOpt(), typed("fp8", "dynamic")),
    "modelopt nvfp4": (ModelOpt(), typed("nvfp4", "dynamic")),
    "modelopt nvfp4 weights": (ModelOpt(), typed("nvfp4")),
    "modelopt int4": (ModelOpt(), blocks(4, 128)),
}


def made(scheme: Scheme, module: str = MODULE) -> CodedMatrix:
    is_static = isinstance(scheme, EngineScheme) and scheme.needs_range
    return matrix(scheme, module=module, input_scale=0.25 if is_static else None)


@pytest.mark.parametrize("case", CASES)
def test_our_reader_reads_the_same_values(case: str) -> None:
    form, scheme = CASES[case]
    coded = made(scheme)
    read = read_back(form, coded).store.read(f"{coded.module}.weight")
    np.testing.assert_array_equal(read, values(coded))


def test_scales_can_have_another_type() -> None:
    for form in (GptqLayout(), AwqLayout(), CompressedTensors()):
        coded = matrix(blocks(), scale_type=matrix(blocks()).scale_type.__class__.BFLOAT16)
        tensors = write(form, coded)
        assert sum(array.dtype == ml_dtypes.bfloat16 for array in tensors.values()) == 1
        read = read_back(form, coded).store.read(f"{coded.module}.weight")
        np.testing.assert_array_equal(read, values(coded))


@pytest.mark.parametrize(
    ("form", "scheme", "shape", "reason"),
    [
        (
            GptqLayout(),
            typed("fp8", "dynamic"),
            (64, 64),
            "8 bits alone, not fp8 with dynamic activations",
        ),
        (
            GptqLayout(),
            typed("int8", "dynamic"),
            (64, 64),
            "8-bit integers by output with dynamic activations",
        ),
        (GptqLayout(), blocks(4, 32), (60, 64), "words of 8 codes do not divide 60 outputs and 64 inputs"),
        (GptqLayout(), blocks(4, 128), (64, 576), "groups of 128 do not divide 576 inputs; groups of 64 or"),
        (AwqLayout(), blocks(8, 32), (64, 64), "4 bits alone, not 8-bit integers by groups of 32"),
        (AwqLayout(), blocks(4, 32), (60, 64), "words of 8 codes do not divide 60 outputs"),
        (AwqLayout(), blocks(4, 128), (64, 576), "groups of 128 do not divide 576 inputs"),
        (ModelOpt(), blocks(4, 32, symmetric=False), (64, 64), "does not have 4-bit .*, with zero points"),
        (ModelOpt(), typed("fp8", "static"), (64, 64), "fp8 has static activations and a scale per tensor"),
        (ModelOpt(), typed("int8", "dynamic"), (64, 64), "does not have 8-bit integers by output"),
        (ModelOpt(), typed("nvfp4", "dynamic"), (64, 40), "groups of 16 do not divide 40 inputs"),
        (ModelOpt(), blocks(4, 32), (63, 64), "bytes of 2 codes do not divide 63 outputs"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    form: Format, scheme: Scheme, shape: tuple[int, int], reason: str
) -> None:
    found = form.refusal(scheme, shape)
    assert found is not None
    assert re.search(reason, found)


def test_which_schemes_a_folder_can_mix() -> None:
    narrow, wide = blocks(4, 128), blocks(8, 128)
    assert CompressedTensors().mixed_refusal([narrow, wide, typed("fp8", "dynamic")]) is None
    assert ModelOpt().mixed_refusal([typed("nvfp4", "dynamic"), typed("fp8", "static", "tensor")]) is None
    assert GptqLayout().mixed_refusal([narrow, wide]) is None
    assert AwqLayout().mixed_refusal([narrow, blocks(4, 128, symmetric=False)]) is None
    assert GptqLayout().mixed_refusal([narrow, blocks(4, 128, symmetric=False)]) == (
        "this format has zero points for all matrices or for none"
    )
    assert AwqLayout().mixed_refusal([narrow, blocks(4, 32)]) == (
        "this format has one size of groups for all matrices, not 32 and 128"
    )


def test_gptq_stores_zero_points_less_one_where_they_are_symmetric() -> None:
    zeros = write(GptqLayout(), matrix(blocks(4, 32)))[f"{MODULE}.qzeros"]
    assert (zeros.view(np.uint32) == 0x77777777).all()
    config = GptqLayout().config([matrix(blocks(4, 32))], [])
    assert (config["sym"], config["checkpoint_format"], config["dynamic"]) == (True, "gptq", {})
    config = GptqLayout().config([matrix(blocks(4, 32, symmetric=False))], [])
    assert (config["sym"], config["checkpoint_format"]) == (False, "gptq_v2")


def layer(parts: dict[str, Scheme]) -> list[CodedMatrix]:
    return [made(scheme, f"model.layers.0.{name}") for name, scheme in parts.items()]


def test_gptq_declares_other_bits_by_the_names_of_fused_products_too() -> None:
    narrow, wide = blocks(4, 32), blocks(8, 64)
    attention = dict.fromkeys((f"self_attn.{part}_proj" for part in "qkv"), wide)
    mlp = dict.fromkeys((f"mlp.{part}_proj" for part in ("gate", "up", "down")), narrow)
    coded = layer({**attention, **mlp, "self_attn.o_proj": narrow})
    config = GptqLayout().config(coded, ["lm_head", "model.layers.0.mlp.router"])
    assert (config["bits"], config["group_size"], config["lm_head"]) == (4, 32, False)
    fused = r"+:(.*\.)?layers\.0\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$"
    assert config["dynamic"] == {
        fused: {"bits": 8, "group_size": 64},
        r"-:(.*\.)?layers\.0\.mlp\.router$": {},
    }
    assert re.match(fused.removeprefix("+:"), "model.layers.0.self_attn.qkv_proj")
    folder = read_back(GptqLayout(), *coded)
    for each in coded:
        np.testing.assert_array_equal(folder.store.read(f"{each.module}.weight"), values(each))


def test_gptq_excludes_the_fused_product_of_modules_in_float_wherever_the_layers_are() -> None:
    text, tower = "model.layers.{}.self_attn.{}_proj", "vision.layers.{}.self_attn.{}_proj"
    coded = [made(blocks(4, 32), text.format(1, part)) for part in "qkv"]
    kept = [text.format(0, part) for part in "qkv"]
    dynamic = GptqLayout().config(coded, [*kept, *(tower.format(1, part) for part in "qkv")])["dynamic"]
    assert dynamic == {
        r"-:(.*\.)?layers\.0\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$": {},
        r"-:vision\.layers\.1\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$": {},
    }


def quantization(form: Format, coded: list[CodedMatrix], ignored: list[str]) -> dict[str, Any]:
    declared: dict[str, Any] = form.side_files(coded, ignored)["hf_quant_config.json"]["quantization"]
    return declared


def test_modelopt_declares_one_algorithm_in_both_files() -> None:
    coded = layer(dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), typed("nvfp4", "dynamic")))
    assert quantization(ModelOpt(), coded, ["lm_head"]) == {
        "quant_algo": "NVFP4",
        "group_size": 16,
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }
    config = ModelOpt().config(coded, ["lm_head"])
    assert (config["quant_algo"], config["group_size"], config["ignore"]) == ("NVFP4", 16, ["lm_head"])
    assert config["config_groups"]["group_0"] == {
        "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
        "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
        "targets": ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
    }
    assert "kv_cache_scheme" not in config


def test_modelopt_declares_mixed_precision_by_layer() -> None:
    eight, four = typed("fp8", "static", "tensor"), typed("nvfp4", "dynamic")
    coded = layer({"self_attn.o_proj": eight, "mlp.up_proj": four})
    form = ModelOpt()
    layers = {
        "model.layers.0.self_attn.o_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
    }
    assert quantization(form, coded, ["lm_head"]) == {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": layers,
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }
    config = form.config(coded, ["lm_head"])
    assert (config["quant_algo"], config["quantized_layers"]) == ("MIXED_PRECISION", layers)
    folder = read_back(form, *coded)
    for each in coded:
        np.testing.assert_array_equal(folder.store.read(f"{each.module}.weight"), values(each))


def test_modelopt_excludes_a_head_that_has_no_tensor() -> None:
    coded = layer({"mlp.up_proj": typed("nvfp4")})
    assert quantization(ModelOpt(), coded, [])["exclude_modules"] == ["lm_head"]
    coded.append(made(typed("nvfp4"), "lm_head"))
    assert quantization(ModelOpt(), coded, [])["exclude_modules"] == []


def test_modelopt_declares_a_cache_in_fp8_in_both_files() -> None:
    form = ModelOpt(fp8_cache=True)
    coded = layer({"self_attn.o_proj": typed("fp8", "static", "tensor")})
    assert quantization(form, coded, [])["kv_cache_quant_algo"] == "FP8"
    assert form.config(coded, [])["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    scales = form.cache_tensors("model.layers.3.self_attn", 0.5, 0.25)
    assert {name: (value.shape, float(value)) for name, value in scales.items()} == {
        "model.layers.3.self_attn.k_proj.k_scale": ((), 0.5),
        "model.layers.3.self_attn.v_proj.v_scale": ((), 0.25),
    }


def section(form: str) -> ServedCheckpoint:
    return ServedCheckpoint.model_validate({"format": form})


def test_every_format_has_an_encoder() -> None:
    kinds = {form.value: type(format_of(section(form.value))) for form in CheckpointFormat}
    assert kinds == {
        "compressed-tensors": CompressedTensors,
        "gptq": GptqLayout,
        "awq": AwqLayout,
        "modelopt": ModelOpt,
    }


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_a_cache_in_fp8_is_refused_where_readers_take_no_scales(form: str) -> None:
    with pytest.raises(UnsupportedError, match=f"format {form} has no scales of a KV cache"):
        format_of(section(form), fp8_cache=True)
