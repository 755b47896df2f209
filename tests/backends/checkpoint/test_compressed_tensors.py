"""Folders of compressed-tensors, read by the library itself and by llmc's own reader."""

import re
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

from llmc.arrays import Array
from llmc.backends.checkpoint.formats.base import CodedMatrix
from llmc.backends.checkpoint.formats.compressed_tensors import CompressedTensors
from llmc.config import EngineScheme, WeightScheme
from llmc.errors import CheckpointError
from tests.backends.checkpoint.coded import blocks, draw, matrix, read_back, typed, values, write

FORM = CompressedTensors()

SCHEMES = {
    "w4a16": blocks(4, 128),
    "w4a16 with zero points": blocks(4, 32, symmetric=False),
    "w8a16": blocks(8, 64),
    "w8a16 with zero points": blocks(8, 64, symmetric=False),
    "int8 by output": typed("int8"),
    "w8a8": typed("int8", "dynamic"),
    "w8a8 static": typed("int8", "static"),
    "fp8": typed("fp8", "dynamic"),
    "fp8 static": typed("fp8", "static"),
    "fp8 by tensor": typed("fp8", "static", "tensor"),
    "nvfp4": typed("nvfp4", "dynamic"),
    "nvfp4a16": typed("nvfp4"),
}


def made(scheme: WeightScheme | EngineScheme) -> CodedMatrix:
    is_static = isinstance(scheme, EngineScheme) and scheme.needs_range
    return matrix(scheme, input_scale=0.25 if is_static else None)


def tensor_of(array: Array) -> torch.Tensor:
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def decompressed(coded: CodedMatrix) -> Array:
    """What the library reads, float32 (N, K)."""
    parsed = QuantizationConfig.model_validate(FORM.config([coded], ["lm_head"]))
    assert parsed.quantization_status is QuantizationStatus.COMPRESSED
    scheme = next(iter(parsed.config_groups.values()))
    parts: dict[str, Any] = {name.rpartition(".")[2]: tensor_of(a) for name, a in write(FORM, coded).items()}
    if parts["weight_scale"].dtype is torch.float16:  # the library computes in the type of the scales
        parts["weight_scale"] = parts["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    weight: Array = compressor.decompress(parts, scheme)["weight"].float().numpy()
    return weight


@pytest.mark.parametrize("name", SCHEMES)
def test_the_library_reads_the_same_values(name: str) -> None:
    coded = made(SCHEMES[name])
    np.testing.assert_array_equal(decompressed(coded), values(coded))


@pytest.mark.parametrize("name", SCHEMES)
def test_our_reader_reads_the_same_values(name: str) -> None:
    coded = made(SCHEMES[name])
    read = read_back(FORM, coded).store.read(f"{coded.module}.weight")
    np.testing.assert_array_equal(read, values(coded))


def test_one_scheme_is_declared_by_patterns_of_names() -> None:
    names = [f"model.layers.{layer}.mlp.{part}_proj" for layer in (0, 1) for part in ("up", "down")]
    config = FORM.config([matrix(blocks(4, 32), module=name) for name in names], ["lm_head"])
    assert list(config["config_groups"]) == ["group_0"]
    targets = config["config_groups"]["group_0"]["targets"]
    assert targets == [rf"re:(.*\.)?layers\.\d+\.mlp\.{part}_proj$" for part in ("up", "down")]
    assert all(any(re.match(t.removeprefix("re:"), name) for t in targets) for name in names)
    assert (config["format"], config["ignore"]) == ("pack-quantized", ["lm_head"])


def test_mixed_schemes_are_declared_by_name_where_a_pattern_would_match_another() -> None:
    up, down = "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"
    coded = [
        *(matrix(blocks(4, 32), module=up.format(layer)) for layer in (0, 1, 2)),
        *(matrix(blocks(4, 32), module=down.format(layer)) for layer in (0, 1)),
        matrix(typed("fp8", "dynamic"), module=down.format(2)),
    ]
    config = FORM.config(coded, [])
    assert config["format"] == "mixed-precision"
    assert [group["targets"] for group in config["config_groups"].values()] == [
        [r"re:(.*\.)?layers\.\d+\.mlp\.up_proj$", down.format(0), down.format(1)],
        [down.format(2)],
    ]
    assert [group["format"] for group in config["config_groups"].values()] == [
        "pack-quantized",
        "float-quantized",
    ]


def test_a_pattern_does_not_match_a_module_that_stays_in_float() -> None:
    up = "model.layers.{}.mlp.up_proj"
    config = FORM.config([matrix(blocks(), module=up.format(n)) for n in (1, 2)], [up.format(0)])
    assert config["config_groups"]["group_0"]["targets"] == [up.format(1), up.format(2)]


def test_a_cache_in_fp8_is_declared() -> None:
    form = CompressedTensors(fp8_cache=True)
    scheme = form.config([matrix(blocks())], [])["kv_cache_scheme"]
    stated = {key: scheme[key] for key in ("num_bits", "type", "strategy", "dynamic", "symmetric")}
    expected = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert stated == expected
    scales = form.cache_tensors("model.layers.0.self_attn", 0.5, 0.25)
    assert {name: value.tolist() for name, value in scales.items()} == {
        "model.layers.0.self_attn.k_scale": [0.5],
        "model.layers.0.self_attn.v_scale": [0.25],
    }


def test_a_module_is_declared_under_the_names_of_files_transformers_and_servers() -> None:
    """A pattern leaves open what is before the layers; exact names are written in both spellings."""
    up = "{}.layers.{}.mlp.up_proj"
    coded = [
        replace(
            matrix(blocks(), module=up.format("language_model.model", n)), alias=up.format("model.text", n)
        )
        for n in (0, 1)
    ]
    (target,) = FORM.config(coded, ["vision.layers.0.fc"])["config_groups"]["group_0"]["targets"]
    for prefix in ("language_model.model", "model.text", "model", "a.server"):
        assert re.match(target.removeprefix("re:"), up.format(prefix, 0))
    assert not re.match(target.removeprefix("re:"), "model.sublayers.0.mlp.up_proj")
    targets = FORM.config(coded, [up.format("vision", 0)])["config_groups"]["group_0"]["targets"]
    assert targets == [name for each in coded for name in each.names]


def test_groups_that_do_not_divide_are_refused_with_the_sizes_that_do() -> None:
    assert FORM.refusal(blocks(4, 128), (64, 576)) == (
        "groups of 128 do not divide 576 inputs; groups of 64 or 32 or 16 do"
    )
    assert FORM.refusal(blocks(4, 64), (64, 576)) is None
    assert FORM.refusal(typed("nvfp4"), (64, 40)) == (
        "groups of 16 do not divide 40 inputs; no size of groups does"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0])
