"""Replace com.microsoft MoE by QMoE: the stacked matrices of a layer of experts as integers by block.

QMoE has one block size for both matrices, which must divide the input features of either. If a rule's block
size does not, the next smaller size that does is used; if none does, the experts stay in float. The
checkpoint's codes are kept if both matrices have them in blocks that fit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.config import Dtype, Quantization, WeightRole, WeightScheme
from llmc.errors import UnsupportedError
from llmc.graph.domains import MICROSOFT
from llmc.graph.edit import add_initializer, replace_node
from llmc.graph.match import find_nodes, input_of, lazy_of
from llmc.graph.model import Graph
from llmc.graph.weights import LazyWeight, Rows, WeightGroup
from llmc.quantize.blocks import ScaleType
from llmc.quantize.place import QuantizedTensor, choose_scheme
from llmc.quantize.stored import KEPT, MADE_FLOATS, StoredMatrix, is_stored
from llmc.quantize.stored_experts import find_stored_experts
from llmc.quantize.stream import quantize_stack

#: Block sizes that both QMoE and our schemes support, largest first; the kernels for CUDA, which alone
#: compute in half precision, take no smaller ones than 32 (with zero points), and whole tiles of features.
_BLOCK_SIZES = (128, 64, 32, 16)
_CUDA_BLOCK_SIZES, _CUDA_TILE = (128, 64, 32), 64
#: Indices of MoE's inputs: its matrices, and their biases.
_MATRICES, _BIASES = (2, 4), (3, 5)


def quantize_experts(
    graph: Graph, quantization: Quantization, dtype: Dtype
) -> tuple[list[QuantizedTensor], tuple[str, ...]]:
    """Quantize every MoE of `graph`; data is read when the initializers are written.

    Returns:
        The matrices in graph order, and notes on rules whose block size was changed.

    Raises:
        UnsupportedError: A rule quantizes a weight that is not a tensor of the checkpoint.
    """
    tensors: list[QuantizedTensor] = []
    notes: dict[str, None] = {}
    for node in find_nodes(graph.graph, "MoE", MICROSOFT):
        weights = [cast(ir.Value, node.inputs[i]) for i in _MATRICES]
        scheme, stored = _decide(quantization, weights, dtype, notes)
        if scheme is None:
            tensors += [_describe(value, None, lazy_of(value).nbytes, MADE_FLOATS) for value in weights]
            continue
        matrices: Sequence[StoredMatrix | None] = (None, None) if isinstance(stored, str | None) else stored
        operands = [
            _Operands(graph.graph, value, scheme, dtype, matrix)
            for value, matrix in zip(weights, matrices, strict=True)
        ]
        _quantize_node(graph.graph, node, operands, quantization.accuracy_level, dtype)
        for value, operand in zip(weights, operands, strict=True):
            origin = operand.origin or f"quantized again ({stored})"
            tensors.append(_describe(value, scheme, operand.nbytes, origin))
            if not value.uses():
                del graph.graph.initializers[str(value.name)]
    return tensors, tuple(notes)


def _describe(value: ir.Value, scheme: WeightScheme | None, size: int, origin: str) -> QuantizedTensor:
    shape = tuple(lazy_of(value).shape.numpy())
    rows = lazy_of(value).rows
    stored = rows is not None and is_stored(rows)
    return QuantizedTensor(
        str(value.name), WeightRole.EXPERTS, shape, scheme, size, origin if stored else None
    )


def _decide(
    quantization: Quantization, weights: list[ir.Value], dtype: Dtype, notes: dict[str, None]
) -> tuple[WeightScheme | None, tuple[StoredMatrix, ...] | str | None]:
    """Return the scheme of both matrices (None: float), and the stored codes or why they are not kept."""
    scheme = choose_scheme(quantization.rules, WeightRole.EXPERTS, str(weights[0].name))
    if scheme is None:
        return None, None
    widths = [int(lazy_of(value).shape.numpy()[-1]) for value in weights]
    if dtype is not Dtype.FLOAT32 and any(width % _CUDA_TILE for width in widths):
        notes[
            f"experts stay in float: kernels for CUDA take multiples of {_CUDA_TILE} input features, here "
            f"{widths[0]} and {widths[1]}"
        ] = None
        return None, None
    known = _BLOCK_SIZES if dtype is Dtype.FLOAT32 else _CUDA_BLOCK_SIZES
    sizes = [size for size in known if not any(width % size for width in widths)]
    stacks = [rows for value in weights if (rows := lazy_of(value).rows) is not None]
    stored = find_stored_experts(stacks, scheme, sizes) if len(stacks) == len(weights) else None
    if isinstance(stored, tuple):
        return stored[0].scheme, stored
    return _fitting(scheme, widths, sizes, notes), stored


def _fitting(
    scheme: WeightScheme, widths: list[int], sizes: list[int], notes: dict[str, None]
) -> WeightScheme | None:
    """Return the rule's scheme with a block size that divides the inputs; None for float."""
    size = next((size for size in sizes if size <= scheme.block_size), None)
    if size is None and sizes:
        notes[
            f"experts stay in float: kernels for CUDA take blocks of {sizes[-1]} and more, "
            f"not of {scheme.block_size}"
        ] = None
        return None
    if size is None:
        notes[
            f"experts stay in float: {widths[0]} and {widths[1]} input features have no block size in common"
        ] = None
        return None
    if size != scheme.block_size:
        notes[
            f"experts are stored by block of {size}: {scheme.block_size} does not divide both "
            f"{widths[0]} and {widths[1]} input features"
        ] = None
    return scheme.model_copy(update={"block_size": size})


