"""Encode matrices in the format of the library compressed-tensors, which vLLM and transformers read.

- integers without quantized activations, `pack-quantized`: `weight_packed` int32 (N, K * bits / 32), low bits
  first; `weight_scale` (N, groups); `weight_zero_point` int32 (N * bits / 32, groups), packed along the
  outputs; `weight_shape` int64 (2,).
- int8 with quantized activations, `int-quantized`: `weight` int8 (N, K), `weight_scale` (N, 1).
- fp8, `float-quantized`: `weight` E4M3 (N, K), `weight_scale` (N, 1), or (1,) for a scale per tensor.
- nvfp4, `nvfp4-pack-quantized`: `weight_packed` uint8 (N, K / 2), the even input in the low half;
  `weight_scale` E4M3 (N, K / 16); `weight_global_scale` float32 (1,), by which scales are divided.

Static activations have `input_scale` (1,); those of nvfp4 have its inverse, `input_global_scale` (1,).
A KV cache in fp8 has `k_scale` and `v_scale` (1,) of the attention module, float32.
Source: compressed_tensors 0.19.0, compressors/*/base.py and quantization/quant_args.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.backends.checkpoint.formats.base import (
    CodedMatrix,
    Codes,
    FolderTensor,
    checked,
    code_words,
    group_of,
    indivisible,
    is_integer,
    is_per_tensor,
    name_patterns,
    pack_halves,
    pack_words,
    scale_shape,
    stored_scales,
)
from llmc.config import EngineScheme, WeightFormat, WeightScheme

#: The version of the library whose format is written.
VERSION = "0.19.0"


@dataclass(frozen=True)
class CompressedTensors:
    """The format of compressed-tensors.

    Args:
        fp8_cache: Whether the folder has scales of a KV cache in fp8.
    """

    fp8_cache: bool = False

    def refusal(self, scheme: WeightScheme | EngineScheme, shape: tuple[int, int]) -> str | None:
        """See `Format`."""
        return indivisible(scheme, shape)

    def mixed_refusal(self, schemes: Iterable[WeightScheme | EngineScheme]) -> str | None:
        """See `Format`."""
        return None

    def specs(self, matrix: CodedMatrix) -> tuple[FolderTensor, ...]:
        """See `Format`."""
        module, (outputs, inputs), scheme = matrix.module, matrix.shape, matrix.scheme
        kind, groups = _kind(scheme), scale_shape(matrix)
        scales = FolderTensor(f"{module}.weight_scale", matrix.scale_type, groups)
        if kind == "pack-quantized":
            words = (outputs, -(-inputs * scheme.bits // 32))
            zeros = (-(-outputs * scheme.bits // 32), groups[1])
            packed_zeros = FolderTensor(f"{module}.weight_zero_point", ir.DataType.INT32, zeros)
            return (
                FolderTensor(f"{module}.weight_packed", ir.DataType.INT32, words),
                scales,
                FolderTensor(f"{module}.weight_shape", ir.DataType.INT64, (2,)),
                *(() if scheme.symmetric else (packed_zeros,)),
            )
        if kind == "nvfp4-pack-quantized":
            return (
                *self._input_specs(matrix, "input_global_scale"),
                FolderTensor(f"{module}.weight_global_scale", ir.DataType.FLOAT, (1,)),
                FolderTensor(f"{module}.weight_packed", ir.DataType.UINT8, (outputs, inputs // 2)),
                scales._replace(dtype=ir.DataType.FLOAT8E4M3FN),
            )
        code_type = ir.DataType.INT8 if is_integer(scheme) else ir.DataType.FLOAT8E4M3FN
        return (
            *self._input_specs(matrix, "input_scale"),
            FolderTensor(f"{module}.weight", code_type, matrix.shape),
            scales._replace(shape=(1,)) if is_per_tensor(scheme) else scales,
        )

    def encode(self, matrix: CodedMatrix, codes: Codes) -> dict[str, Array]:
        """See `Format`."""
        codes = checked(matrix, codes)
        module, scheme = matrix.module, matrix.scheme
        kind = _kind(scheme)
        tensors: dict[str, Array] = {}
        if kind == "pack-quantized":
            tensors["weight_packed"] = code_words(matrix, codes)
            tensors["weight_scale"] = stored_scales(matrix, codes.scales)
            tensors["weight_shape"] = np.array(matrix.shape, np.int64)
            if not scheme.symmetric and codes.zero_points is not None:
                words = pack_words(np.ascontiguousarray(codes.zero_points.T), scheme.bits)
                tensors["weight_zero_point"] = np.ascontiguousarray(words.T)
        elif kind == "nvfp4-pack-quantized":
            if matrix.input_scale is not None:
                tensors["input_global_scale"] = _inverse(matrix.input_scale)
            tensors["weight_global_scale"] = _inverse(codes.whole)
            tensors["weight_packed"] = pack_halves(codes.codes)
            tensors["weight_scale"] = codes.scales
        else:
            if matrix.input_scale is not None:
                tensors["input_scale"] = np.array([matrix.input_scale], np.float32)
            tensors["weight"] = codes.codes
            scales = stored_scales(matrix, codes.scales)
            tensors["weight_scale"] = scales.reshape(1) if is_per_tensor(scheme) else scales
        return {f"{module}.{part}": values for part, values in tensors.items()}

    def cache_tensors(self, attention: str, keys: float, values: float) -> dict[str, Array]:
        """See `Format`."""
        scales = {"k_scale": keys, "v_scale": values}
        return {f"{attention}.{part}": np.array([scale], np.float32) for part, scale in scales.items()}

    def config(self, matrices: Sequence[CodedMatrix], ignored: Sequence[str]) -> dict[str, Any]:
        """See `Format`."""
        by_scheme: dict[str, list[CodedMatrix]] = {}
        for matrix in matrices:
            by_scheme.setdefault(repr(_group(matrix.scheme)), []).append(matrix)
        groups = {}
        for index, members in enumerate(by_scheme.values()):
            own = {member.module for member in members}
            others = [name for m in matrices if m.module not in own for name in m.names]
            targets = name_patterns(members, (*others, *ignored))
            groups[f"group_{index}"] = {"targets": targets, **_group(members[0].scheme)}
        kinds = {group["format"] for group in groups.values()}
        return {
            "config_groups": groups,
            "format": next(iter(kinds)) if len(kinds) == 1 else "mixed-precision",
            "global_compression_ratio": None,
            "ignore": list(ignored),
            "kv_cache_scheme": _arguments(8, "float", "tensor") if self.fp8_cache else None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "version": VERSION,
        }

    def side_files(self, matrices: Sequence[CodedMatrix], ignored: Sequence[str]) -> dict[str, Any]:
        """See `Format`."""
        return {}

    def _input_specs(self, matrix: CodedMatrix, part: str) -> tuple[FolderTensor, ...]:
        if matrix.input_scale is None:
            return ()
        return (FolderTensor(f"{matrix.module}.{part}", ir.DataType.FLOAT, (1,)),)


def _inverse(scale: Array | float | None) -> Array:
    inverse: Array = np.float32(1) / np.asarray(scale, np.float32).reshape(1)
    return inverse


def _kind(scheme: WeightScheme | EngineScheme) -> str:
    """Return the library's name of the layout of a scheme."""
    if isinstance(scheme, WeightScheme) or (is_integer(scheme) and scheme.activations == "float"):
        return "pack-quantized"
    return {
        WeightFormat.INT8: "int-quantized",
        WeightFormat.FP8: "float-quantized",
        WeightFormat.NVFP4: "nvfp4-pack-quantized",
    }[scheme.format]


