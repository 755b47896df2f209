"""Quantized matrices for TensorRT: integers in the graph, and a DequantizeLinear (ONNX opset 21) behind them.

    w = code * scale                no zero point: TensorRT takes none

int8 has a scale for each output feature, codes -127 to 127; int4 one for each block of input features, codes
-8 to 7. Scales are positive and have the type of the activations. TensorRT computes the product from the
codes. A matrix that is embedding and language-model head at once is stored once for both: TensorRT's int8
products want it (in_features, out_features), and would keep a second copy for a lookup of its rows, so the
lookup takes columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_ir as ir

from llmc.config import EngineRule, EngineScheme, WeightFormat, WeightRole
from llmc.errors import CheckpointError, UnsupportedError
from llmc.graph.linear import find_embeddings, find_linears
from llmc.graph.model import Graph
from llmc.graph.weights import Array, LazyWeight, Rows, WeightGroup, row_chunks
from llmc.quantize.place import QuantizedTensor, choose_scheme, replace

OPSET = 21
#: Scales that are tried for a block, as parts of the one that just spans it; then the best is refined.
_PARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
#: Largest code of each format.
_HIGHEST = {WeightFormat.INT8: 127, WeightFormat.INT4: 7}
_LOWEST = {WeightFormat.INT8: -127, WeightFormat.INT4: -8}
_TYPES = {WeightFormat.INT8: ir.DataType.INT8, WeightFormat.INT4: ir.DataType.INT4}


def quantize_for_engine(graph: Graph, rules: Sequence[EngineRule]) -> tuple[QuantizedTensor, ...]:
    """Quantize the matrices of `graph` by the target's rules; data is read when the graph is written.

    Raises:
        UnsupportedError: A matrix cannot be stored as its rule says.
    """
    stored = []
    for weight, outputs_first, role in _find_matrices(graph):
        tensor = cast(LazyWeight, weight.const_value)
        shape = tuple(tensor.shape.numpy())
        name = str(weight.name)
        scheme = choose_scheme(rules, role, name)
        size = tensor.nbytes if scheme is None else _replace(graph, weight, scheme, outputs_first)
        stored.append(QuantizedTensor(name, role, shape, scheme, size))
    return tuple(stored)


def _find_matrices(graph: Graph) -> list[tuple[ir.Value, bool, WeightRole]]:
    """Each matrix once: its initializer, whether outputs are its first axis, and its role.

    A matrix with several uses has the role that comes first among head, linear, residual and embedding.
    """
    order = (WeightRole.LM_HEAD, WeightRole.LINEAR, WeightRole.RESIDUAL, WeightRole.EMBEDDING)
    found: dict[ir.Value, tuple[bool, WeightRole]] = {}
    uses = [(e.weight, True, WeightRole.EMBEDDING) for e in find_embeddings(graph)]
    uses += [(linear.weight, linear.transposed, linear.role) for linear in find_linears(graph)]
    for weight, outputs_first, role in uses:
        known = found.get(weight)
        if known is None or order.index(role) < order.index(known[1]):
            found[weight] = (outputs_first, role)
    return [(weight, *facts) for weight, facts in found.items()]


def _replace(graph: Graph, weight: ir.Value, scheme: EngineScheme, outputs_first: bool) -> int:
    """Put codes, scales and their product in the place of `weight`; bytes of both."""
    name, tensor, dtype = str(weight.name), cast(LazyWeight, weight.const_value), weight.dtype
    if tensor.rows is None or scheme.format not in _TYPES or dtype is None:
        raise UnsupportedError(
            f"weight {name} cannot be stored as {scheme.format.value}",
            hint="give it a rule with scheme: null",
        )
    outputs, inputs = tensor.rows.shape if outputs_first else tensor.rows.shape[::-1]
    block = inputs if scheme.block_size is None else scheme.block_size
    turned = scheme.block_size is None and _is_tied(weight)
    if inputs % block:
        fitting = [b for b in (128, 64, 32, 16) if inputs % b == 0]
        raise UnsupportedError(
            f"{scheme.format.value} by block of {block} needs input features divisible by {block}; "
            f"{name} has {inputs}",
            hint=f"use a block of {fitting[0]}" if fitting else "give it a rule with scheme: null",
        )
    if scheme.block_size is None:
        scale_shape: tuple[int, ...] = (outputs,)
    else:
        scale_shape = (outputs, inputs // block) if outputs_first else (inputs // block, outputs)
    compute = _Compute(tensor.rows, scheme, outputs_first, dtype, name, turned)
    group = WeightGroup(tensor.rows.sources, compute)
    codes_shape = tensor.rows.shape[::-1] if turned else tensor.rows.shape
    members = {"codes": (_TYPES[scheme.format], codes_shape), "scales": (dtype, scale_shape)}
    values, size = [], 0
    for key, (kind, shape) in members.items():
        lazy = LazyWeight(name=f"{name}.{key}", dtype=kind, shape=shape, group=group, key=key)
        value = ir.Value(name=lazy.name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=lazy)
        graph.graph.register_initializer(value)
        values.append(value)
        size += lazy.nbytes
    channel, features = (0, 1) if outputs_first != turned else (1, 0)
    attributes = {"axis": channel} if scheme.block_size is None else {"axis": features, "block_size": block}
    made = ir.Node(
        "",
        "DequantizeLinear",
        values,
        ir.convenience.convert_attributes(attributes),
        name=f"{name}/dequantized",
    )
    made.outputs[0].name = f"{name}.dequantized"
    made.outputs[0].shape, made.outputs[0].type = ir.Shape(codes_shape), weight.type
    graph.graph.insert_before(next(iter(graph.graph)), made)
    if turned:
        _turn(graph.graph, weight, made.outputs[0])
    else:
        ir.convenience.replace_all_uses_with(weight, made.outputs[0])
    del graph.graph.initializers[name]
    return size


def _is_tied(weight: ir.Value) -> bool:
    """Whether rows are looked up in a matrix that products take transposed."""
    users = [user for user, _ in weight.uses()]
    rows = all(user.attributes.get_int("axis", 0) == 0 for user in users if user.op_type == "Gather")
    return rows and {user.op_type for user in users} == {"Gather", "Transpose"}


def _turn(graph: ir.Graph, weight: ir.Value, turned: ir.Value) -> None:
    """Let the products and lookups of `weight` (entries, width) take `turned` (width, entries)."""
    for user in {user: None for user, _ in weight.uses()}:
        if user.op_type == "Transpose":
            ir.convenience.replace_all_uses_with(user.outputs[0], turned)
            graph.remove(user, safe=True)
            continue
        ids = cast(ir.Value, user.inputs[1])
        shape = tuple(ids.shape or ())
        lookup = ir.node("Gather", [turned, ids], {"axis": 1}, name=f"{user.name}.columns")
        columns = lookup.outputs[0]
        columns.name, columns.type = f"{user.outputs[0].name}.columns", turned.type
        columns.shape = ir.Shape((weight.shape or ())[1:2] + shape)
        order = [*range(1, len(shape) + 1), 0]
        replace(graph, user, [lookup, ir.node("Transpose", [columns], {"perm": order})])


@dataclass(frozen=True)
class _Compute:
    """Codes and scales of one matrix, computed when it is written; `turned` stores the other axis first."""

    rows: Rows
    scheme: EngineScheme
    outputs_first: bool
    dtype: ir.DataType
    name: str
    turned: bool

    def __call__(self) -> Mapping[str, Array]:
        codes, scales = [], []
        block = self.scheme.block_size
        step = None if self.outputs_first else self.rows.shape[0]
        for start, stop in row_chunks(self.rows) if step is None else [(0, step)]:
            weights = self.rows.rows(start, stop).astype(np.float32)
            weights = weights if self.outputs_first else weights.T
            found, scale = encode(weights, self.scheme.format, block or weights.shape[1], self.dtype)
            if not np.isfinite(scale.astype(np.float32)).all():
                raise CheckpointError(
                    f"{self.name} has values in rows {start}:{stop} that are not finite, or too large for "
                    f"scales of type {self.dtype.name}",
                    hint="the checkpoint is damaged, or needs another type on this target",
                )
            codes.append(found)
            scales.append(scale if block is not None else scale[:, 0])
        all_codes, all_scales = np.concatenate(codes), np.concatenate(scales)
        if self.outputs_first == self.turned:
            all_codes, all_scales = all_codes.T, all_scales.T
        return {
            "codes": np.ascontiguousarray(all_codes).astype(_TYPES[self.scheme.format].numpy()),
            "scales": np.ascontiguousarray(all_scales),
        }


def encode(weights: Array, kind: WeightFormat, block: int, scale_type: ir.DataType) -> tuple[Array, Array]:
    """Codes and positive scales of a matrix, with least squared error among the scales that are tried.

    Args:
        weights: (outputs, inputs) float32; inputs are a multiple of `block`.

    Returns:
        Codes (outputs, inputs) int8 and scales (outputs, inputs / block) of `scale_type`.
    """
    outputs, inputs = weights.shape
    blocks = weights.reshape(outputs, inputs // block, block)
    low, high = _LOWEST[kind], _HIGHEST[kind]
    span = np.maximum(blocks.max(axis=2) / np.float32(high), blocks.min(axis=2) / np.float32(low))
    best, least = _stored(span, scale_type), np.full(span.shape, np.inf, np.float32)
    for part in _PARTS if kind is WeightFormat.INT4 else (1.0,):
        scale = _stored(span * np.float32(part), scale_type)
        codes = _round(blocks, scale, low, high)
        # The scale of least squared error for these codes, rounded as it is stored.
        gain = (blocks * codes).sum(axis=2) / np.maximum((codes * codes).sum(axis=2), np.float32(1))
        scale = np.where(gain > 0, _stored(gain, scale_type), scale)
        codes = _round(blocks, scale, low, high)
        error = np.square(blocks - codes * scale[..., None].astype(np.float32)).sum(axis=2)
        better = error < least
        np.copyto(best, scale, where=better)
        np.copyto(least, error, where=better)
    codes = _round(blocks, best, low, high)
    return codes.reshape(outputs, inputs).astype(np.int8), best


def _stored(scale: Array, scale_type: ir.DataType) -> Array:
    """Scales as they are stored; 1 for a block of zeros, whose codes are 0 whatever the scale."""
    with np.errstate(over="ignore"):
        stored: Array = scale.astype(scale_type.numpy())
    return np.where(stored == 0, stored.dtype.type(1), stored)


def _round(blocks: Array, scale: Array, low: int, high: int) -> Array:
    rounded: Array = np.rint(blocks / scale[..., None].astype(np.float32))
    return np.clip(rounded, low, high, out=rounded)
