"""Quantize the matrices of experts for servers, which read each as a linear layer of its own.

A graph has them stacked, (experts, outputs, inputs), as transformers does. Their codes are computed expert by
expert when a checkpoint is written. Gate and up of an expert share the scale of a whole matrix where a type
has one, since servers join the two: of two such scales of NVFP4, vLLM 0.32 keeps the first, and of fp8 the
larger, for which it rounds again (`quantization/modelopt.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.config import EngineRule, EngineScheme, WeightFormat, WeightRole, WeightRule, WeightScheme
from llmc.errors import CheckpointError
from llmc.graph import dialect
from llmc.graph.domains import DIALECT
from llmc.graph.linear import is_weight
from llmc.graph.match import behind, find_nodes, lazy_of
from llmc.graph.model import Graph
from llmc.graph.weights import Rows, row_chunks
from llmc.quantize.blocks import stored_bytes
from llmc.quantize.calibrate_experts import CalibratedExperts
from llmc.quantize.engine import Peers, block_of, why_float
from llmc.quantize.expert_inputs import ExpertInput, ExpertRange
from llmc.quantize.formats import ActivationScale, encode, encode_whole, served_whole_scale, tensor_scale
from llmc.quantize.place import EXPERTS_AS, ExpertsAs, QuantizedTensor, choose_scheme
from llmc.quantize.quantizer import FloatInput
from llmc.quantize.stored import MADE_FLOATS, is_stored

#: Bytes of a stored scale of a block, of an NVFP4 block, and of an output or a matrix.
_SCALE_BYTES = {"block": 2, "nvfp4": 1, "output": 4}

Rules = Sequence[WeightRule] | Sequence[EngineRule]


def expert_layers(graph: Graph) -> Iterator[list[ir.Value]]:
    """Yield the stacked matrices of each layer of experts, in graph order."""
    for node in find_nodes(graph.graph, dialect.EXPERTS, DIALECT):
        found = []
        for value in node.inputs:
            weight = None if value is None else behind(value, "Transpose")
            if weight is not None and is_weight(weight) and len(weight.shape or ()) == 3:
                found.append(weight)
        yield found


def find_experts(graph: Graph) -> Iterator[ir.Value]:
    """Yield the stacked matrices of every layer of experts, in graph order."""
    for weights in expert_layers(graph):
        yield from weights


def plan_expert_inputs(graph: Graph, rules: Sequence[EngineRule]) -> tuple[ExpertInput, ...]:
    """Plan the stacks of experts whose activations have a range from calibration, in graph order."""
    plans = []
    for weight in find_experts(graph):
        scheme = scheme_of_experts(rules, str(weight.name))
        if isinstance(scheme, EngineScheme) and scheme.needs_range:
            plans.append(ExpertInput(lazy_of(weight).sources[0], scheme.format))
    return tuple(plans)


def plan_expert_codes(graph: Graph, rules: Rules) -> dict[str, WeightScheme]:
    """Return the scheme of each stack of experts whose codes are calibrated, by the stacked parameter."""
    schemes = {}
    for weight in find_experts(graph):
        scheme = scheme_of_experts(rules, str(weight.name))
        if isinstance(scheme, WeightScheme) and _is_calibrated(scheme):
            schemes[lazy_of(weight).sources[0]] = scheme
    return schemes


def _is_calibrated(scheme: WeightScheme | EngineScheme) -> bool:
    return isinstance(scheme, WeightScheme) and scheme.method.needs_calibration


def mark_experts(
    graph: Graph,
    rules: Rules,
    ranges: Mapping[str, ExpertRange] | None = None,
    least_activation_db: float | None = None,
    codes: CalibratedExperts | None = None,
) -> tuple[tuple[QuantizedTensor, ...], tuple[FloatInput, ...]]:
    """Note in `graph` how the rules store its experts.

    Args:
        ranges: The calibrated ranges, by the stacked parameter; None where they are not known, and a range of
            1 stands for each.
        least_activation_db: Minimum signal-to-noise ratio; the experts of a layer stay in float if what they
            read is below it.
        codes: Matrices that were quantized on calibration text; None where there are none, or they are not
            known.

    Returns:
        The record of each stack, and the stacks that stay in float against their rule.
    """
    records, floats = [], []
    for weights in expert_layers(graph):
        schemes = [scheme_of_experts(rules, str(weight.name)) for weight in weights]
        names = [lazy_of(weight).sources[0] for weight in weights]
        for name, scheme in zip(names, schemes, strict=True):
            if ranges is None or not isinstance(scheme, EngineScheme) or not scheme.needs_range:
                continue
            reason = why_float(ranges.get(name), scheme.format, least_activation_db)
            if reason is not None:
                floats.append(FloatInput(name, reason))
                schemes = [None] * len(weights)
        for weight, name, scheme in zip(weights, names, schemes, strict=True):
            peak = 1.0 if ranges is None or name not in ranges else ranges[name].peak
            weight.meta[EXPERTS_AS] = None
            if scheme is not None:
                stored = ExpertsAs(scheme, _input_scale(scheme, peak), _is_calibrated(scheme))
                if codes is not None:
                    stored = replace(stored, codes=partial(codes.blocks, name))
                weight.meta[EXPERTS_AS] = stored
            records.append(_record(weight, scheme))
    return tuple(records), tuple(floats)


def _record(weight: ir.Value, scheme: WeightScheme | EngineScheme | None) -> QuantizedTensor:
    tensor = lazy_of(weight)
    shape = tuple(tensor.shape.numpy())
    origin = None
    if tensor.rows is not None and is_stored(tensor.rows):
        origin = MADE_FLOATS if scheme is None else "quantized again (expert by expert)"
    size = tensor.nbytes if scheme is None else _bytes(shape, scheme)
    return QuantizedTensor(str(weight.name), WeightRole.EXPERTS, shape, scheme, size, origin)


def _input_scale(scheme: WeightScheme | EngineScheme, peak: float) -> float | None:
    if isinstance(scheme, WeightScheme) or not scheme.needs_range:
        return None
    return float(ActivationScale(scheme.format, peak).stored(ir.DataType.FLOAT))


def scheme_of_experts(rules: Rules, name: str) -> WeightScheme | EngineScheme | None:
    """Return the scheme that rules give a stack of experts; None if it stays in float."""
    return choose_scheme(rules, WeightRole.EXPERTS, name)  # type: ignore[misc]


def encode_expert(rows: Rows, scheme: EngineScheme, joined: Sequence[Rows], name: str) -> tuple[Array, ...]:
    """Return the codes (N, K) of one expert's matrix, its scales, and for NVFP4 the scale of them all.

    Args:
        joined: The matrices that servers join with it, itself among them: they share a scale of the whole.

    Raises:
        CheckpointError: A value is not finite.
    """
    together = Peers(tuple(joined), for_servers=True)
    if scheme.scale_per == "tensor":
        scale = tensor_scale(together.peak, scheme.format)
        _require_finite(scale, name)
        parts = [encode_whole(_read(rows, *chunk), scheme.format, scale) for chunk in row_chunks(rows)]
        return np.concatenate(parts), scale.reshape(1, 1)
    whole = served_whole_scale(together.peak) if scheme.format is WeightFormat.NVFP4 else None
    kind = ir.DataType.BFLOAT16 if scheme.format is WeightFormat.INT4 else ir.DataType.FLOAT
    block = block_of(scheme) or rows.shape[1]
    encoded = [encode(_read(rows, *chunk), scheme.format, block, kind, whole) for chunk in row_chunks(rows)]
    codes, scales = (np.concatenate(each) for each in zip(*encoded, strict=True))
    _require_finite(scales, name)
    if whole is None:
        return codes, scales
    _require_finite(whole, name)
    return codes, scales, whole


def _read(rows: Rows, start: int, stop: int) -> Array:
    weights: Array = rows.rows(start, stop).astype(np.float32)
    return weights


def _require_finite(scales: Array, name: str) -> None:
    if not np.isfinite(scales.astype(np.float32)).all():
        raise CheckpointError(
            f"{name} has values that are not finite, or too large for its scales",
            hint="the checkpoint is damaged, or needs another type on this target",
        )


def _bytes(shape: tuple[int, ...], scheme: WeightScheme | EngineScheme) -> int:
    experts, outputs, inputs = shape
    if isinstance(scheme, WeightScheme):
        return experts * stored_bytes((outputs, inputs), scheme, _SCALE_BYTES["block"])
    block, whole = block_of(scheme), 0
    per_output = inputs * scheme.bits // 8
    if scheme.scale_per == "tensor":
        whole = _SCALE_BYTES["output"]
    elif block is None:
        per_output += _SCALE_BYTES["output"]
    else:
        is_nvfp4 = scheme.format is WeightFormat.NVFP4
        per_output += inputs // block * _SCALE_BYTES["nvfp4" if is_nvfp4 else "block"]
        whole = _SCALE_BYTES["output"] if is_nvfp4 else 0
    return experts * (outputs * per_output + whole)
