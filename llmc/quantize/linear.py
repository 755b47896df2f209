"""Replace the linear products and embeddings of a graph by their quantized operators.

`MatMul` (and the `Transpose` of its weight) becomes com.microsoft MatMulNBits, `Gather` becomes
GatherBlockQuantized. A matrix that serves both is quantized once: GatherBlockQuantized wants the codes of an
entry in one row, so that a `Reshape`, which ONNX Runtime folds, stands between.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import cast

import numpy as np
import onnx_ir as ir

from llmc.config import Dtype, Quantization, WeightRole, WeightScheme
from llmc.errors import UnsupportedError
from llmc.graph.linear import Embedding, Linear, find_embeddings, find_linears
from llmc.graph.model import Graph
from llmc.graph.weights import Array, LazyWeight, Rows, WeightGroup
from llmc.quantize.blocks import count_blocks
from llmc.quantize.stream import quantize_rows

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class QuantizedTensor:
    """How one matrix is stored.

    Args:
        name: Its initializer in the graph before quantization.
        role: Role its rule was chosen by.
        shape: As the checkpoint has it.
        scheme: None where it stays in float.
        bytes: All that is stored for it: codes, scales and zero points, or the float matrix.
    """

    name: str
    role: WeightRole
    shape: tuple[int, ...]
    scheme: WeightScheme | None
    bytes: int


@dataclass(frozen=True)
class QuantizationReport:
    """Every matrix of a graph, in graph order."""

    tensors: tuple[QuantizedTensor, ...]

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits by matrix element, scales, zero points and padding included; 0 without a matrix."""
        elements = sum(int(np.prod(t.shape, dtype=np.int64)) for t in self.tensors)
        return 8 * self.bytes / elements if elements else 0.0


@dataclass
class _Matrix:
    """A weight and the operators that read it with the same axis as input features."""

    weight: ir.Value
    outputs_first: bool
    linears: list[Linear] = field(default_factory=list)
    embeddings: list[Embedding] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.weight.name)

    @property
    def tensor(self) -> LazyWeight:
        return cast(LazyWeight, self.weight.const_value)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape.numpy())

    @property
    def role(self) -> WeightRole:
        """A matrix with several uses has the role that its logits are most sensitive to."""
        roles = {linear.role for linear in self.linears}
        order = (WeightRole.LM_HEAD, WeightRole.LINEAR, WeightRole.RESIDUAL)
        return next((role for role in order if role in roles), WeightRole.EMBEDDING)


def choose_scheme(quantization: Quantization, role: WeightRole, name: str) -> WeightScheme | None:
    """The scheme of the first rule that fits; None (float) where it says so or none fits."""
    for rule in quantization.rules:
        if rule.role in (None, role) and fnmatchcase(name, rule.match):
            return rule.scheme
    return None


def quantize_weights(graph: Graph, quantization: Quantization, dtype: Dtype) -> QuantizationReport:
    """Quantize the matrices of `graph` by the target's rules; data is read when the initializers are written.

    A matrix that is embedding and language-model head at once is decided by the rule for the head.

    Args:
        graph: Changed in place.
        quantization: Rules and accuracy level.
        dtype: Type of the activations, and so of the scales.

    Raises:
        UnsupportedError: A rule wants a weight quantized that is no tensor of the checkpoint.
    """
    report = []
    for matrix in _find_matrices(graph):
        scheme = choose_scheme(quantization, matrix.role, matrix.name)
        if scheme is None:
            size = matrix.tensor.nbytes
        else:
            operands = _Operands(graph.graph, matrix, scheme, dtype)
            for linear in matrix.linears:
                _replace_linear(graph.graph, linear, operands, quantization.accuracy_level)
            for embedding in matrix.embeddings:
                _replace_embedding(graph.graph, embedding, operands)
            if not matrix.weight.uses():
                del graph.graph.initializers[matrix.name]
            size = operands.nbytes
        report.append(QuantizedTensor(matrix.name, matrix.role, matrix.shape, scheme, size))
    if any(t.scheme is not None for t in report):
        graph.model.opset_imports[DOMAIN] = 1
    return QuantizationReport(tuple(report))


def _find_matrices(graph: Graph) -> list[_Matrix]:
    matrices: dict[tuple[ir.Value, bool], _Matrix] = {}
    for embedding in find_embeddings(graph):
        key = (embedding.weight, True)
        matrices.setdefault(key, _Matrix(*key)).embeddings.append(embedding)
    for linear in find_linears(graph):
        key = (linear.weight, linear.transposed)
        matrices.setdefault(key, _Matrix(*key)).linears.append(linear)
    return list(matrices.values())


