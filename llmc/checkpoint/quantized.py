"""Read a quantized Hugging Face folder as floats: every quantized matrix under the name of its parameter.

Values are float32, (code - zero point) * scale, read by rows; no matrix is kept after it is read. The codes
are available beside the values, so that they can be stored unchanged. The tensors of a module determine its
layout; the declarations in config.json and side files must agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import onnx_ir as ir

from llmc.arrays import Array
from llmc.checkpoint import float_layouts, layouts
from llmc.checkpoint.declared import Declaration
from llmc.checkpoint.quantization import Layout, ModuleFormat, QuantMethod, StoredQuantization
from llmc.checkpoint.ranges import WholeValues, row_range
from llmc.checkpoint.recipes import FLOAT_HINT
from llmc.checkpoint.source import Source
from llmc.errors import CheckpointError, UnsupportedError
from llmc.graph.weights import CodeGrid, TensorInfo, WeightStore

_FLOAT8 = {ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2}


class _Matrix(Protocol):
    """A quantized tensor that is read by rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Array: ...

    def grid(self) -> CodeGrid | str: ...


@dataclass(frozen=True)
class _Kind:
    """The reader of a layout.

    Args:
        parts: Tensors of a module that hold its weight; its other tensors are unchanged.
        build: Builds the matrix from the tensors in the files and the declared format.
    """

    parts: tuple[str, ...]
    build: Callable[[Source, ModuleFormat], _Matrix]


