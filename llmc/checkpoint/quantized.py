"""A quantized Hugging Face folder as floats: every quantized matrix under the name of its parameter.

Values are float32, (code - zero point) * scale, read by rows; no matrix is held beyond the reading of it.
Beside them stand the codes themselves, so that they can be stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from llmc.checkpoint.layouts import (
    Fp8Matrix,
    IntegerMatrix,
    Source,
    awq_matrix,
    compressed_matrix,
    fp8_matrix,
    gptq_matrix,
)
from llmc.checkpoint.quantization import Method, StoredQuantization
from llmc.checkpoint.ranges import WholeValues, row_range
from llmc.errors import UnsupportedError
from llmc.graph.weights import Array, TensorInfo, WeightStore

#: Tensors of a module that make its weight; the others (biases, scales of activations) stay as they are.
_PARTS = (
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
)
_FLOAT8 = ir.DataType.FLOAT8E4M3FN


class DequantizedStore:
    """A `WeightStore` over the files of a quantized checkpoint, with `X.weight` for what X is made of."""

    def __init__(self, raw: WeightStore, matrices: Mapping[str, IntegerMatrix | Fp8Matrix]) -> None:
        self._raw = raw
        self._matrices = matrices
        modules = {name.removesuffix(".weight") for name in matrices}
        infos = {
            name: info
            for name, info in raw.infos().items()
            if not (name.rpartition(".")[0] in modules and name.rpartition(".")[2] in _PARTS)
        }
        for name, matrix in matrices.items():
            infos[name] = TensorInfo(name, matrix.shape, ir.DataType.FLOAT, matrix.grid)
        self._infos = MappingProxyType(infos)

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        matrix = self._matrices.get(name)
        if matrix is None:
            return self._raw.read(name, start, stop)
        return matrix.rows(*row_range(matrix.shape, start, stop))


def dequantize_store(raw: WeightStore, quantization: StoredQuantization, folder: Path) -> DequantizedStore:
    """The tensors of `raw` with every quantized module's weight as floats.

    Raises:
        UnsupportedError: AWQ scaled an activation function.
        CheckpointError: The tensors of a module do not fit together.
    """
    infos = raw.infos()
    matrices: dict[str, IntegerMatrix | Fp8Matrix] = {}
    kept: dict[str, WholeValues] = {}
    for name, info in infos.items():
        module, _, part = name.rpartition(".")
        packed = part in {"qweight", "weight_packed"}
        scaled = part == "weight" and info.dtype in {_FLOAT8, ir.DataType.INT8}
        if packed or scaled:
            matrices[f"{module}.weight"] = _matrix(Source(raw, module, kept), quantization)
        elif quantization.method is Method.AWQ and part == "scales" and f"{module}.qweight" not in infos:
            raise UnsupportedError(
                f"{folder} scales an activation function ({name}), which llmc's models do not have",
                hint="compile the original checkpoint in float instead",
            )
    return DequantizedStore(raw, matrices)


def require_floats(store: WeightStore) -> None:
    """Check that no tensor is left in fp8: without its scale it means nothing.

    Raises:
        UnsupportedError: One is.
    """
    left = next((name for name, info in store.infos().items() if info.dtype is _FLOAT8), None)
    if left is not None:
        raise UnsupportedError(
            f"{left} is stored as F8_E4M3, and quantization_config does not say how",
            hint="compile the original checkpoint in float instead",
        )


def _matrix(source: Source, quantization: StoredQuantization) -> IntegerMatrix | Fp8Matrix:
    form = quantization.format_of(source.module)
    if source.has("weight") and source.dtype("weight") == _FLOAT8.numpy():
        return fp8_matrix(source, form)
    match quantization.method:
        case Method.GPTQ:
            return gptq_matrix(source, form, quantization.zero_offset)
        case Method.AWQ:
            return awq_matrix(source, form)
        case Method.COMPRESSED_TENSORS | Method.FP8:
            return compressed_matrix(source, form)
