"""What an artifact stores against what a build gives, bit for bit: its tensors, and the nodes of its graph.

Builds are reproducible: tensors that are copied, folded or scaled, and codes of schemes without calibration,
depend on the checkpoint and the target alone. They are computed again, one group at a time, and held to the
bytes of the files.
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

_WHERE = "numpy, from the files"
#: Endings of the initializers that hold a quantized matrix, after its name.
_PARTS = ("codes", "scales", "zero_points", "minimums", "packed", "whole")
#: Part of the name of a constant that is a digest of its values.
_DIGEST = re.compile(r"_[0-9a-f]{12}(?![0-9a-f])")
#: Last digits of float32 tables that differ between CPUs, as a part of the largest number.
_ROUNDING = 2.0**-21
#: Tensors and nodes that are named in a report.
_NAMED = 3


def open_model(folder: Path) -> ir.Model:
    """The graph of an artifact, its weights still in their files.

    Raises:
        ParityError: It cannot be read.
    """
    try:
        return ir.load(folder / MODEL)
    except Exception as error:  # protobuf and onnx_ir raise whatever they do on a damaged file
        raise ParityError(f"{folder / MODEL} is not an ONNX model: {error}") from error


def measure_tensors(
    folder: Path,
    expected: ir.Graph,
    calibrated: Mapping[str, Rows],
    beside: Sequence[str] = (),
    advance: Advance = quietly,
) -> Measurement:
    """WEIGHTS_EXACT: how many tensors of weights are not what a build gives, bit for bit.

    Args:
        expected: The graph as a backend writes it, with lazy weights.
        calibrated: Matrices whose codes are not known here, with what each is made of, by their initializers'
            names before quantization; they must be a rounding of that.
        beside: What is wrong with tensors in other files, a sentence each.
        advance: Told how many computations of tensors of how many are done.

    Raises:
        ParityError: The graph, or the data of a tensor, cannot be read.
    """
    graph = open_model(folder).graph
    stored = graph.initializers
    found, pages = [*beside], MappedPages(graph)
    compared = len(found)
    groups = list(_groups(expected, calibrated))
    for done, group in enumerate(groups, 1):
        for name, difference in _compare_group(group, stored):
            compared += 1
            pages.count(group.members[name].nbytes)
            if difference is not None:
                found.append(f"{name} {difference}")
        advance(done, len(groups))
    found += find_strangers(folder, calibrated)
    fine = f"{compared} tensors are what a build gives, bit for bit"
    detail = fine if not found else f"{len(found)} of {compared + len(calibrated)} differ: {_listed(found)}"
    if calibrated:
        detail += f"; {len(calibrated)} matrices, whose codes are not known here, are held to their values"
    return measured(Metric.WEIGHTS_EXACT, float(len(found)), detail, _WHERE)


def measure_graph(folder: Path, expected: ir.Model, otherwise: str | None) -> Measurement:
    """GRAPH: how many inputs, outputs, constants and nodes are not what a build gives.

    Args:
        otherwise: Why a build here may give another graph; None where it gives the same.

    Raises:
        ParityError: The graph cannot be read.
    """
    stored = open_model(folder)
    found = list(_graph_differences(stored, expected))
    if found and otherwise is not None:
        detail = f"{otherwise}, so that graphs are not compared node by node; first {found[0]}"
        return unmeasured(Metric.GRAPH, MeasurementStatus.NOT_APPLICABLE, detail, _WHERE)
    fine = f"{len(stored.graph)} nodes and their constants are what a build gives"
    return mismatches(Metric.GRAPH, found, fine, _WHERE)


@dataclass(frozen=True)
class _Weights:
    """Lazy initializers that one computation gives, by name."""

    group: WeightGroup
    members: Mapping[str, LazyWeight]


def _groups(expected: ir.Graph, calibrated: Collection[str]) -> Iterator[_Weights]:
    known: dict[int, dict[str, LazyWeight]] = {}
    for name, value in expected.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, LazyWeight) and _stem(str(name)) not in calibrated:
            known.setdefault(id(tensor.group), {})[str(name)] = tensor
    for members in known.values():
        yield _Weights(next(iter(members.values())).group, members)


def _stem(name: str) -> str:
    """The name before quantization of what an initializer belongs to."""
    stem, _, part = name.rpartition(".")
    return stem.removesuffix(".T") if part in _PARTS else name


def _compare_group(group: _Weights, stored: Mapping[str, ir.Value]) -> Iterator[tuple[str, str | None]]:
    """Each member's name, and how the artifact's tensor differs from it; None if it does not."""
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
    """The artifact's tensor, or why it cannot be that of a build."""
    value = stored.get(name)
    found = None if value is None else value.const_value
    if found is None:
        return "is missing"
    if found.dtype != tensor.dtype or tuple(found.shape.numpy()) != tuple(tensor.shape.numpy()):
        shapes = [list(t.shape.numpy()) for t in (found, tensor)]
        return f"is {found.dtype.name} {shapes[0]} in the place of {tensor.dtype.name} {shapes[1]}"
    return found


def _array(tensor: ir.TensorProtocol) -> Array:
    """A tensor's elements, mapped from its file where it has one.

    Raises:
        ParityError: They lie beyond the end of the file.
    """
    try:
        return tensor.numpy()
    except Exception as error:  # onnx_ir and mmap raise several kinds on a damaged file
        raise ParityError(f"weight {tensor.name} cannot be read: {error}") from error


