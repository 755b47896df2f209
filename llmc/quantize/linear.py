"""Replace the linear products and embeddings of a graph by their quantized operators.

`MatMul` (and the `Transpose` of its weight) becomes com.microsoft MatMulNBits, `Gather` becomes
GatherBlockQuantized. A matrix that serves both is quantized once: GatherBlockQuantized needs the codes of an
entry in one row, so that there is a `Reshape` between, which ONNX Runtime folds. Likewise a `Cast` follows
scales that are stored in a type that the operators do not accept: where it is not folded (all optimizations
of a session disabled), MatMulNBits at accuracy level 4 packs codes without their scales, and returns wrong
results without an error (ONNX Runtime 1.31).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.config import Dtype, Quantization, WeightRole, WeightScheme
from llmc.errors import UnsupportedError
from llmc.graph.domains import MICROSOFT
from llmc.graph.edit import Site, add_initializer, name_constant, replace_node, require_domain, set_value
from llmc.graph.linear import Embedding, Linear, find_embeddings, find_linears
from llmc.graph.match import lazy_of
from llmc.graph.model import CODE_BITS, Graph
from llmc.graph.weights import LazyWeight, Rows, WeightGroup
from llmc.quantize.blocks import PackedBlocks, ScaleType, count_blocks
from llmc.quantize.calibrate import Calibration
from llmc.quantize.experts import quantize_experts
from llmc.quantize.place import CODED_AS, CodedAs, QuantizedTensor, choose_scheme
from llmc.quantize.stored import KEPT, MADE_FLOATS, StoredMatrix, find_stored, is_stored
from llmc.quantize.stream import quantize_rows


@dataclass(frozen=True)
class QuantizationReport:
    """The record of every matrix of a graph, in graph order.

    Args:
        notes: Rules that could not be followed exactly, and what was done instead.
    """

    tensors: tuple[QuantizedTensor, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """The stored bits per matrix element, with scales, zero points and padding; 0 without a matrix."""
        elements = sum(int(np.prod(t.shape, dtype=np.int64)) for t in self.tensors)
        return 8 * self.bytes / elements if elements else 0.0


@dataclass
class _Matrix:
    """The weight and the operators that read it with the same axis as input features."""

    weight: ir.Value
    outputs_first: bool
    linears: list[Linear] = field(default_factory=list)
    embeddings: list[Embedding] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.weight.name)

    @property
    def tensor(self) -> LazyWeight:
        return lazy_of(self.weight)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape.numpy())

    @property
    def role(self) -> WeightRole:
        """The role to which the logits are most sensitive, for a matrix with several uses."""
        roles = {linear.role for linear in self.linears}
        order = (WeightRole.LM_HEAD, WeightRole.ROUTER, WeightRole.LINEAR, WeightRole.RESIDUAL)
        return next((role for role in order if role in roles), WeightRole.EMBEDDING)


@dataclass(frozen=True)
class _Decision:
    """The decision how a matrix is stored.

    Args:
        scheme: The scheme; None for float.
        stored: The checkpoint's codes, if they are kept.
        origin: How the checkpoint's codes were handled; None if the checkpoint has floats.
    """

    scheme: WeightScheme | None
    stored: StoredMatrix | None = None
    origin: str | None = None


def _decide(matrix: _Matrix, quantization: Quantization, dtype: Dtype) -> _Decision:
    """Apply the rules, except for the grid: the checkpoint's own codes decide it, if there are any.

    Quantizing a second time would lose more, so its codes are kept whatever bits a rule asks for, except with
    `regrid`.
    """
    scheme = choose_scheme(quantization.rules, matrix.role, matrix.name)
    rows = matrix.tensor.rows
    if rows is None:
        return _Decision(scheme)
    if scheme is None:
        return _Decision(None, origin=MADE_FLOATS if is_stored(rows) else None)
    stored = find_stored(rows, scheme, outputs_first=matrix.outputs_first)
    if isinstance(stored, StoredMatrix) and quantization.regrid and not stored.has_grid_of(scheme):
        return _Decision(scheme, origin="quantized again (its grid is not that of the target)")
    if isinstance(stored, StoredMatrix):
        stored_as = stored.storage_type(scale_type(quantization, dtype))
        rounded = "" if stored.is_exact(stored_as) else ", scales rounded to float16"
        return _Decision(stored.scheme, stored, KEPT + rounded)
    return _Decision(scheme, origin=None if stored is None else f"quantized again ({stored})")


def scale_type(quantization: Quantization, dtype: Dtype) -> ScaleType:
    """Return the type of stored scales for activations of `dtype`."""
    if quantization.scales == "bfloat16":
        bfloat16: ScaleType = ml_dtypes.bfloat16
        return bfloat16
    wide = dtype is Dtype.FLOAT32 and quantization.scales == "activations"
    return np.float32 if wide else np.float16


def plan_calibration(graph: Graph, quantization: Quantization, dtype: Dtype) -> dict[str, WeightScheme]:
    """Return the checkpoint's tensors that the rules quantize on calibration text, and their schemes."""
    calibrated: dict[str, WeightScheme] = {}
    for matrix in _find_matrices(graph):
        plan = _decide(matrix, quantization, dtype)
        scheme = plan.scheme
        if scheme is None or plan.stored is not None or not matrix.linears:
            continue
        if scheme.method.needs_calibration:
            calibrated.update(dict.fromkeys(matrix.tensor.sources, scheme))
    return calibrated