def _group(scheme: WeightScheme | EngineScheme) -> dict[str, Any]:
    """Return the declaration of the matrices of one scheme."""
    kind, size = "int" if is_integer(scheme) else "float", group_of(scheme)
    is_nvfp4 = isinstance(scheme, EngineScheme) and scheme.format is WeightFormat.NVFP4
    strategy = "tensor_group" if is_nvfp4 else "channel" if size is None else "group"
    strategy = "tensor" if is_per_tensor(scheme) else strategy
    weights = _arguments(scheme.bits, kind, strategy, size, symmetric=scheme.symmetric)
    inputs = None
    if isinstance(scheme, EngineScheme) and scheme.activations != "float":
        if is_nvfp4:
            inputs = _arguments(4, kind, strategy, size, dynamic="local")
        elif scheme.activations == "dynamic":
            inputs = _arguments(8, kind, "token", dynamic=True)
        else:
            inputs = _arguments(8, kind, "tensor")
    return {
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": _kind(scheme),
    }


def _arguments(
    bits: int,
    kind: str,
    strategy: str,
    group_size: int | None = None,
    *,
    symmetric: bool = True,
    dynamic: bool | str = False,
) -> dict[str, Any]:
    """Return the library's `QuantizationArgs`."""
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "block_structure": None,
        "dynamic": dynamic,
        "actorder": None,
        "observer": None,
        "observer_kwargs": {},
    }
