"""Compare an artifact bit for bit with what a build produces: its tensors, and the nodes of its graph.

Builds are reproducible: tensors that are copied, folded or scaled, and codes of schemes without calibration,
depend on the checkpoint and the target alone. They are computed again, one group at a time, and compared with
the bytes of the files.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.artifact.manifest import MODEL
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Metric
from llmc.errors import ParityError
from llmc.graph.mapped import MappedPages
from llmc.graph.match import dims_of
from llmc.graph.weights import LazyWeight, Rows, WeightGroup, row_chunks
from llmc.validate.measure import measured, mismatches, unmeasured
from llmc.validate.reference import Advance, quietly
from llmc.validate.resemblance import find_strangers
from llmc.validate.stored import read_stored

_WHERE = "numpy, from the files"
#: Suffixes of the initializers that store a quantized matrix, after its name.
_PARTS = ("codes", "scales", "zero_points", "minimums", "packed", "whole")
#: The part of a constant's name that is a digest of its values.
_DIGEST = re.compile(r"_[0-9a-f]{12}(?![0-9a-f])")
#: Tolerance for the last digits of float32 tables, which differ between CPUs, relative to the largest number.
_ROUNDING = 2.0**-21
#: Maximum number of tensors and nodes that a report names.
_NAMED = 3


def open_model(folder: Path) -> ir.Model:
    """Open the graph of an artifact; its weights stay in their files.

    Raises:
        ParityError: The graph cannot be read.
    """
    try:
        return ir.load(folder / MODEL)
    except Exception as error:  # protobuf and onnx_ir raise many kinds of errors on a damaged file
        raise ParityError(f"{folder / MODEL} is not an ONNX model: {error}") from error


def measure_tensors(
    folder: Path,
    expected: ir.Graph,
    calibrated: Mapping[str, Rows],
    beside: Sequence[str] = (),
    advance: Advance = quietly,
) -> Measurement:
    """Measure WEIGHTS_EXACT: the number of weight tensors that differ from a build's, bit for bit.

    Args:
        expected: The graph as a backend writes it, with lazy weights.
        calibrated: Matrices whose codes cannot be computed here, with the rows that each is quantized from,
            by their initializers' names before quantization; they must be a rounding of these rows.
        beside: Errors of tensors in other files, a sentence each.
        advance: Called with the number of tensor computations done and their total.

    Raises:
        ParityError: The graph, or the data of a tensor, cannot be read.
    """
    graph = open_model(folder).graph
    stored = graph.initializers
    differences, pages = [*beside], MappedPages(graph)
    compared = len(differences)
    groups = list(_groups(expected, calibrated))
    for done, group in enumerate(groups, 1):
        for name, difference in _compare_group(group, stored):
            compared += 1
            pages.count(group.members[name].nbytes)
            if difference is not None:
                differences.append(f"{name} {difference}")
        advance(done, len(groups))
    differences += find_strangers(read_stored(folder, calibrated), calibrated)
    fine = f"{compared} tensors equal those of a build, bit for bit"
    detail = (
        fine
        if not differences
        else f"{len(differences)} of {compared + len(calibrated)} differ: {listed(differences)}"
    )
    if calibrated:
        detail += f"; {len(calibrated)} matrices, whose codes cannot be computed here, are compared by value"
    return measured(Metric.WEIGHTS_EXACT, float(len(differences)), detail, _WHERE)


def measure_graph(folder: Path, expected: ir.Model, otherwise: str | None) -> Measurement:
    """Measure GRAPH: the number of inputs, outputs, constants and nodes that differ from a build's.

    Args:
        otherwise: Why a build here may produce another graph; None where it produces the same.

    Raises:
        ParityError: The graph cannot be read.
    """
    stored = open_model(folder)
    differences = list(_graph_differences(stored, expected))
    if differences and otherwise is not None:
        detail = f"{otherwise}, so that graphs are not compared node by node; first {differences[0]}"
        return unmeasured(Metric.GRAPH, MeasurementStatus.NOT_APPLICABLE, detail, _WHERE)
    fine = f"{len(stored.graph)} nodes and their constants equal those of a build"
    return mismatches(Metric.GRAPH, differences, fine, _WHERE)


@dataclass(frozen=True)
class _Weights:
    """The lazy initializers that one computation produces, by name."""

    group: WeightGroup
    members: Mapping[str, LazyWeight]


def _groups(expected: ir.Graph, calibrated: Collection[str]) -> Iterator[_Weights]:
    members_by_group: dict[int, dict[str, LazyWeight]] = {}
    for name, value in expected.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, LazyWeight) and _stem(str(name)) not in calibrated:
            members_by_group.setdefault(id(tensor.group), {})[str(name)] = tensor
    for members in members_by_group.values():
        yield _Weights(next(iter(members.values())).group, members)


def _stem(name: str) -> str:
    """Return the name before quantization of the matrix that an initializer belongs to."""
    stem, _, part = name.rpartition(".")
    return stem.removesuffix(".T") if part in _PARTS else name


def _compare_group(group: _Weights, stored: Mapping[str, ir.Value]) -> Iterator[tuple[str, str | None]]:
    """Yield each member's name, and how the artifact's tensor differs from it; None if it does not."""
    rows = next(iter(group.members.values())).rows
    if rows is not None and len(group.members) == 1 and rows.dtype.bitwidth >= 8:
        for name, tensor in group.members.items():
            yield name, _compare_rows(rows, _data(name, tensor, stored))
        return
    computed = group.group.compute()
    for name, tensor in group.members.items():
        found = _data(name, tensor, stored)
        yield name, found if isinstance(found, str) else _difference(computed[tensor.key], _array(found))


def _data(name: str, tensor: ir.TensorProtocol, stored: Mapping[str, ir.Value]) -> ir.TensorProtocol | str:
    """Return the artifact's tensor, or why it cannot be a build's."""
    value = stored.get(name)
    found = None if value is None else value.const_value
    if found is None:
        return "is missing"
    if found.dtype != tensor.dtype or tuple(found.shape.numpy()) != tuple(tensor.shape.numpy()):
        shapes = [list(t.shape.numpy()) for t in (found, tensor)]
        return f"is {found.dtype.name} {shapes[0]}, not {tensor.dtype.name} {shapes[1]}"
    return found


def _array(tensor: ir.TensorProtocol) -> Array:
    """Return a tensor's elements, mapped from its file if it has one.

    Raises:
        ParityError: The elements lie beyond the end of the file.
    """
    try:
        return tensor.numpy()
    except Exception as error:  # onnx_ir and mmap raise several kinds on a damaged file
        raise ParityError(f"weight {tensor.name} cannot be read: {error}") from error


def _compare_rows(rows: Rows, stored: ir.TensorProtocol | str) -> str | None:
    if isinstance(stored, str):
        return stored
    actual = np.atleast_1d(_array(stored))
    count, first = 0, ""
    for start, stop in row_chunks(rows):
        expected = np.atleast_1d(rows.rows(start, stop))
        differs = differing(expected, actual[start:stop])
        if differs.any():
            first = first or first_place(differs, start)
            count += int(differs.sum())
    return describe_count(count, actual.size, first) if count else None


def _difference(expected: Array, actual: Array) -> str | None:
    if expected.shape != actual.shape:
        return f"is of shape {list(actual.shape)}, but {list(expected.shape)} in a build"
    differs = differing(np.atleast_1d(expected), np.atleast_1d(actual))
    return describe_count(int(differs.sum()), actual.size, first_place(differs, 0)) if differs.any() else None


def differing(expected: Array, actual: Array) -> Array:
    """Return which elements have different bits."""
    width = expected.dtype.itemsize
    bits = [np.ascontiguousarray(a).view(f"u{width}") for a in (expected, actual)]
    differs: Array = bits[0] != bits[1]
    return differs


def first_place(differs: Array, start: int) -> str:
    index = [int(i) for i in np.unravel_index(int(np.argmax(differs)), differs.shape)]
    return str([index[0] + start, *index[1:]])


def describe_count(count: int, size: int, first: str) -> str:
    return f"differs in {count:,} of {size:,} elements, first at {first}"


def _graph_differences(stored: ir.Model, expected: ir.Model) -> Iterator[str]:
    for kind, ours, theirs in (
        ("inputs", expected.graph.inputs, stored.graph.inputs),
        ("outputs", expected.graph.outputs, stored.graph.outputs),
    ):
        expected_values, actual = ([_signature(v) for v in values] for values in (ours, theirs))
        if expected_values != actual:
            here, there = listed(_apart(actual, expected_values)), listed(_apart(expected_values, actual))
            yield f"the {kind} are {here}, but {there} in a build"
    if stored.opset_imports != expected.opset_imports:
        yield f"opsets are {dict(stored.opset_imports)}, but {dict(expected.opset_imports)} in a build"
    if stored.functions.keys() != expected.functions.keys():
        yield f"the graph has functions of its own: {', '.join(map(str, stored.functions))}"
    constants = [_constants(model.graph) for model in (stored, expected)]
    for name in sorted(constants[0].keys() - constants[1].keys()):
        yield f"constant {name} does not exist in a build"
    yield from _node_differences(list(stored.graph), list(expected.graph), _weights(expected.graph))


def _weights(graph: ir.Graph) -> frozenset[str]:
    """Return the initializers that are computed from the checkpoint."""
    values = graph.initializers.items()
    return frozenset(str(name) for name, value in values if isinstance(value.const_value, LazyWeight))


def _constants(graph: ir.Graph) -> dict[str, ir.Value]:
    """Return initializers by their names without digests of their values."""
    return {_DIGEST.sub("", str(name)): value for name, value in graph.initializers.items()}


def _signature(value: ir.Value) -> str:
    kind = value.dtype.name if value.dtype is not None else "untyped"
    return f"{value.name} {kind} {dims_of(value)}"


def _apart(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Return what only `first` contains; all of it where only the order differs."""
    return [each for each in first if each not in second] or list(first)


