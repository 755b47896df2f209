"""Tiny llamas in the layouts of quantization libraries, packed by the book.

Sources: `QuantLinear.pack` of AutoGPTQ, `WQLinear_GEMM.from_linear` of AutoAWQ, `pack_to_int32` of
compressed-tensors, and the weight format of DeepSeek-V3's README_WEIGHTS.md.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from llmc.arrays import Array
from tests.models import EOS, save_tiny_model


@dataclass(frozen=True)
class Codes:
    """A matrix (N, K) of codes; `index` (K,) is the group of each input."""

    codes: Array
    zeros: Array
    scales: Array
    index: Array
    bits: int

    def values(self) -> Array:
        """float32 (N, K)."""
        zeros, scales = self.zeros[:, self.index], self.scales[:, self.index].astype(np.float32)
        values: Array = (self.codes - zeros).astype(np.float32) * scales
        return values


def draw_codes(
    seed: int,
    shape: tuple[int, int],
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    scale_dtype: Any = np.float16,
    scattered: bool = False,
) -> Codes:
    """Random codes of weights of about 0.15; group -1 for one scale an output."""
    rng = np.random.default_rng(seed)
    outputs, inputs = shape
    size = inputs if group == -1 else group
    groups, middle = -(-inputs // size), 1 << (bits - 1)
    codes = rng.integers(0, 2 * middle, shape)
    zeros = np.full((outputs, groups), middle)
    if not symmetric:
        zeros = rng.integers(middle // 2, middle + middle // 2 + 1, (outputs, groups))
        zeros[0, 0] = 0  # the value that the first layout of GPTQ wraps
    scales = (rng.uniform(0.2, 0.4, (outputs, groups)) / middle).astype(scale_dtype)
    index = np.arange(inputs) // size
    return Codes(codes, zeros, scales, rng.permutation(index) if scattered else index, bits)


Pack = Callable[[Codes], Mapping[str, Array]]


def pack_stream(values: Array, bits: int) -> Array:
    """Rows (n, m) of codes to int32 (n, ceil(m * bits / 32)), the first code in the lowest bits."""
    words = -(-values.shape[1] * bits // 32)
    rows = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in values]
    return np.stack([np.frombuffer(row.to_bytes(4 * words, "little"), "<i4") for row in rows])


def pack_gptq(offset: int = 1) -> Pack:
    def pack(m: Codes) -> Mapping[str, Array]:
        stored_zeros = (m.zeros - offset) % (1 << m.bits)
        return {
            "qweight": pack_stream(m.codes, m.bits).T.copy(),
            "qzeros": pack_stream(stored_zeros.T, m.bits),
            "scales": m.scales.T.copy(),
            "g_idx": m.index.astype(np.int32),
        }

    return pack


def pack_awq(m: Codes) -> Mapping[str, Array]:
    def pack(values: Array) -> Array:
        words = np.zeros((len(values), values.shape[1] // 8), np.uint32)
        for column in range(words.shape[1]):
            for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, column] |= values[:, 8 * column + output].astype(np.uint32) << np.uint32(4 * place)
        return words.view(np.int32)

    return {"qweight": pack(m.codes.T), "qzeros": pack(m.zeros.T), "scales": m.scales.T.copy()}


def pack_compressed(m: Codes) -> Mapping[str, Array]:
    tensors = {
        "weight_packed": pack_stream(m.codes, m.bits),
        "weight_scale": m.scales,
        "weight_shape": np.array(m.codes.shape),
    }
    middle = 1 << (m.bits - 1)
    if (m.zeros != middle).any():
        tensors["weight_zero_point"] = pack_stream(m.zeros.T, m.bits).T.copy()
    return tensors


def pack_int8(m: Codes) -> Mapping[str, Array]:
    return {"weight": (m.codes - 128).astype(np.int8), "weight_scale": m.scales}


def linear_names(folder: Path) -> list[str]:
    """Modules of the decoder layers' linears."""
    names = load_file(folder / "model.safetensors")
    return [name.removesuffix(".weight") for name in names if name.endswith("_proj.weight")]


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    pack: Callable[[str, tuple[int, int]], tuple[Mapping[str, Array], Array]],
    model_type: str = "llama",
) -> dict[str, Array]:
    """A tiny model of one layer whose linears are what `pack(module, shape)` gives; values by parameter name.

    Args:
        pack: The tensors of a module by their last name, and the values they stand for.
    """
    save_tiny_model(model_type, folder, tokenizer=True, eos_token_id=EOS, num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    values = {}
    for module in linear_names(folder):
        shape = tensors.pop(f"{module}.weight").shape
        parts, values[f"{module}.weight"] = pack(module, shape)
        tensors.update({f"{module}.{part}": np.ascontiguousarray(a) for part, a in parts.items()})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": dict(config)}))
    return values


def write_codes(
    folder: Path, config: Mapping[str, Any], pack: Pack, model_type: str = "llama", **drawn: Any
) -> dict[str, Array]:
    """As `write_folder`, of codes from `draw_codes`."""

    def make(module: str, shape: tuple[int, int]) -> tuple[Mapping[str, Array], Array]:
        codes = draw_codes(len(module) + sum(shape) + int(module.split(".")[2]), shape, **drawn)
        return pack(codes), codes.values()

    return write_folder(folder, config, make, model_type)


def gptq_config(bits: int = 4, group_size: int = 32, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, **fields}


def compressed_config(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def draw_fp8(seed: int, shape: tuple[int, int]) -> Array:
    """float8 E4M3 (N, K)."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 30, shape).astype(ml_dtypes.float8_e4m3fn)
