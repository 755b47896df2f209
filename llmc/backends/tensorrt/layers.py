"""Read the layers of a built engine, and require fused attention and quantized products of them.

TensorRT lists layers in two forms with the same facts. With detailed profiling verbosity, the log of a build
has one line for each layer; no GPU is needed for that. The engine inspector gives JSON, of an engine that is
loaded on its GPU. NVIDIA's developer guide documents its fields ("Engine Inspector"). TensorRT-RTX 1.7 has
"Inputs" and "Constants" with a "Datatype"; TensorRT 10 has only "Inputs", with a "Format/Datatype".
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmc.errors import UnsupportedError

#: Part of the names of fused attention kernels: _gemm_mha_v2 for several queries, _gemv_mha_v1 for one.
_FUSED_ATTENTION = "mha"
#: Mark of everything that belongs to the second optimization profile.
_SECOND = "[profile 1]"
_GRAPH = re.compile(r"_myl(\d+)_\d+$")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_DATATYPE = re.compile(r"Datatype: (\w+)")
#: Types within descriptions of formats, such as "Row major linear FP16 format".
_DESCRIBED = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16"}
_FORMAT = re.compile(rf"\b({'|'.join(_DESCRIBED)}|Int8|Int4|Int32|Int64|FP8|FP4E2M1)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Layer:
    """A layer of an engine.

    Args:
        name: TensorRT's name.
        phase: Index of its optimization profile.
        nodes: Names of the ONNX nodes that it computes, wholly or in part.
        inputs: Types of its inputs, by TensorRT's names, such as Half or Int4.
        constants: Types of its constants.
    """

    name: str
    phase: int
    nodes: frozenset[str]
    inputs: tuple[str, ...]
    constants: tuple[str, ...]


class UnreadableLayersError(UnsupportedError):
    """Raised if layers are listed in a form that this module does not understand."""


def read_listing(lines: Sequence[str]) -> list[Layer]:
    """Read the lines of a log, one for each layer, that begin with "Name: ".

    Raises:
        UnreadableLayersError: There are none, or none names an ONNX node.
    """
    layers, second = [], []
    for line in lines:
        name = line.removeprefix("Name: ").split(", LayerType:", 1)[0]
        inputs, _, rest = line.partition("Inputs: ")[2].partition("Constants: ")
        types = [tuple(_DATATYPE.findall(part)) for part in (inputs, rest.partition(", Outputs: ")[0])]
        layers.append(Layer(name, 0, frozenset(_NODE.findall(line)), types[0], types[1]))
        second.append(_SECOND in line)
    return _with_phases(layers, second)


def read_inspection(text: str) -> list[Layer]:
    """Read the JSON of the engine inspector.

    Raises:
        UnreadableLayersError: It is not JSON, has no layers or only their names, or none names an ONNX node.
    """
    try:
        document = json.loads(text, strict=False)  # metadata may separate nodes by control characters
    except ValueError as error:
        raise UnreadableLayersError(f"the engine inspector does not give JSON: {error}") from error
    rows = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UnreadableLayersError("the engine inspector gives only names of layers, or none")
    written = {_name(tensor) for row in rows for tensor in _tensors(row, "Outputs")}
    bound = {each for each in document.get("Bindings", ()) if isinstance(each, str)}
    layers = []
    for row in rows:
        inputs, constants = _tensors(row, "Inputs"), _tensors(row, "Constants")
        if "Constants" not in row:  # what no layer writes and nobody binds is a constant
            constants = [tensor for tensor in inputs if _name(tensor) not in written | bound]
            inputs = [tensor for tensor in inputs if _name(tensor) in written | bound]
        nodes = frozenset(_NODE.findall(str(row.get("Metadata", ""))))
        types = (tuple(_datatype(tensor) for tensor in tensors) for tensors in (inputs, constants))
        layers.append(Layer(str(row.get("Name", "")), 0, nodes, *types))
    return _with_phases(layers, [_SECOND in json.dumps(row, ensure_ascii=False) for row in rows])


def _tensors(row: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    listed = row.get(key, ())
    return [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []


def _name(tensor: Mapping[str, Any]) -> str:
    return str(tensor.get("Name", ""))


def _datatype(tensor: Mapping[str, Any]) -> str:
    """Return the type of a tensor by TensorRT's short name, also where its format is a description."""
    stated = str(tensor.get("Datatype", tensor.get("Format/Datatype", "")))
    described = _FORMAT.search(stated) if " " in stated else None
    return stated if described is None else _DESCRIBED.get(described[1].upper(), described[1])


def _with_phases(layers: Sequence[Layer], second: Sequence[bool]) -> list[Layer]:
    """Find the profile of each layer: graphs within an engine belong to one, as layers outside of them do.

    Args:
        second: Whether each layer or a tensor of it is marked as one of the second profile.
    """
    if not any(layer.nodes for layer in layers):
        raise UnreadableLayersError(f"none of {len(layers)} layers names the ONNX nodes that it computes")
    graphs = [graph[1] if (graph := _GRAPH.search(layer.name)) else "" for layer in layers]
    later = {graph for graph, marked in zip(graphs, second, strict=True) if marked and graph}
    return [
        replace(layer, phase=int(graph in later if graph else marked))
        for layer, graph, marked in zip(layers, graphs, second, strict=True)
    ]


def require_fused_attention(layers: list[Layer], attention: frozenset[str], phase: int, name: str) -> int:
    """Require that fused kernels compute all attention nodes of a phase; return how many there are.

    Args:
        attention: Names of the ONNX nodes of attention.
        phase: Index of the optimization profile, called `name`.

    Raises:
        UnsupportedError: Some are not fused; the error names the first.
    """
    fused: set[str] = set()
    for layer in layers:
        if layer.phase == phase and _FUSED_ATTENTION in layer.name:
            fused |= layer.nodes
    missing = sorted(attention - fused)
    if missing:
        raise UnsupportedError(
            f"TensorRT fuses {len(attention & fused)} of {len(attention)} attention layers in {name}; "
            f"the first not fused is {missing[0]}",
            hint="such an engine is many times slower; report the model",
        )
    return len(attention)


def require_quantized_products(
    layers: list[Layer], products: Mapping[str, tuple[str, str | None]], phase: int, name: str
) -> dict[str, int]:
    """Require that all products of a phase use their quantized factors; return how many by type.

    Args:
        products: Types of weight and activation by the name of the ONNX node, by TensorRT's names; None for
            an activation in float.
        phase: Index of the optimization profile, called `name`.

    Raises:
        UnsupportedError: No engine layer reads the product's weight or activation in its type; it is named.
    """
    weights: dict[str, set[str]] = {}
    activations: dict[str, set[str]] = {}
    for layer in layers:
        if layer.phase == phase:
            for node in layer.nodes & products.keys():
                weights.setdefault(node, set()).update(layer.constants)
                if products[node][0] in layer.constants:
                    activations.setdefault(node, set()).update(layer.inputs)
    for node, (weight, activation) in sorted(products.items()):
        _require_type(node, name, "weight", weight, weights.get(node, set()))
        if activation is not None:
            _require_type(node, name, "activation", activation, activations.get(node, set()))
    return dict(Counter(w if a is None else f"{a} x {w}" for w, a in products.values()))


def _require_type(node: str, phase: str, factor: str, expected: str, actual: set[str]) -> None:
    if expected not in actual:
        raise UnsupportedError(
            f"TensorRT computes {node} in {phase} from {factor}s in {', '.join(sorted(actual)) or 'no type'}"
            f", but the graph has it in {expected}",
            hint="the engine would be larger and slower than its format promises; report the model",
        )