class _Operands:
    """The initializers of one stack of matrices.

    Attributes:
        origin: How the checkpoint's codes were handled; empty if they are not kept.
    """

    def __init__(
        self,
        graph: ir.Graph,
        value: ir.Value,
        scheme: WeightScheme,
        dtype: Dtype,
        stored: StoredMatrix | None,
    ) -> None:
        tensor = lazy_of(value)
        if tensor.rows is None:
            raise UnsupportedError(
                f"weight {value.name} is computed from {', '.join(tensor.sources)}, "
                "and only tensors of the checkpoint can be quantized",
                hint="give it a rule with scheme: null",
            )
        experts, out_features, in_features = (int(d) for d in tensor.shape.numpy())
        blocks = in_features // scheme.block_size
        scale_dtype = ir.DataType.FLOAT if dtype is Dtype.FLOAT32 else ir.DataType.FLOAT16
        scale_type = np.float32 if scale_dtype is ir.DataType.FLOAT else np.float16
        compute = _Compute(tensor.rows, scheme, scale_type, str(value.name), stored)
        self.origin = "" if stored is None else KEPT
        if stored is not None and not stored.is_exact(scale_type):
            self.origin += ", scales rounded to float16"
        group = WeightGroup(tensor.rows.sources, compute)

        def initializer(key: str, kind: ir.DataType, width: int) -> ir.Value:
            shape = (experts, out_features, width)
            lazy = LazyWeight(name=f"{value.name}.{key}", dtype=kind, shape=shape, group=group, key=key)
            self.nbytes += lazy.nbytes
            return add_initializer(graph, lazy)

        self.scheme = scheme
        self.nbytes = 0
        self.codes = initializer("codes", ir.DataType.UINT8, in_features * scheme.bits // 8)
        self.scales = initializer("scales", scale_dtype, blocks)
        self.zero_points = None
        if not scheme.symmetric:
            self.zero_points = initializer("zero_points", ir.DataType.UINT8, -(-blocks * scheme.bits // 8))


@dataclass(frozen=True)
class _Compute:
    """The members of one group, computed on writing."""

    rows: Rows
    scheme: WeightScheme
    scale_type: ScaleType
    name: str
    stored: StoredMatrix | None

    def __call__(self) -> Mapping[str, Array]:
        if self.stored is not None:
            blocks = self.stored.pack(self.scale_type, self.name)
        else:
            blocks = quantize_stack(self.rows, self.scheme, self.scale_type, name=self.name)
        lead = self.rows.shape[:2]
        members = {"codes": blocks.codes.reshape(*lead, -1), "scales": blocks.scales.reshape(*lead, -1)}
        if blocks.zero_points is not None:
            members["zero_points"] = blocks.zero_points.reshape(*lead, -1)
        return members


def _quantize_node(
    graph: ir.Graph, node: ir.Node, operands: list[_Operands], accuracy_level: int, dtype: Dtype
) -> None:
    biases = [input_of(node, i) for i in _BIASES]
    inputs: list[ir.Value | None] = [*node.inputs[:2]]
    for operand, bias in zip(operands, biases, strict=True):
        inputs += [operand.codes, operand.scales, bias]
    inputs += [None, None, None, *(operand.zero_points for operand in operands)]
    while inputs[-1] is None:
        inputs.pop()
    scheme = operands[0].scheme
    storage = {
        "expert_weight_bits": scheme.bits,
        "block_size": scheme.block_size,
        "accuracy_level": accuracy_level,
    }
    if dtype is not Dtype.FLOAT32:
        storage["weights_prepacked"] = 0  # kernels for CUDA would take codes to be in their own order
    attributes = [*node.attributes.values(), *ir.convenience.convert_attributes(storage)]
    replace_node(graph, node, [ir.Node(MICROSOFT, "QMoE", inputs, attributes)])