def _node_differences(
    actual: Sequence[ir.Node], expected: Sequence[ir.Node], weights: frozenset[str]
) -> Iterator[str]:
    if len(actual) != len(expected):
        names = [{_title(node) for node in nodes} for nodes in (actual, expected)]
        added, missing = sorted(names[0] - names[1]), sorted(names[1] - names[0])
        yield (
            f"the graph has {len(actual)} nodes, but {len(expected)} in a build: "
            f"added {listed(added) or 'none'}; missing {listed(missing) or 'none'}"
        )
        return
    digests: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for one, other in zip(actual, expected, strict=True):
        facts, built = (
            _facts(node, names, weights) for node, names in zip((one, other), digests, strict=True)
        )
        if facts != built:
            key = next(key for key in {**built, **facts} if facts.get(key) != built.get(key))
            yield f"node {_title(other)}: {key} is {facts.get(key)}, but {built.get(key)} in a build"
            continue
        for index, pair in enumerate(zip(one.inputs, other.inputs, strict=True)):
            if (how := _constant_difference(*pair, weights)) is not None:
                yield f"node {_title(other)}: input {index} {how}"


def _constant_difference(
    actual: ir.Value | None, expected: ir.Value | None, weights: frozenset[str]
) -> str | None:
    """Describe how a constant differs from a build's; None if it is equal or not a constant."""
    if actual is None or expected is None or expected.const_value is None or expected.name in weights:
        return None
    if actual.const_value is None:
        return "has no data"
    ours, theirs = _array(expected.const_value), _array(actual.const_value)
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return f"is {theirs.dtype} {list(theirs.shape)}, but {ours.dtype} {list(ours.shape)} in a build"
    difference = _difference(ours, theirs)
    finite = np.issubdtype(ours.dtype, np.floating) and np.isfinite(ours).all() and np.isfinite(theirs).all()
    if difference is None or not finite:
        return difference
    apart = np.abs(ours.astype(np.float64) - theirs)
    return None if (apart <= _ROUNDING * np.abs(ours).max()).all() else difference