_COMPRESSED = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_FP8 = ("weight", "weight_scale", "weight_scale_inv", "weight_zero_point")
_FP4 = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
)
_BNB = tuple(f"weight.{p}" for p in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"))

_KINDS: Mapping[Layout, _Kind] = {
    Layout.AWQ: _Kind(("qweight", "qzeros", "scales"), layouts.awq_matrix),
    Layout.PACKED_INTEGERS: _Kind(_COMPRESSED, layouts.compressed_matrix),
    Layout.INT8: _Kind(_COMPRESSED, layouts.compressed_matrix),
    Layout.INT4_BY_OUTPUT: _Kind(("weight", "weight_scale"), layouts.modelopt_int4_matrix),
    Layout.AFFINE: _Kind(("weight", "scales", "biases"), layouts.affine_matrix),
    Layout.FP8: _Kind(_FP8, float_layouts.fp8_matrix),
    Layout.NVFP4: _Kind(_FP4, float_layouts.nvfp4_matrix),
    Layout.MXFP4: _Kind(_FP4, float_layouts.mxfp4_matrix),
    Layout.MXFP4_EXPERTS: _Kind(("blocks", "scales"), float_layouts.mxfp4_experts),
    Layout.BNB_4BIT: _Kind(("weight", *_BNB, *float_layouts.BNB_STATES), float_layouts.table_matrix),
    Layout.BNB_INT8: _Kind(("weight", "SCB", "weight_format"), layouts.bitsandbytes_int8_matrix),
}
_SMALL_FLOATS = {Layout.NVFP4, Layout.MXFP4, Layout.MXFP4_EXPERTS}
_GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class _Module:
    """A quantized module in the files.

    Args:
        name: Name of the module; for stacked experts, name of the parameter.
        parameter: Name of the parameter that the module provides.
        tensor: Name of the tensor that identified the module.
        joint: Separator between the module's name and the names of its parts.
    """

    name: str
    parameter: str
    tensor: str
    layout: Layout
    joint: str = "."


@dataclass(frozen=True)
class QuantizedFolder:
    """The tensors of a folder as floats.

    Args:
        quantization: The declaration by which the codes are read; None if the folder is not quantized.
        notes: Sentences for the user.
    """

    store: WeightStore
    quantization: StoredQuantization | None
    notes: tuple[str, ...]


class DequantizedStore:
    """A `WeightStore` over the files of a quantized checkpoint, with floats in place of quantized modules."""

    def __init__(self, raw: WeightStore, matrices: Mapping[str, _Matrix], consumed: set[str]) -> None:
        self._raw = raw
        self._matrices = matrices
        infos = {name: info for name, info in raw.infos().items() if name not in consumed}
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


def read_quantized(raw: WeightStore, declared: Sequence[Declaration], folder: Path) -> QuantizedFolder:
    """Return the tensors of `raw` with every quantized module's weight as floats.

    Args:
        declared: Quantization declarations of the folder, by precedence.

    Raises:
        UnsupportedError: The codes do not match any declaration, or their kind is not supported.
        CheckpointError: The tensors of a module do not fit together.
    """
    modules = _find_modules(raw.infos())
    if not modules:
        _refuse_codes(raw.infos())
        notes = [
            f"{d.source} says that the weights are quantized by {d.method}, but the files hold floats, which "
            "are read as they are."
            for d in declared
        ]
        return QuantizedFolder(raw, None, tuple(notes))
    quantization = _choose(modules, declared)
    notes = []
    if quantization.source != declared[0].source:
        notes.append(
            f"{declared[0].source} says {declared[0].method}, but the files match {quantization.source} "
            f"({quantization.method}), and are read accordingly."
        )
    _refuse_scaled_activations(raw.infos(), quantization, folder)
    kept_values: dict[str, WholeValues] = {}
    matrices: dict[str, _Matrix] = {}
    consumed: set[str] = set()
    for module in modules:
        source = Source(raw, module.name, kept_values, module.joint)
        matrix, parts = _matrix(source, module.layout, quantization)
        if source.has("pre_quant_scale"):
            matrix, parts = layouts.scale_inputs(source, matrix), (*parts, "pre_quant_scale")
        matrices[module.parameter] = matrix
        consumed |= {f"{module.name}{module.joint}{part}" for part in parts}
    store = DequantizedStore(raw, matrices, consumed)
    _refuse_codes(store.infos())
    small = sum(module.layout in _SMALL_FLOATS for module in modules)
    if small:
        notes.append(f"4-bit floats ({small} matrices) are read as 8-bit integers, without loss.")
    return QuantizedFolder(store, quantization, tuple(notes))


def _find_modules(infos: Mapping[str, TensorInfo]) -> list[_Module]:
    modules = []
    for name, info in infos.items():
        module, _, part = name.rpartition(".")
        if name.endswith("_blocks") and name.replace("_blocks", "_scales") in infos:
            parameter = name.removesuffix("_blocks")
            modules.append(_Module(parameter, parameter, name, Layout.MXFP4_EXPERTS, "_"))
        elif part in {"qweight", "weight_packed", "weight"}:
            layout = _layout(module, part, info, infos)
            if layout is not None:
                modules.append(_Module(module, f"{module}.weight", name, layout))
    return modules


def _layout(module: str, part: str, info: TensorInfo, infos: Mapping[str, TensorInfo]) -> Layout | None:
    """Identify the layout of a module that has `part`; None for floats and codes without a known scale."""

    def has(other: str) -> bool:
        return f"{module}.{other}" in infos

    def dtype(other: str) -> ir.DataType | None:
        return infos[f"{module}.{other}"].dtype if has(other) else None

    if part == "qweight":
        scales = infos.get(f"{module}.scales")
        if info.dtype is not ir.DataType.INT32 or scales is None:
            return None
        by_output = len(info.shape) == 2 and info.shape[1] * 8 == scales.shape[-1]
        return Layout.AWQ if by_output else Layout.GPTQ
    if has("weight.absmax"):
        return Layout.BNB_4BIT
    if info.dtype in _FLOAT8 and (has("weight_scale") or has("weight_scale_inv")):
        return Layout.FP8
    match info.dtype, dtype("weight_scale"):
        case ir.DataType.INT32, _ if part == "weight_packed":
            return Layout.PACKED_INTEGERS
        case ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN:
            return Layout.NVFP4
        case ir.DataType.UINT8, ir.DataType.UINT8 | ir.DataType.FLOAT8E8M0:
            return Layout.MXFP4
        case ir.DataType.UINT8, ir.DataType():
            return Layout.INT4_BY_OUTPUT
        case ir.DataType.INT8, ir.DataType():
            return Layout.INT8
        case ir.DataType.INT8, None if has("SCB"):
            return Layout.BNB_INT8
        case ir.DataType.UINT32, None if has("scales"):
            return Layout.AFFINE
    return None


def _choose(modules: Sequence[_Module], declared: Sequence[Declaration]) -> StoredQuantization:
    """Return the first declaration that allows the layouts of all modules.

    Raises:
        UnsupportedError: No declaration does.
        CheckpointError: The first declaration cannot be read.
    """
    parsed = []
    for declaration in declared:
        quantization = declaration.parse()
        parsed.append(quantization)
        if all(module.layout in quantization.layouts for module in modules):
            return _agreed(quantization, declared)
    first = next((m for m in modules if not parsed or m.layout not in parsed[0].layouts), modules[0])
    declarations = "; ".join(f"{q.source} says {q.method} ({', '.join(sorted(q.layouts))})" for q in parsed)
    raise UnsupportedError(
        f"{first.tensor} is stored as {first.layout}, but "
        + (declarations or "neither config.json nor a file beside it says how the weights are quantized"),
        hint=FLOAT_HINT,
    )


def _agreed(chosen: StoredQuantization, declared: Sequence[Declaration]) -> StoredQuantization:
    """Return the chosen declaration, with the layout of zero points that another declaration may state.

    Raises:
        CheckpointError: Two declarations state different layouts, and the codes cannot tell which is right.
    """
    if Layout.GPTQ not in chosen.layouts:
        return chosen
    stated: dict[int, str] = {}
    for declaration in declared:
        if declaration.method in {QuantMethod.GPTQ, QuantMethod.AUTO_ROUND}:
            other = declaration.parse()
            if other.zero_offset is not None:
                stated.setdefault(other.zero_offset, other.source)
    if len(stated) > 1 and not chosen.symmetric:
        raise CheckpointError(
            f"{' and '.join(stated.values())} state different layouts of zero points (checkpoint_format)",
            hint="remove the file that does not belong to these weights",
        )
    return replace(chosen, zero_offset=next(iter(stated), None))


def _matrix(
    source: Source, layout: Layout, quantization: StoredQuantization
) -> tuple[_Matrix, tuple[str, ...]]:
    form = quantization.format_of(source.module)
    if layout is Layout.GPTQ:
        offset = 1 if quantization.zero_offset is None else quantization.zero_offset
        return layouts.gptq_matrix(source, form, offset, symmetric=quantization.symmetric), _GPTQ_PARTS
    if layout is Layout.INT8 and quantization.method is QuantMethod.MODELOPT:
        form = replace(form, bits=8)
    if layout in {Layout.FP8, Layout.NVFP4, Layout.MXFP4}:
        float_layouts.require_no_zero_points(source)
    kind = _KINDS[layout]
    return kind.build(source, form), kind.parts


def _refuse_codes(infos: Mapping[str, TensorInfo]) -> None:
    """Check that no weight is left as codes, which mean nothing without their scales.

    Raises:
        UnsupportedError: A weight is left as codes.
    """
    for name, info in infos.items():
        part = name.rpartition(".")[2]
        aside = part.endswith(("scale", "zero_point"))
        if (info.dtype in _FLOAT8 and not aside) or part in {"qweight", "weight_packed"}:
            raise UnsupportedError(
                f"{name} is stored as {info.dtype.name}, but nothing in the folder says how it was quantized",
                hint=FLOAT_HINT,
            )


def _refuse_scaled_activations(
    infos: Mapping[str, TensorInfo], quantization: StoredQuantization, folder: Path
) -> None:
    """Check that AWQ did not scale an activation function; llmc does not support such models.

    Raises:
        UnsupportedError: A scale of an activation function is stored.
    """
    for name in infos if Layout.AWQ in quantization.layouts else ():
        module, _, part = name.rpartition(".")
        if part == "scales" and f"{module}.qweight" not in infos:
            raise UnsupportedError(
                f"{folder} scales an activation function ({name}), which llmc does not support",
                hint=FLOAT_HINT,
            )
