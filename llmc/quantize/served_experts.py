"""Quantize the matrices of experts for servers, which read each as a linear layer of its own.

A graph has them stacked, (experts, outputs, inputs), as transformers does. Their codes are computed expert by
expert when a checkpoint is written, without calibration.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.config import EngineRule, EngineScheme, WeightRole, WeightRule, WeightScheme
from llmc.graph import dialect
from llmc.graph.domains import DIALECT
from llmc.graph.linear import is_weight
from llmc.graph.match import behind, find_nodes, lazy_of
from llmc.graph.model import Graph
from llmc.graph.weights import Rows, row_chunks
from llmc.quantize.blocks import stored_bytes
from llmc.quantize.formats import encode
from llmc.quantize.place import EXPERTS_AS, QuantizedTensor, choose_scheme
from llmc.quantize.stored import MADE_FLOATS, is_stored

#: Bytes of a stored scale of a block, and of an output.
_SCALE_BYTES = {"block": 2, "output": 4}


def find_experts(graph: Graph) -> Iterator[ir.Value]:
    """Yield the stacked matrices of every layer of experts, in graph order."""
    for node in find_nodes(graph.graph, dialect.EXPERTS, DIALECT):
        for value in node.inputs:
            weight = None if value is None else behind(value, "Transpose")
            if weight is not None and is_weight(weight) and len(weight.shape or ()) == 3:
                yield weight


def mark_experts(
    graph: Graph, rules: Sequence[WeightRule] | Sequence[EngineRule]
) -> tuple[QuantizedTensor, ...]:
    """Note in `graph` how the rules store its experts, and return the record of each stack."""
    records = []
    for weight in find_experts(graph):
        tensor, name = lazy_of(weight), str(weight.name)
        scheme = scheme_of_experts(rules, name)
        shape = tuple(tensor.shape.numpy())
        stored = tensor.rows is not None and is_stored(tensor.rows)
        origin = None
        if stored:
            origin = MADE_FLOATS if scheme is None else "quantized again (expert by expert)"
        size = tensor.nbytes if scheme is None else _bytes(shape, scheme)
        weight.meta[EXPERTS_AS] = scheme
        records.append(QuantizedTensor(name, WeightRole.EXPERTS, shape, scheme, size, origin))
    return tuple(records)


def scheme_of_experts(
    rules: Sequence[WeightRule] | Sequence[EngineRule], name: str
) -> WeightScheme | EngineScheme | None:
    """Return the scheme that rules give a stack of experts, with a method that needs no calibration."""
    scheme: WeightScheme | EngineScheme | None = choose_scheme(rules, WeightRole.EXPERTS, name)  # type: ignore[misc]
    if isinstance(scheme, WeightScheme):
        return scheme.model_copy(update={"method": scheme.method.uncalibrated()})
    return scheme


def encode_expert(rows: Rows, scheme: EngineScheme) -> tuple[Array, Array]:
    """Return the codes (N, K) and the scales (N, 1), float32, of one expert's matrix in int8 or fp8."""
    parts = []
    for start, stop in row_chunks(rows):
        weights = rows.rows(start, stop).astype(np.float32)
        parts.append(encode(weights, scheme.format, weights.shape[1], ir.DataType.FLOAT))
    codes, scales = zip(*parts, strict=True)
    return np.concatenate(codes), np.concatenate(scales)


def _bytes(shape: tuple[int, ...], scheme: WeightScheme | EngineScheme) -> int:
    experts, outputs, inputs = shape
    if isinstance(scheme, WeightScheme):
        return experts * stored_bytes((outputs, inputs), scheme, _SCALE_BYTES["block"])
    return experts * outputs * (inputs * scheme.bits // 8 + _SCALE_BYTES["output"])