def _title(node: ir.Node) -> str:
    return f"{node.op_type} {node.name or (node.outputs[0].name if node.outputs else '')}"


def _facts(node: ir.Node, names: dict[str, str], weights: frozenset[str]) -> dict[str, str]:
    """Collect everything that a node states, by key.

    Args:
        names: Replacements for the digests in names, which depend on the last digits of constants.
    """

    def plain(value: ir.Value | None) -> str:
        if value is None:
            return ""
        if value.const_value is not None and value.name not in weights:
            return "a constant"
        return _DIGEST.sub(lambda match: names.setdefault(match[0], f"_{len(names)}"), str(value.name))

    facts = {
        "operator": f"{node.domain}::{node.op_type}",
        "inputs": ", ".join(map(plain, node.inputs)),
        "outputs": ", ".join(map(plain, node.outputs)),
    }
    facts |= {name: _attribute(attribute) for name, attribute in node.attributes.items()}
    return facts | {key: value for key, value in node.metadata_props.items() if key.startswith("llmc.")}


def _attribute(attribute: Any) -> str:
    """Return a value as it is read back: numbers with the digits of float32."""
    value = attribute.value
    if isinstance(value, float):
        return str(np.float32(value))
    if attribute.type is ir.AttributeType.FLOATS:
        return str([str(np.float32(v)) for v in value])
    if isinstance(value, ir.TensorProtocol):
        return f"{value.dtype.name} {list(value.shape.numpy())} {_array(value).tobytes().hex()}"
    if isinstance(value, ir.Graph):
        return "; ".join(str(_facts(node, {}, frozenset())) for node in value)
    return str(value)


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return "; ".join(names[:_NAMED]) + more
