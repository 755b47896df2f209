"""Quantize matrices and activations to types that products are computed in, for TensorRT and for servers.

The graph gets ONNX QuantizeLinear and DequantizeLinear around products, as TensorRT reads them. TensorRT
computes a product from the codes of its weight, and also from the codes of its activation if that is
converted to the same type and back. int8 and fp8 activations have one scale, decided on calibration text.
NVFP4 activations are quantized by block at run time, by TensorRT's own operator trt::TRT_FP4DynamicQuantize.
A matrix that is embedding and language-model head at once is stored once for both: TensorRT's int8 products
need it as (in_features, out_features), and would keep a second copy for a lookup of its rows, so the lookup
reads columns.

A checkpoint for servers takes codes and scales from the same graph (`for_servers`). Servers join products
that read the same activation, and keep one scale of a whole matrix for all of them, so that it is shared.
They quantize activations themselves, by the scale that `CodedAs` states. A product whose activation stays in
float keeps its weight in float.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import cached_property
from typing import cast

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.config import EngineRule, EngineScheme, WeightFormat, WeightRole
from llmc.errors import CheckpointError, UnsupportedError
from llmc.graph.domains import DYNAMIC_QUANTIZE, TENSORRT
from llmc.graph.edit import Site, add_initializer, replace_node, set_value
from llmc.graph.linear import find_embeddings, find_linears
from llmc.graph.match import lazy_of
from llmc.graph.model import Graph
from llmc.graph.weights import LazyWeight, Rows, WeightGroup, row_chunks
from llmc.quantize.activations import InputRange, quantized_products
from llmc.quantize.expert_inputs import ExpertRange
from llmc.quantize.fold import SharedInput, find_shared_inputs
from llmc.quantize.formats import (
    NVFP4_BLOCK,
    TYPES,
    ActivationScale,
    encode,
    encode_whole,
    served_whole_scale,
    tensor_scale,
    whole_scale,
)
from llmc.quantize.place import CODED_AS, CodedAs, QuantizedTensor, choose_scheme
from llmc.quantize.quantizer import FloatInput
from llmc.quantize.stored import MADE_FLOATS, is_stored


def quantize_for_engine(
    graph: Graph,
    rules: Sequence[EngineRule],
    ranges: Mapping[str, InputRange] | None,
    least_activation_db: float | None = None,
    *,
    for_servers: bool = False,
) -> tuple[tuple[QuantizedTensor, ...], tuple[FloatInput, ...]]:
    """Quantize matrices and activations of `graph` by the target's rules; data is read when it is written.

    Args:
        ranges: The calibrated ranges, by the first of the weights that read an activation. With None only the
            graph's form is right: every activation that rules name is quantized, with a range of 1.
        least_activation_db: Minimum signal-to-noise ratio; activations below it stay in float.
        for_servers: Whether servers quantize the activations, and the weights are for them.

    Returns:
        Every matrix, and the activations that stay in float against their rule.

    Raises:
        UnsupportedError: A matrix cannot be stored as its rule says.
    """
    floats: list[FloatInput] = []
    unquantized: set[ir.Value] = set()
    input_scales: dict[ir.Value, float] = {}
    peers: dict[ir.Value, Peers] = {}
    for shared in find_shared_inputs(graph):
        if for_servers:
            peers.update(_find_peers(shared, rules))
        kind, linears = quantized_products(shared, rules)
        if kind is None:
            continue
        quantized = changed(shared, linears=linears)
        calibrated = InputRange(1.0, None, 0.0) if ranges is None else ranges.get(quantized.sources[0])
        stays = None if ranges is None else why_float(calibrated, kind, least_activation_db)
        if calibrated is None or stays is not None:
            floats.append(FloatInput(quantized.sources[0], stays or ""))
            unquantized.update(linear.weight for linear in linears if for_servers)
        elif not for_servers:
            _quantize_input(graph.graph, quantized, ActivationScale(kind, calibrated.peak))
        else:
            stated = float(ActivationScale(kind, calibrated.peak).stored(ir.DataType.FLOAT))
            input_scales.update(dict.fromkeys((linear.weight for linear in linears), stated))
    stored = []
    for weight, outputs_first, role in _find_matrices(graph):
        tensor = lazy_of(weight)
        shape = tuple(tensor.shape.numpy())
        name = str(weight.name)
        scheme = None if weight in unquantized else choose_scheme(rules, role, name)
        size = tensor.nbytes
        if scheme is not None:
            scale = input_scales.get(weight) if scheme.needs_range else None
            size = _replace(graph, weight, scheme, outputs_first, peers.get(weight), scale)
        origin = None
        if tensor.rows is not None and is_stored(tensor.rows):
            origin = MADE_FLOATS if scheme is None else "quantized again (its types have grids of their own)"
        stored.append(QuantizedTensor(name, role, shape, scheme, size, origin))
    return tuple(stored), tuple(floats)


def why_float(
    calibrated: InputRange | ExpertRange | None, kind: WeightFormat, least_db: float | None
) -> str | None:
    """Return why an activation stays in float; None if it can be quantized."""
    if calibrated is None:
        return "calibration did not see its input"
    if least_db is not None and calibrated.snr_db < least_db:
        return f"{calibrated.snr_db:.1f} dB as {kind.value}, less than {least_db:g}"
    return None


def _find_peers(shared: SharedInput, rules: Sequence[EngineRule]) -> Iterator[tuple[ir.Value, "Peers"]]:
    """Yield each weight that reads an activation, with all those that have its scheme."""
    by_scheme: dict[EngineScheme, list[ir.Value]] = {}
    for linear in shared.linears:
        scheme = choose_scheme(rules, linear.role, str(linear.weight.name))
        if scheme is not None:
            by_scheme.setdefault(scheme, []).append(linear.weight)
    for weights in by_scheme.values():
        rows = [lazy_of(weight).rows for weight in weights]
        together = Peers(tuple(each for each in rows if each is not None), for_servers=True)
        yield from ((weight, together) for weight in weights)


@dataclass(frozen=True, eq=False)
class Peers:
    """Matrices that have one scale for all of their weights together.

    Args:
        for_servers: Whether that scale is for servers.
    """

    rows: tuple[Rows, ...]
    for_servers: bool = False

    @cached_property
    def peak(self) -> float:
        """The largest magnitude of a weight."""
        return max(
            float(np.abs(rows.rows(start, stop).astype(np.float32)).max())
            for rows in self.rows
            for start, stop in row_chunks(rows)
        )


def _quantize_input(graph: ir.Graph, shared: SharedInput, scale: ActivationScale) -> None:
    """Let products read their activation through quantization and dequantization."""
    value, first = shared.value, shared.linears[0].node
    shape = tuple(value.shape or ())
    if value.dtype is None:
        raise UnsupportedError(f"activation {value.name} has no element type")
    name, kind = f"{value.name}.{scale.kind.value}", TYPES[scale.kind]
    stored = add_initializer(
        graph, ir.tensor(scale.stored(value.dtype), dtype=value.dtype, name=f"{name}.scale")
    )
    site = Site(graph, first)
    if scale.kind is WeightFormat.NVFP4:
        fine = (*shape[:-1], cast(int, shape[-1]) // NVFP4_BLOCK)
        blocks = {"axis": -1, "block_size": NVFP4_BLOCK}
        codes, parts = site.emit(
            DYNAMIC_QUANTIZE,
            [value, stored],
            f"{name}.codes",
            domain=TENSORRT,
            attributes={**blocks, "scale_type": int(ir.DataType.FLOAT8E4M3FN)},
            shape=shape,
            dtype=kind,
            outputs=2,
            node_name=f"{name}/{DYNAMIC_QUANTIZE}_0",
        ).outputs
        scales = site.emit(
            "DequantizeLinear",
            [set_value(parts, f"{name}.parts", fine, ir.DataType.FLOAT8E4M3FN), stored],
            f"{name}.scales",
            shape=fine,
            dtype=value.dtype,
            node_name=f"{name}/DequantizeLinear_1",
        )
        result = site.emit(
            "DequantizeLinear",
            [codes, scales.outputs[0]],
            f"{name}.dequantized",
            attributes=blocks,
            like=value,
            node_name=f"{name}/DequantizeLinear_2",
        )
    else:
        zero = add_initializer(
            graph, ir.tensor(np.zeros((), kind.numpy()), dtype=kind, name=f"{name}.zero_point")
        )
        quantized = site.emit(
            "QuantizeLinear",
            [value, stored, zero],
            f"{name}.codes",
            shape=shape,
            dtype=kind,
            node_name=f"{name}/QuantizeLinear_0",
        )
        result = site.emit(
            "DequantizeLinear",
            [quantized.outputs[0], stored, zero],
            f"{name}.dequantized",
            like=value,
            node_name=f"{name}/DequantizeLinear_1",
        )
    for linear in shared.linears:
        linear.node.replace_input_with(0, result.outputs[0])


def _find_matrices(graph: Graph) -> list[tuple[ir.Value, bool, WeightRole]]:
    """Return each matrix once: its initializer, whether outputs are its first axis, and its role.

    A matrix with several uses has the role that comes first among head, linear, residual and embedding.
    """
    order = (WeightRole.LM_HEAD, WeightRole.LINEAR, WeightRole.RESIDUAL, WeightRole.EMBEDDING)
    found: dict[ir.Value, tuple[bool, WeightRole]] = {}
    uses = [(e.weight, True, WeightRole.EMBEDDING) for e in find_embeddings(graph)]
    uses += [(linear.weight, linear.transposed, linear.role) for linear in find_linears(graph)]
    for weight, outputs_first, role in uses:
        previous = found.get(weight)
        if previous is None or order.index(role) < order.index(previous[1]):
            found[weight] = (outputs_first, role)
    return [(weight, *facts) for weight, facts in found.items()]


def _replace(
    graph: Graph,
    weight: ir.Value,
    scheme: EngineScheme,
    outputs_first: bool,
    peers: Peers | None,
    input_scale: float | None,
) -> int:
    """Replace `weight` by codes, scales and their product; return the bytes of codes and scales.

    Args:
        peers: Matrices with which it shares the scale of a whole matrix; None for its own.
        input_scale: Scale by which a server quantizes its activation; None if there is none.
    """
    name, tensor, dtype = str(weight.name), lazy_of(weight), weight.dtype
    if tensor.rows is None or dtype is None:
        raise UnsupportedError(
            f"weight {name} is computed from {', '.join(tensor.sources)}, and only tensors of the checkpoint "
            f"can be stored as {scheme.format.value}",
            hint="give it a rule with scheme: null",
        )
    outputs, inputs = tensor.rows.shape if outputs_first else tensor.rows.shape[::-1]
    step = block_of(scheme)
    block = inputs if step is None else step
    transposed = step is None and _is_tied(weight)
    if inputs % block:
        fitting = [b for b in (128, 64, 32, 16) if inputs % b == 0]
        raise UnsupportedError(
            f"{scheme.format.value} by block of {block} needs input features divisible by {block}; "
            f"{name} has {inputs}",
            hint=f"use a block of {fitting[0]}" if fitting else "give it a rule with scheme: null",
        )
    if scheme.scale_per == "tensor":
        scale_shape: tuple[int, ...] = ()
    elif step is None:
        scale_shape = (outputs,)
    else:
        scale_shape = (outputs, inputs // block) if outputs_first else (inputs // block, outputs)
    peers = peers or Peers((tensor.rows,))
    compute = _Compute(tensor.rows, scheme, outputs_first, dtype, name, transposed, peers)
    group = WeightGroup(tensor.rows.sources, compute)
    codes_shape = tensor.rows.shape[::-1] if transposed else tensor.rows.shape
    whole = scheme.format is WeightFormat.NVFP4
    members: dict[str, tuple[ir.DataType, tuple[int, ...]]] = {
        "codes": (TYPES[scheme.format], codes_shape),
        "scales": (ir.DataType.FLOAT8E4M3FN if whole else dtype, scale_shape),
        **({"whole": (dtype, ())} if whole else {}),
    }
    values, size = {}, 0
    for key, (kind, shape) in members.items():
        lazy = LazyWeight(name=f"{name}.{key}", dtype=kind, shape=shape, group=group, key=key)
        values[key] = add_initializer(graph.graph, lazy)
        size += lazy.nbytes
    shape = (outputs, inputs)
    values["codes"].meta[CODED_AS] = CodedAs(scheme, shape, outputs_first != transposed, input_scale)
    before = next(iter(graph.graph))
    scales = values["scales"]
    if whole:
        scales = _dequantize(
            graph.graph, before, [scales, values["whole"]], {}, f"{name}.scales", dtype, scale_shape
        )
    channel, features = (0, 1) if outputs_first != transposed else (1, 0)
    attributes = {"axis": channel} if step is None else {"axis": features, "block_size": block}
    if not scale_shape:
        attributes = {}
    product = _dequantize(
        graph.graph, before, [values["codes"], scales], attributes, name, dtype, codes_shape
    )
    if transposed:
        _turn(graph.graph, weight, product)
    else:
        ir.convenience.replace_all_uses_with(weight, product)
    del graph.graph.initializers[name]
    return size


def _dequantize(
    graph: ir.Graph,
    before: ir.Node,
    inputs: Sequence[ir.Value],
    attributes: Mapping[str, int],
    name: str,
    dtype: ir.DataType,
    shape: tuple[int, ...],
) -> ir.Value:
    made = Site(graph, before, metadata={}).emit(
        "DequantizeLinear",
        inputs,
        f"{name}.dequantized",
        attributes=attributes,
        shape=shape,
        dtype=dtype,
        node_name=f"{name}/dequantized",
    )
    return made.outputs[0]


def block_of(scheme: EngineScheme) -> int | None:
    """Return how many input features share a scale; None if all features of an output share one."""
    return NVFP4_BLOCK if scheme.format is WeightFormat.NVFP4 else scheme.block_size


def _is_tied(weight: ir.Value) -> bool:
    """Return whether rows are looked up in a matrix that products read transposed."""
    users = weight.consumers()
    rows = all(user.attributes.get_int("axis", 0) == 0 for user in users if user.op_type == "Gather")
    return rows and {user.op_type for user in users} == {"Gather", "Transpose"}


def _turn(graph: ir.Graph, weight: ir.Value, turned: ir.Value) -> None:
    """Let the products and lookups of `weight` (entries, width) read `turned` (width, entries)."""
    for user in weight.consumers():
        if user.op_type == "Transpose":
            ir.convenience.replace_all_uses_with(user.outputs[0], turned)
            graph.remove(user, safe=True)
            continue
        ids = cast(ir.Value, user.inputs[1])
        shape = tuple(ids.shape or ())
        lookup = ir.node("Gather", [turned, ids], {"axis": 1}, name=f"{user.name}.columns")
        dims = (weight.shape or ())[1:2] + shape
        columns = set_value(lookup.outputs[0], f"{user.outputs[0].name}.columns", dims, turned.dtype)
        order = [*range(1, len(shape) + 1), 0]
        replace_node(graph, user, [lookup, ir.node("Transpose", [columns], {"perm": order})])


@dataclass(frozen=True)
class _Compute:
    """The codes and scales of one matrix, computed on writing; `turned` stores the other axis first."""

    rows: Rows
    scheme: EngineScheme
    outputs_first: bool
    dtype: ir.DataType
    name: str
    turned: bool
    peers: Peers

    def __call__(self) -> Mapping[str, Array]:
        codes, scales = [], []
        block = block_of(self.scheme)
        chunks = list(row_chunks(self.rows)) if self.outputs_first else [(0, self.rows.shape[0])]
        if self.scheme.scale_per == "tensor":
            return self._with_one_scale(chunks)
        whole = None
        if self.scheme.format is WeightFormat.NVFP4:
            peak = self.peers.peak
            whole = served_whole_scale(peak) if self.peers.for_servers else whole_scale(peak, self.dtype)
        for start, stop in chunks:
            weights = self._read(start, stop)
            block_codes, scale = encode(
                weights, self.scheme.format, block or weights.shape[1], self.dtype, whole
            )
            if not np.isfinite(scale.astype(np.float32)).all():
                raise CheckpointError(
                    f"{self.name} has values in rows {start}:{stop} that are not finite, or too large for "
                    f"scales of type {self.dtype.name}",
                    hint="the checkpoint is damaged, or needs another type on this target",
                )
            codes.append(block_codes)
            scales.append(scale if block is not None else scale[:, 0])
        all_codes, all_scales = np.concatenate(codes), np.concatenate(scales)
        if self.outputs_first == self.turned:
            all_codes, all_scales = all_codes.T, all_scales.T
        members = {"codes": np.ascontiguousarray(all_codes), "scales": np.ascontiguousarray(all_scales)}
        return members if whole is None else {**members, "whole": whole}

    def _with_one_scale(self, chunks: Sequence[tuple[int, int]]) -> Mapping[str, Array]:
        """Return the codes, and their one scale."""
        scale = tensor_scale(self.peers.peak, self.scheme.format)
        codes = np.concatenate([encode_whole(self._read(*c), self.scheme.format, scale) for c in chunks])
        if self.outputs_first == self.turned:
            codes = codes.T
        return {"codes": np.ascontiguousarray(codes), "scales": scale}

    def _read(self, start: int, stop: int) -> Array:
        weights: Array = self.rows.rows(start, stop).astype(np.float32)
        return weights if self.outputs_first else weights.T
