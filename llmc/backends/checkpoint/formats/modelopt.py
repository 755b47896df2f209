"""Encode matrices in the format of NVIDIA's ModelOpt (unified Hugging Face checkpoints).

- FP8: `weight` E4M3 (N, K); `weight_scale` and `input_scale` float32, scalars.
- FP8_PER_CHANNEL_PER_TOKEN: the same with `weight_scale` float32 (N,); activations are scaled at run time.
- NVFP4: `weight` uint8 (N, K / 2), the even input in the low half; `weight_scale` E4M3 (N, K / 16);
  `weight_scale_2` and `input_scale` float32, scalars. W4A16_NVFP4 has no `input_scale`.
- W4A16_AWQ: `weight` uint8 (N / 2, K) of signed 4-bit codes, the even output in the low half; `weight_scale`
  (N, groups).

A KV cache in fp8 has `k_proj.k_scale` and `v_proj.v_scale` of the attention module, float32 scalars.

Folders with several of them have MIXED_PRECISION, and the algorithm of each module in `quantized_layers`.
config.json and hf_quant_config.json declare the same: some readers know only the one or the other.
Source: modelopt 0.47.0, `torch/export/quant_utils.py` and `convert_hf_config.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.backends.checkpoint.formats.base import (
    NVFP4_GROUP,
    CodedMatrix,
    Codes,
    FolderTensor,
    checked,
    describe_scheme,
    group_of,
    indivisible,
    is_integer,
    pack_halves,
    scale_shape,
    stored_scales,
    unsigned_codes,
)
from llmc.config import EngineScheme, WeightFormat, WeightScheme

#: The version of the library whose format is written.
VERSION = "0.47.0"


@dataclass(frozen=True)
class ModelOpt:
    """The format of ModelOpt.

    Args:
        fp8_cache: Whether the folder has scales of a KV cache in fp8.
    """

    fp8_cache: bool = False

    def refusal(self, scheme: WeightScheme | EngineScheme, shape: tuple[int, int]) -> str | None:
        """See `Format`."""
        if _algorithm(scheme) is None:
            advice = ""
            if isinstance(scheme, EngineScheme) and scheme.format is WeightFormat.FP8:
                advice = "; fp8 has static activations and a scale per tensor, or dynamic ones and per output"
            return f"this format does not have {describe_scheme(scheme)}{advice}"
        if is_integer(scheme) and shape[0] % 2:
            return f"bytes of 2 codes do not divide {shape[0]} outputs"
        return indivisible(scheme, shape)

    def mixed_refusal(self, schemes: Iterable[WeightScheme | EngineScheme]) -> str | None:
        """See `Format`."""
        return None

    def specs(self, matrix: CodedMatrix) -> tuple[FolderTensor, ...]:
        """See `Format`."""
        module, (outputs, inputs), algorithm = matrix.module, matrix.shape, _algorithm(matrix.scheme)
        single = (ir.DataType.FLOAT, ())
        parts: dict[str, tuple[ir.DataType, tuple[int, ...]]] = {}
        if matrix.input_scale is not None:
            parts["input_scale"] = single
        if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
            parts["weight"] = (ir.DataType.FLOAT8E4M3FN, matrix.shape)
            parts["weight_scale"] = (ir.DataType.FLOAT, () if algorithm == "FP8" else (outputs,))
        elif algorithm == "W4A16_AWQ":
            parts["weight"] = (ir.DataType.UINT8, (outputs // 2, inputs))
            parts["weight_scale"] = (matrix.scale_type, scale_shape(matrix))
        else:
            parts["weight"] = (ir.DataType.UINT8, (outputs, inputs // 2))
            parts["weight_scale"] = (ir.DataType.FLOAT8E4M3FN, scale_shape(matrix))
            parts["weight_scale_2"] = single
        return tuple(FolderTensor(f"{module}.{part}", *facts) for part, facts in parts.items())

    def encode(self, matrix: CodedMatrix, codes: Codes) -> dict[str, Array]:
        """See `Format`."""
        codes = checked(matrix, codes)
        module, algorithm = matrix.module, _algorithm(matrix.scheme)
        parts: dict[str, Array] = {}
        if matrix.input_scale is not None:
            parts["input_scale"] = np.array(matrix.input_scale, np.float32)
        if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
            parts["weight"] = codes.codes
            shape = () if algorithm == "FP8" else (matrix.shape[0],)
            parts["weight_scale"] = codes.scales.astype(np.float32).reshape(shape)
        elif algorithm == "W4A16_AWQ":
            signed = unsigned_codes(matrix, codes) ^ np.uint8(8)
            parts["weight"] = signed[0::2] | (signed[1::2] << np.uint8(4))
            parts["weight_scale"] = stored_scales(matrix, codes.scales)
        else:
            parts["weight"] = pack_halves(codes.codes)
            parts["weight_scale"] = codes.scales
            parts["weight_scale_2"] = np.asarray(codes.whole, np.float32).reshape(())
        return {f"{module}.{part}": values for part, values in parts.items()}

    def cache_tensors(self, attention: str, keys: float, values: float) -> dict[str, Array]:
        """See `Format`; the names are the same where one matrix computes queries, keys and values."""
        scales = {"k_proj.k_scale": keys, "v_proj.v_scale": values}
        return {f"{attention}.{part}": np.array(scale, np.float32) for part, scale in scales.items()}

    def config(self, matrices: Sequence[CodedMatrix], ignored: Sequence[str]) -> dict[str, Any]:
        """See `Format`."""
        declared = self._declare(matrices, ignored)
        by_layer: dict[str, list[str]] = {}
        schemes: dict[str, WeightScheme | EngineScheme] = {}
        for matrix in matrices:
            key = repr(_layer(matrix.scheme))
            by_layer.setdefault(key, []).append(matrix.module)
            schemes.setdefault(key, matrix.scheme)
        groups = {
            f"group_{index}": {**_group(schemes[key]), "targets": sorted(names)}
            for index, (key, names) in enumerate(by_layer.items())
        }
        layers = declared.get("quantized_layers")
        return {
            "config_groups": groups,
            "ignore": declared["exclude_modules"],
            **({"kv_cache_scheme": _arguments(8, "float", None)} if self.fp8_cache else {}),
            "producer": {"name": "modelopt", "version": VERSION},
            "quant_algo": declared["quant_algo"],
            "quant_method": "modelopt",
            **({} if layers is None else {"quantized_layers": layers}),
            **({"group_size": declared["group_size"]} if "group_size" in declared else {}),
        }

    def side_files(self, matrices: Sequence[CodedMatrix], ignored: Sequence[str]) -> dict[str, Any]:
        """See `Format`."""
        return {
            "hf_quant_config.json": {
                "producer": {"name": "modelopt", "version": VERSION},
                "quantization": self._declare(matrices, ignored),
            }
        }

    def _declare(self, matrices: Sequence[CodedMatrix], ignored: Sequence[str]) -> dict[str, Any]:
        """Return the object `quantization` of hf_quant_config.json.

        Servers quantize a head that is tied to the embedding, and has no tensor, if it is not excluded.
        """
        layers = {matrix.module: _layer(matrix.scheme) for matrix in matrices}
        excluded = list(ignored)
        if not any(name.rpartition(".")[2] == "lm_head" for name in (*layers, *excluded)):
            excluded.append("lm_head")
        distinct = list({repr(fields): fields for fields in layers.values()}.values())
        fields: dict[str, Any] = distinct[0]
        if len(distinct) > 1:
            fields = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        cache = "FP8" if self.fp8_cache else None
        return {**fields, "kv_cache_quant_algo": cache, "exclude_modules": excluded}


def _algorithm(scheme: WeightScheme | EngineScheme) -> str | None:
    """Return ModelOpt's name of a scheme; None if it has none."""
    if isinstance(scheme, WeightScheme):
        return "W4A16_AWQ" if scheme.bits == 4 and scheme.symmetric else None
    return {
        (WeightFormat.FP8, "static", "tensor"): "FP8",
        (WeightFormat.FP8, "dynamic", "output"): "FP8_PER_CHANNEL_PER_TOKEN",
        (WeightFormat.NVFP4, "dynamic", "output"): "NVFP4",
        (WeightFormat.NVFP4, "float", "output"): "W4A16_NVFP4",
        (WeightFormat.INT4, "float", "output"): "W4A16_AWQ",
    }.get((scheme.format, scheme.activations, scheme.scale_per))