class _Operands:
    """The initializers of one quantized matrix, shared by every operator that reads it."""

    def __init__(self, graph: ir.Graph, matrix: _Matrix, scheme: WeightScheme, dtype: Dtype) -> None:
        rows = matrix.tensor.rows
        if rows is None:
            raise UnsupportedError(
                f"weight {matrix.name} is computed from {', '.join(matrix.tensor.sources)}, "
                "and only tensors of the checkpoint can be quantized",
                hint="give it a rule with scheme: null",
            )
        self.name = matrix.name if matrix.outputs_first else f"{matrix.name}.T"
        self.scheme = scheme
        self.out_features, self.in_features = matrix.shape if matrix.outputs_first else matrix.shape[::-1]
        self.blocks = count_blocks(self.in_features, scheme.block_size)
        self.scale_dtype = ir.DataType.FLOAT if dtype is Dtype.FLOAT32 else ir.DataType.FLOAT16
        blob = scheme.block_size * scheme.bits // 8
        self.entry_bytes = self.blocks * blob
        only_embedded = not matrix.linears
        entry = (self.entry_bytes,) if only_embedded else (self.blocks, blob)
        codes = (self.out_features, *entry)
        compute = _Compute(rows, scheme, self.scale_dtype, self.name, matrix.outputs_first, codes)
        group = WeightGroup(rows.sources, compute)

        def initializer(key: str, kind: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
            tensor = LazyWeight(name=f"{self.name}.{key}", dtype=kind, shape=shape, group=group, key=key)
            self.nbytes += tensor.nbytes
            return _register(graph, tensor)

        self.nbytes = 0
        self.codes = initializer("codes", ir.DataType.UINT8, codes)
        self.scales = initializer("scales", self.scale_dtype, (self.out_features, self.blocks))
        self.zero_points = None
        if not scheme.symmetric:
            packed = -(-self.blocks * scheme.bits // 8)
            self.zero_points = initializer("zero_points", ir.DataType.UINT8, (self.out_features, packed))
        self._flat: ir.Value | None = self.codes if only_embedded else None

    def flat_codes(self, graph: ir.Graph, before: ir.Node) -> ir.Value:
        """The codes as (N, bytes of an entry)."""
        if self._flat is None:
            shape = _constant(graph, f"{self.name}.entry_shape", [self.out_features, self.entry_bytes])
            node = ir.Node("", "Reshape", [self.codes, shape], name=f"{self.name}.entries")
            graph.insert_before(before, node)
            entries = (self.out_features, self.entry_bytes)
            self._flat = _type(node, f"{self.name}.entries", ir.DataType.UINT8, entries)
        return self._flat


@dataclass(frozen=True)
class _Compute:
    """Computes the members of one group when it is written."""

    rows: Rows
    scheme: WeightScheme
    scale_dtype: ir.DataType
    name: str
    outputs_first: bool
    codes_shape: tuple[int, ...]

    def __call__(self) -> Mapping[str, Array]:
        scale_type = np.float32 if self.scale_dtype is ir.DataType.FLOAT else np.float16
        blocks = quantize_rows(
            self.rows, self.scheme, scale_type, name=self.name, outputs_first=self.outputs_first
        )
        members = {"codes": blocks.codes.reshape(self.codes_shape), "scales": blocks.scales}
        if blocks.zero_points is not None:
            members["zero_points"] = blocks.zero_points
        return members


def _replace_linear(graph: ir.Graph, linear: Linear, operands: _Operands, accuracy_level: int) -> None:
    node = ir.node(
        "MatMulNBits",
        [linear.activation, operands.codes, operands.scales]
        + ([] if operands.zero_points is None else [operands.zero_points]),
        {
            "K": operands.in_features,
            "N": operands.out_features,
            "bits": operands.scheme.bits,
            "block_size": operands.scheme.block_size,
            "accuracy_level": accuracy_level,
        },
        domain=DOMAIN,
    )
    transpose = linear.node.inputs[1]
    _replace(graph, linear.node, [node])
    producer = None if transpose is None else transpose.producer()
    if linear.transposed and producer is not None and not producer.outputs[0].uses():
        graph.remove(producer, safe=True)


def _replace_embedding(graph: ir.Graph, embedding: Embedding, operands: _Operands) -> None:
    lookup = ir.node(
        "GatherBlockQuantized",
        [operands.flat_codes(graph, embedding.node), embedding.indices, operands.scales]
        + ([] if operands.zero_points is None else [operands.zero_points]),
        {
            "bits": operands.scheme.bits,
            "block_size": operands.scheme.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        },
        domain=DOMAIN,
    )
    width = operands.blocks * operands.scheme.block_size
    if width == operands.in_features:
        _replace(graph, embedding.node, [lookup])
        return
    shape = tuple(embedding.indices.shape or ())
    padded = _type(lookup, f"{operands.name}.padded", operands.scale_dtype, (*shape, width))
    start, stop, axis = (
        _constant(graph, f"{operands.name}.{key}", [value])
        for key, value in (("first", 0), ("width", operands.in_features), ("last_axis", -1))
    )
    cut = ir.node("Slice", [padded, start, stop, axis])
    _replace(graph, embedding.node, [lookup, cut])


def _replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Put `new` in the place of `old`; the last one's output takes over name, type, shape and consumers."""
    new[-1].name = old.name
    for node in new:
        node.metadata_props.update(old.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, old, [old], new, old.outputs, new[-1].outputs)


def _constant(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    """A small int64 initializer; made once by name."""
    if name not in graph.initializers:
        _register(graph, ir.tensor(np.array(values, np.int64), name=name))
    return graph.initializers[name]


def _register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    kind = ir.TensorType(tensor.dtype)
    value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


def _type(node: ir.Node, name: str, dtype: ir.DataType, shape: tuple[int | ir.SymbolicDim, ...]) -> ir.Value:
    """The only output of `node`, named and typed."""
    value = node.outputs[0]
    value.name = name
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape(shape)
    return value
