"""Compare intermediate values of a graph and of the original, and find where they first diverge."""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.artifact.manifest import MODEL
from llmc.errors import ParityError
from llmc.graph.interface import Interface
from llmc.graph.model import LAYER, SCOPES
from llmc.runtime.arithmetic import Arithmetic, compute_in
from llmc.runtime.libraries import load_onnxruntime


@dataclass(frozen=True)
class NodePlace:
    """The node of a graph that computes a value.

    value: Name of its output.
    operator: Its type, such as `GroupQueryAttention`.
        operator: Such as `GroupQueryAttention`.
        layer: Decoder layer; None outside of the layers.
        module: The original's module whose result the output is, where the trace knows it.
    """

    value: str
    operator: str
    layer: int | None
    module: str | None


@dataclass(frozen=True)
class Values:
    """The values that one run computed: arrays by name, and the places in the order of execution."""

    arrays: Mapping[str, Array]
    places: tuple[NodePlace, ...]


@dataclass(frozen=True)
class ValueDifference:
    """The first value that differs, and the largest difference relative to the largest value."""

    place: NodePlace
    relative: float


def graph_values(folder: Path, interface: Interface, tokens: Array) -> Values:
    """Run a prompt from an empty cache, and return every floating-point value that depends on it.

    Values that depend on weights alone, such as a transposed matrix, are as large as the model and left out.

    Args:
        folder: Directory with model.onnx.
        tokens: (sequence,) int64; short, since all values stay in memory.

    Raises:
        ParityError: onnxruntime cannot run the graph.
    """
    import onnx_ir as ir
    from onnx import helper

    ort = load_onnxruntime()
    exact = ir.load(folder / MODEL)
    interface = compute_in(Arithmetic.EXACT, exact, interface)
    model = ir.to_proto(exact)
    existing = {output.name for output in model.graph.output}
    names = _computed(model.graph)
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names if n not in existing)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # avoids a copy of every weight
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder.resolve())
    )
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        outputs = session.run(names, _feeds(interface, tokens))
    except Exception as error:
        raise ParityError(f"onnxruntime cannot run {folder / 'model.onnx'}: {error}") from error
    arrays = {n: a for n, a in zip(names, outputs, strict=True) if np.issubdtype(a.dtype, np.floating)}
    return Values(arrays, tuple(p for p in _places(model.graph.node) if p.value in arrays))


def module_values(model: Any, tokens: Array) -> dict[str, Array]:
    """Return the output for a prompt of every module of the original without children, by its name.

    Args:
        model: A transformers causal LM.
        tokens: (sequence,) int64.
    """
    import torch

    outputs: dict[str, Array] = {}
    hooks = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:

            def keep(_: Any, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, torch.Tensor) and output.is_floating_point():
                    outputs[name] = output.detach().float().numpy().copy()

            hooks.append(module.register_forward_hook(keep))
    try:
        with torch.inference_mode():
            model(input_ids=torch.from_numpy(tokens[None].copy()), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def first_difference(before: Values, after: Values, tolerance: float) -> ValueDifference | None:
    """Return the first value of `after` that differs from that of the same name and shape in `before`."""
    for place in after.places:
        expected = before.arrays.get(place.value)
        actual = after.arrays[place.value]
        if expected is not None and expected.shape == actual.shape:
            relative = relative_error(actual, expected)
            if relative > tolerance:
                return ValueDifference(place, relative)
    return None


def first_module_difference(
    modules: Mapping[str, Array], values: Values, tolerance: float
) -> ValueDifference | None:
    """Return the first module of the original whose result differs from its last node's in the graph."""
    last = {place.module: place for place in values.places if place.module is not None}
    for place in last.values():
        expected = modules.get(str(place.module))
        actual = values.arrays[place.value]
        if expected is not None and expected.shape == actual.shape:
            relative = relative_error(actual, expected)
            if relative > tolerance:
                return ValueDifference(place, relative)
    return None


def relative_error(actual: Array, expected: Array) -> float:
    """Return the largest absolute difference over the largest magnitude; infinite for NaN or infinity."""
    if not np.isfinite(actual).all():
        return math.inf
    scale = float(np.max(np.abs(expected), initial=0.0))
    difference = float(np.max(np.abs(actual.astype(np.float64) - expected), initial=0.0))
    return difference / scale if scale > 0 else (math.inf if difference > 0 else 0.0)


def _computed(graph: Any) -> list[str]:
    """Return the outputs of the nodes that depend on an input of the graph."""
    initializers = {tensor.name for tensor in graph.initializer}
    live = {value.name for value in graph.input} - initializers
    names: list[str] = []
    for node in graph.node:
        if not live.isdisjoint(node.input):
            names += [name for name in node.output if name]
            live.update(node.output)
    return names


def _feeds(interface: Interface, tokens: Array) -> dict[str, Array]:
    dtypes = {spec.name: np.dtype(spec.dtype) for spec in interface.inputs}
    feeds = {"input_ids": tokens[None], "attention_mask": np.ones((1, len(tokens)), np.int64)}
    if interface.position_ids:
        feeds["position_ids"] = np.arange(len(tokens))[None]
    for slot in interface.cache:
        feeds[slot.past_key] = np.zeros((1, slot.kv_heads, 0, slot.key_width))
        feeds[slot.past_value] = np.zeros((1, slot.kv_heads, 0, slot.value_width))
    for state in interface.states:
        feeds[state.past] = np.zeros((1, *state.shape))
    return {name: np.ascontiguousarray(value, dtypes[name]) for name, value in feeds.items()}


def _places(nodes: Sequence[Any]) -> list[NodePlace]:
    """Return every output with its layer and module.

    One layer of each kind is traced and stamped out for the rest: the name of a stamped value equals its
    model's except for the layer's number, and so does its module's.
    """
    scopes = {n.output[0]: _module(n) for n in nodes if n.output}
    traced: dict[str, str] = {}
    for value, module in scopes.items():
        if module is not None and (match := re.match(r"layer\.(\d+)/", value)):
            traced.setdefault(value[match.end() :], module.replace(f".{match.group(1)}.", ".{}.", 1))
    places = []
    for node in nodes:
        metadata = {p.key: p.value for p in node.metadata_props}
        layer = int(metadata[LAYER]) if LAYER in metadata else None
        for name in node.output:
            module = scopes.get(name)
            if module is None and layer is not None and name.startswith(f"layer.{layer}/"):
                pattern = traced.get(name.partition("/")[2])
                module = None if pattern is None else pattern.replace("{}", str(layer))
            places.append(NodePlace(name, node.op_type, layer, module))
    return places


def _module(node: Any) -> str | None:
    """Return the name of the original's module that a traced node belongs to."""
    stated = next((p.value for p in node.metadata_props if p.key == SCOPES), None)
    if stated is None:
        return None
    scopes = [str(scope) for scope in ast.literal_eval(stated)]
    # The first scope is the step around the model, the last the node itself; the model's own name comes
    # first.
    inner = scopes[-2] if len(scopes) > 1 else ""
    return inner.partition(".")[2] or None