def _compare_rows(rows: Rows, found: ir.TensorProtocol | str) -> str | None:
    if isinstance(found, str):
        return found
    actual = np.atleast_1d(_array(found))
    count, first = 0, ""
    for start, stop in row_chunks(rows):
        wanted = np.atleast_1d(rows.rows(start, stop))
        differs = _differing(wanted, actual[start:stop])
        if differs.any():
            first = first or _place(differs, start)
            count += int(differs.sum())
    return _described(count, actual.size, first) if count else None


def _difference(wanted: Array, actual: Array) -> str | None:
    if wanted.shape != actual.shape:
        return f"is of shape {list(wanted.shape)} by a build, and {list(actual.shape)}"
    differs = _differing(np.atleast_1d(wanted), np.atleast_1d(actual))
    return _described(int(differs.sum()), actual.size, _place(differs, 0)) if differs.any() else None


def _differing(wanted: Array, actual: Array) -> Array:
    """Which elements have other bits."""
    width = wanted.dtype.itemsize
    bits = [np.ascontiguousarray(a).view(f"u{width}") for a in (wanted, actual)]
    differs: Array = bits[0] != bits[1]
    return differs


def _place(differs: Array, start: int) -> str:
    index = [int(i) for i in np.unravel_index(int(np.argmax(differs)), differs.shape)]
    return str([index[0] + start, *index[1:]])


def _described(count: int, size: int, first: str) -> str:
    return f"differs in {count:,} of {size:,} elements, first at {first}"


def _graph_differences(stored: ir.Model, expected: ir.Model) -> Iterator[str]:
    for kind, ours, theirs in (
        ("inputs", expected.graph.inputs, stored.graph.inputs),
        ("outputs", expected.graph.outputs, stored.graph.outputs),
    ):
        wanted, actual = ([_signature(v) for v in values] for values in (ours, theirs))
        if wanted != actual:
            here, there = _listed(_apart(actual, wanted)), _listed(_apart(wanted, actual))
            yield f"the {kind} are {here}, by a build {there}"
    if stored.opset_imports != expected.opset_imports:
        yield f"opsets are {dict(stored.opset_imports)}, by a build {dict(expected.opset_imports)}"
    if stored.functions.keys() != expected.functions.keys():
        yield f"the graph has functions of its own: {', '.join(map(str, stored.functions))}"
    constants = [_constants(model.graph) for model in (stored, expected)]
    for name in sorted(constants[0].keys() - constants[1].keys()):
        yield f"constant {name} is none of a build"
    yield from _node_differences(list(stored.graph), list(expected.graph), _weights(expected.graph))


def _weights(graph: ir.Graph) -> frozenset[str]:
    """Initializers that are made of the checkpoint."""
    values = graph.initializers.items()
    return frozenset(str(name) for name, value in values if isinstance(value.const_value, LazyWeight))


def _constants(graph: ir.Graph) -> dict[str, ir.Value]:
    """Initializers by their names without digests of what they hold."""
    return {_DIGEST.sub("", str(name)): value for name, value in graph.initializers.items()}


def _signature(value: ir.Value) -> str:
    kind = value.dtype.name if value.dtype is not None else "untyped"
    return f"{value.name} {kind} {dims_of(value)}"


def _apart(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """What `first` alone has; all of it where the order alone differs."""
    return [each for each in first if each not in second] or list(first)


def _node_differences(
    actual: Sequence[ir.Node], wanted: Sequence[ir.Node], weights: frozenset[str]
) -> Iterator[str]:
    if len(actual) != len(wanted):
        names = [{_title(node) for node in nodes} for nodes in (actual, wanted)]
        added, missing = sorted(names[0] - names[1]), sorted(names[1] - names[0])
        yield (
            f"the graph has {len(actual)} nodes, by a build {len(wanted)}: "
            f"added {_listed(added) or 'none'}; missing {_listed(missing) or 'none'}"
        )
        return
    known: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for one, other in zip(actual, wanted, strict=True):
        facts, built = (_facts(node, names, weights) for node, names in zip((one, other), known, strict=True))
        if facts != built:
            key = next(key for key in {**built, **facts} if facts.get(key) != built.get(key))
            yield f"node {_title(other)}: {key} is {facts.get(key)}, by a build {built.get(key)}"
            continue
        for index, pair in enumerate(zip(one.inputs, other.inputs, strict=True)):
            if (how := _constant_difference(*pair, weights)) is not None:
                yield f"node {_title(other)}: input {index} {how}"


def _constant_difference(
    actual: ir.Value | None, wanted: ir.Value | None, weights: frozenset[str]
) -> str | None:
    """How a constant differs from that of a build; None for equal ones, and for what is no constant."""
    if actual is None or wanted is None or wanted.const_value is None or wanted.name in weights:
        return None
    if actual.const_value is None:
        return "has no data"
    ours, theirs = _array(wanted.const_value), _array(actual.const_value)
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return f"is {theirs.dtype} {list(theirs.shape)}, by a build {ours.dtype} {list(ours.shape)}"
    found = _difference(ours, theirs)
    finite = np.issubdtype(ours.dtype, np.floating) and np.isfinite(ours).all() and np.isfinite(theirs).all()
    if found is None or not finite:
        return found
    apart = np.abs(ours.astype(np.float64) - theirs)
    return None if (apart <= _ROUNDING * np.abs(ours).max()).all() else found


def _title(node: ir.Node) -> str:
    return f"{node.op_type} {node.name or (node.outputs[0].name if node.outputs else '')}"


def _facts(node: ir.Node, names: dict[str, str], weights: frozenset[str]) -> dict[str, str]:
    """All that a node says, by what it is.

    Args:
        names: What stands for the digests in names, which depend on the last digits of constants.
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
    """A value as it is read back: numbers with the digits of float32."""
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


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return "; ".join(names[:_NAMED]) + more