def test_a_scale_that_is_no_positive_number_is_refused_with_the_module(bad: float) -> None:
    coded = matrix(blocks())
    codes = draw(coded.scheme, coded.shape)
    codes.scales[3, 1] = bad
    with pytest.raises(CheckpointError, match="up_proj has scales that are not positive finite numbers"):
        FORM.encode(coded, codes)


def test_a_scale_beyond_its_type_is_refused_with_the_module() -> None:
    coded = matrix(blocks())
    codes = draw(coded.scheme, coded.shape)
    wide = codes.scales.astype(np.float32)
    wide[0, 0] = 1e5
    message = r"up_proj has scales up to 100000 that FLOAT16 does not represent exactly"
    with pytest.raises(CheckpointError, match=message):
        FORM.encode(coded, codes._replace(scales=wide))


def test_codes_of_another_shape_are_refused_with_the_module() -> None:
    coded = matrix(blocks())
    codes = draw(coded.scheme, (64, 128))
    with pytest.raises(CheckpointError, match=r"up_proj has codes of shape \[64, 128\], not \[64, 256\]"):
        FORM.encode(coded, codes)


def test_codes_that_are_nan_are_refused_with_the_module() -> None:
    coded = matrix(typed("fp8", "dynamic"))
    codes = draw(coded.scheme, coded.shape)
    codes.codes[5, 7] = np.nan
    with pytest.raises(CheckpointError, match="up_proj has codes that are NaN"):
        FORM.encode(coded, codes)


def test_missing_zero_points_are_refused_with_the_module() -> None:
    coded = matrix(blocks(symmetric=False))
    codes = draw(coded.scheme, coded.shape)
    with pytest.raises(CheckpointError, match="up_proj has no zero points"):
        FORM.encode(coded, codes._replace(zero_points=None))