@dataclass(frozen=True)
class MatrixPlan:
    """The facts of a matrix of a graph before it is quantized.

    Args:
        name: Name of its initializer.
        sources: The checkpoint's tensors that it is made of, along the outputs.
        shape: (N, K).
        scheme: Scheme by the rules; None if it stays in float.
        is_linear: Whether a linear layer reads it, with outputs first.
        kept: Whether the checkpoint's codes are kept.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, int]
    scheme: WeightScheme | None
    is_linear: bool
    kept: bool = False


def plan_matrices(graph: Graph, quantization: Quantization, dtype: Dtype) -> list[MatrixPlan]:
    """Return every matrix of `graph`, and what the rules decide."""
    plans = []
    for matrix in _find_matrices(graph):
        first, second = matrix.shape if matrix.outputs_first else matrix.shape[::-1]
        decision = _decide(matrix, quantization, dtype)
        plans.append(
            MatrixPlan(
                matrix.name,
                tuple(matrix.tensor.sources),
                (first, second),
                decision.scheme,
                bool(matrix.linears) and matrix.outputs_first,
                decision.stored is not None,
            )
        )
    return plans


def quantize_weights(
    graph: Graph, quantization: Quantization, dtype: Dtype, calibration: Calibration | None = None
) -> QuantizationReport:
    """Quantize the matrices of `graph` by the target's rules; data is read when the initializers are written.

    The rule for the head decides a matrix that is both embedding and language-model head.

    Args:
        graph: Changed in place.
        quantization: Rules and accuracy level.
        dtype: Type of the activations.
        calibration: Matrices that are quantized already.

    Raises:
        UnsupportedError: A rule quantizes a weight that is not a tensor of the checkpoint.
    """
    report = []
    for matrix in _find_matrices(graph):
        decision = _decide(matrix, quantization, dtype)
        scheme = decision.scheme
        if scheme is None:
            size = matrix.tensor.nbytes
        else:
            stored_type = scale_type(quantization, dtype)
            if decision.stored is not None:
                stored_type = decision.stored.storage_type(stored_type)
            operands = _Operands(
                graph.graph, matrix, scheme, dtype, stored_type, calibration, decision.stored
            )
            level = quantization.accuracy_level
            if decision.stored is not None:
                level = quantization.kept_accuracy.get(matrix.role, level)
            for linear in matrix.linears:
                _replace_linear(graph.graph, linear, operands, level)
            for embedding in matrix.embeddings:
                _replace_embedding(graph.graph, embedding, operands)
            if not matrix.weight.uses():
                del graph.graph.initializers[matrix.name]
            size = operands.nbytes
        report.append(QuantizedTensor(matrix.name, matrix.role, matrix.shape, scheme, size, decision.origin))
    experts, notes = quantize_experts(graph, quantization, dtype)
    report += experts
    if any(t.scheme is not None for t in report):
        require_domain(graph.graph, MICROSOFT)
    return QuantizationReport(tuple(report), notes)


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

    def __init__(
        self,
        graph: ir.Graph,
        matrix: _Matrix,
        scheme: WeightScheme,
        dtype: Dtype,
        stored_type: ScaleType,
        calibration: Calibration | None,
        stored: StoredMatrix | None,
    ) -> None:
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
        compute = _Compute(
            rows, scheme, stored_type, self.name, matrix.outputs_first, codes, calibration, stored
        )
        group = WeightGroup(rows.sources, compute)

        def initializer(key: str, kind: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
            tensor = LazyWeight(name=f"{self.name}.{key}", dtype=kind, shape=shape, group=group, key=key)
            self.nbytes += tensor.nbytes
            return add_initializer(graph, tensor)

        self.nbytes = 0
        self.codes = initializer("codes", ir.DataType.UINT8, codes)
        self.codes.meta[CODED_AS] = CodedAs(scheme, (self.out_features, self.in_features), outputs_first=True)
        kind = ir.DataType.from_numpy(np.dtype(stored_type))
        self.scales = initializer("scales", kind, (self.out_features, self.blocks))
        if kind is not self.scale_dtype:
            self.scales = self._widen(graph)
        self.zero_points = None
        if stored is not None and stored.float_zeros:
            shape = (self.out_features, self.blocks)
            before = self.nbytes
            self.zero_points = initializer("zero_points", ir.DataType.FLOAT, shape)
            # Backends store the minimum, in the type of the scales.
            self.nbytes = before + self.out_features * self.blocks * int(kind.itemsize)
        elif not scheme.symmetric:
            packed = -(-self.blocks * scheme.bits // 8)
            self.zero_points = initializer("zero_points", ir.DataType.UINT8, (self.out_features, packed))
        self.facts = {} if stored is None or stored.code_bits is None else {CODE_BITS: str(stored.code_bits)}
        self._flat: ir.Value | None = self.codes if only_embedded else None

    def _widen(self, graph: ir.Graph) -> ir.Value:
        """Cast the scales to the type that the operators accept; a session folds the cast when it starts."""
        node = Site(graph, graph[0], metadata={}).emit(
            "Cast",
            [self.scales],
            f"{self.name}.wide_scales",
            attributes={"to": int(self.scale_dtype)},
            like=self.scales,
            dtype=self.scale_dtype,
            node_name=f"{self.name}.widen",
        )
        return node.outputs[0]

    def flat_codes(self, graph: ir.Graph, before: ir.Node) -> ir.Value:
        """Return the codes as (N, bytes of an entry)."""
        if self._flat is None:
            shape = name_constant(
                graph, f"{self.name}.entry_shape", np.array([self.out_features, self.entry_bytes], np.int64)
            )
            entries = f"{self.name}.entries"
            node = Site(graph, before, metadata={}).emit(
                "Reshape",
                [self.codes, shape],
                entries,
                shape=(self.out_features, self.entry_bytes),
                dtype=ir.DataType.UINT8,
                node_name=entries,
            )
            self._flat = node.outputs[0]
        return self._flat


@dataclass(frozen=True)
class _Compute:
    """The members of one group, computed on writing."""

    rows: Rows
    scheme: WeightScheme
    scale_type: ScaleType
    name: str
    outputs_first: bool
    codes_shape: tuple[int, ...]
    calibration: Calibration | None
    stored: StoredMatrix | None

    def __call__(self) -> Mapping[str, Array]:
        blocks = self._calibrated() if self.stored is None else self.stored.pack(self.scale_type, self.name)
        if blocks is None:
            blocks = quantize_rows(
                self.rows, self.scheme, self.scale_type, name=self.name, outputs_first=self.outputs_first
            )
        members = {"codes": blocks.codes.reshape(self.codes_shape), "scales": blocks.scales}
        if blocks.zero_points is not None:
            members["zero_points"] = blocks.zero_points
        return members

    def _calibrated(self) -> PackedBlocks | None:
        if self.calibration is None or not self.outputs_first:
            return None
        out_features, in_features = self.rows.shape
        return self.calibration.join(self.rows.sources, (out_features, in_features), self.scheme)


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
        domain=MICROSOFT,
    )
    node.metadata_props.update(operands.facts)
    transpose = linear.node.inputs[1]
    replace_node(graph, linear.node, [node])
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
        domain=MICROSOFT,
    )
    lookup.metadata_props.update(operands.facts)
    width = operands.blocks * operands.scheme.block_size
    if width == operands.in_features:
        replace_node(graph, embedding.node, [lookup])
        return
    shape = tuple(embedding.indices.shape or ())
    padded = set_value(lookup.outputs[0], f"{operands.name}.padded", (*shape, width), operands.scale_dtype)
    start, stop, axis = (
        name_constant(graph, f"{operands.name}.{key}", np.array([value], np.int64))
        for key, value in (("first", 0), ("width", operands.in_features), ("last_axis", -1))
    )
    cut = ir.node("Slice", [padded, start, stop, axis])
    replace_node(graph, embedding.node, [lookup, cut])