def _layer(scheme: WeightScheme | EngineScheme) -> dict[str, Any]:
    """Return the declaration of one module."""
    algorithm, group = _algorithm(scheme), group_of(scheme)
    fields: dict[str, Any] = {"quant_algo": algorithm}
    if group is not None:
        fields["group_size"] = group
    if algorithm == "W4A16_AWQ":
        fields |= {"has_zero_point": False, "pre_quant_scale": False}
    return fields


def _group(scheme: WeightScheme | EngineScheme) -> dict[str, Any]:
    """Return the declaration of a scheme as ModelOpt converts it for config.json."""
    kind, group = "int" if is_integer(scheme) else "float", group_of(scheme)
    weights = _arguments(scheme.bits, kind, group)
    if _algorithm(scheme) == "FP8_PER_CHANNEL_PER_TOKEN":
        weights["strategy"] = "channel"
    if isinstance(scheme, WeightScheme) or scheme.activations == "float":
        return {"weights": weights}
    inputs = _arguments(scheme.bits, kind, NVFP4_GROUP if scheme.format is WeightFormat.NVFP4 else None)
    return {"input_activations": inputs, "weights": weights}


def _arguments(bits: int, kind: str, group: int | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"dynamic": False, "num_bits": bits, "type": kind}
    return fields if group is None else {**fields, "group_size": group}
