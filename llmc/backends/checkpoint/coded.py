"""Take the codes of a quantized graph, one matrix at a time, as a format of checkpoints encodes them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.backends.checkpoint.formats.base import CodedMatrix, Codes
from llmc.config import CheckpointFormat, EngineScheme, WeightFormat, WeightScheme
from llmc.errors import UnsupportedError
from llmc.graph.files import FilePart
from llmc.graph.match import lazy_of
from llmc.graph.model import Graph
from llmc.graph.weights import LazyWeight, Rows
from llmc.quantize.blocks import PackedBlocks, unpack, zero_level
from llmc.quantize.place import CODED_AS, EXPERTS_AS, CodedAs, ExpertsAs
from llmc.quantize.served_experts import encode_expert, find_experts
from llmc.quantize.stream import quantize_rows

#: Formats whose readers have scales in float16 alone.
_HALF = (CheckpointFormat.GPTQ, CheckpointFormat.AWQ)


def coded_matrices(graph: Graph, form: CheckpointFormat) -> Iterator[CodedMatrix]:
    """Yield the matrices of a quantized graph in its order, under the names of the model's parameters.

    Raises:
        UnsupportedError: Codes are not those of one parameter of the model.
    """
    for value in graph.graph.initializers.values():
        tensor, coded = value.const_value, value.meta.get(CODED_AS)
        if not isinstance(tensor, LazyWeight) or coded is None:
            continue
        if len(tensor.sources) != 1:
            raise UnsupportedError(
                f"{value.name} holds the codes of {', '.join(tensor.sources)}, and servers have each of them",
                hint="leave passes that join matrices out of the target",
            )
        kind = _scale_type(graph, str(value.name).removesuffix(".codes"), form)
        read = partial(_read, tensor, coded, kind)
        yield CodedMatrix(tensor.sources[0], coded.shape, coded.scheme, read, coded.input_scale, kind)


def stored_experts(graph: Graph) -> dict[str, ExpertsAs]:
    """Return how each stack of experts that is quantized is stored, by its parameter."""
    return {
        lazy_of(weight).sources[0]: weight.meta[EXPERTS_AS]
        for weight in find_experts(graph)
        if weight.meta.get(EXPERTS_AS) is not None
    }


def expert_matrix(
    module: str, rows: Rows, part: FilePart, stored: ExpertsAs, joined: Sequence[Rows], form: CheckpointFormat
) -> CodedMatrix:
    """Return the matrix (N, K) of one expert, whose codes are computed when they are read.

    Args:
        part: Its place in the stack.
        joined: The matrices that servers join with it, itself among them.
    """
    outputs, inputs = rows.shape
    scheme = stored.scheme
    kind = ir.DataType.FLOAT16 if form in _HALF else ir.DataType.BFLOAT16
    if isinstance(scheme, EngineScheme):
        typed = partial(_typed_expert, rows, scheme, tuple(joined), module)
        kind = kind if scheme.block_size is not None else ir.DataType.FLOAT
        return CodedMatrix(module, (outputs, inputs), scheme, typed, stored.input_scale, kind)
    calibrated = None
    if stored.codes is not None and part.expert is not None and part.rows is not None:
        calibrated = partial(stored.codes, part.expert, part.rows, inputs)
    read = partial(_expert, rows, scheme, kind, module, calibrated)
    return CodedMatrix(module, (outputs, inputs), scheme, read, None, kind)


def _expert(
    rows: Rows,
    scheme: WeightScheme,
    scale_type: ir.DataType,
    name: str,
    calibrated: Callable[[], PackedBlocks | None] | None,
) -> Codes:
    blocks = None if calibrated is None else calibrated()
    if blocks is None:
        blocks = quantize_rows(rows, scheme, ml_dtypes.bfloat16, name=name)
    members = {"codes": blocks.codes, "scales": blocks.scales}
    if blocks.zero_points is not None:
        members["zero_points"] = blocks.zero_points
    outputs, inputs = rows.shape
    return _integers(members, scheme, (outputs, inputs), scale_type)


def _typed_expert(rows: Rows, scheme: EngineScheme, joined: Sequence[Rows], name: str) -> Codes:
    codes, scales, *whole = encode_expert(rows, scheme, joined, name)
    return Codes(codes, scales, None, whole[0] if whole else None)


def _scale_type(graph: Graph, name: str, form: CheckpointFormat) -> ir.DataType:
    """Return the type of stored scales: float16 in the formats whose readers have no other."""
    if form in _HALF:
        return ir.DataType.FLOAT16
    kind = graph.graph.initializers[f"{name}.scales"].dtype
    return ir.DataType.FLOAT if kind is None else kind


def _read(tensor: LazyWeight, coded: CodedAs, scale_type: ir.DataType) -> Codes:
    """Compute the codes of a matrix."""
    members = tensor.group.compute()
    if isinstance(coded.scheme, WeightScheme):
        return _integers(members, coded.scheme, coded.shape, scale_type)
    return _typed(members, coded.scheme, coded)


def _integers(
    members: Mapping[str, Array], scheme: WeightScheme, shape: tuple[int, int], scale_type: ir.DataType
) -> Codes:
    """Return codes by block; a block of zeros gets scale 1, since servers divide by it or refuse 0."""
    outputs, inputs = shape
    with np.errstate(over="ignore"):
        scales = members["scales"].astype(scale_type.numpy())
    blocks = scales.shape[1]
    codes = members["codes"].reshape(outputs, blocks, -1)
    zeros = members.get("zero_points")
    zeros = None if zeros is None else unpack(zeros, scheme.bits, blocks)
    empty = scales == 0
    if empty.any():
        zero = np.full(scales.shape, zero_level(scheme), np.uint8) if zeros is None else zeros
        scales[empty] = 1
        pair = zero[empty] if scheme.bits == 8 else zero[empty] * np.uint8(17)  # the same code twice
        codes = codes.copy()
        codes[empty] = pair[:, None]
    return Codes(codes.reshape(outputs, -1)[:, : inputs * scheme.bits // 8], scales, zeros)


def _typed(members: Mapping[str, Array], scheme: EngineScheme, coded: CodedAs) -> Codes:
    """Return codes of int8, fp8 or nvfp4 with their scales as columns."""
    codes, scales, whole = members["codes"], members["scales"], members.get("whole")
    if not coded.outputs_first:
        codes = np.ascontiguousarray(codes.T)
        scales = np.ascontiguousarray(scales.T)
    if scheme.scale_per == "tensor":
        scales = scales.reshape(1, 1)
    elif scheme.format is not WeightFormat.NVFP4 and scheme.block_size is None:
        scales = scales.reshape(-1, 1)
    return Codes(codes, scales, None, None if whole is None else whole.astype(np.float32))
