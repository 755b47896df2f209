"""Reduce the slots of a graph whose KV cache has a fixed length, if a text needs fewer.

Every run of such a graph copies the whole cache and attends to all of its slots, including masked ones: 189
MB per row for the demo's 8,192 slots. Masked slots have a weight of exactly zero.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.errors import ParityError
from llmc.graph.interface import Interface, TensorSpec

#: Axis of the slots in keys and values, and in the shape of repeated heads.
_AXIS = 2


def shorten(interface: Interface, slots: int) -> Interface:
    """Return the interface of the graph with `slots` slots instead of its own number."""
    caches = {name for slot in interface.cache for name in slot.names}

    def fewer(spec: TensorSpec) -> TensorSpec:
        if spec.name not in caches:
            return spec
        return spec.model_copy(update={"shape": (*spec.shape[:_AXIS], slots, *spec.shape[_AXIS + 1 :])})

    return interface.model_copy(
        update={
            "inputs": tuple(map(fewer, interface.inputs)),
            "outputs": tuple(map(fewer, interface.outputs)),
            "max_length": slots,
        }
    )


def shorten_graph(model: Any, interface: Interface, slots: int) -> None:
    """Change the number of slots of an `onnx_ir.Model` of `interface`, in place.

    `llmc.passes.static_cache` states the number in the caches, in the slot numbers that masks compare with,
    and in the shape of repeated heads; the shapes of values in between are inferred again.

    Raises:
        ParityError: No mask compares with the slot numbers.
    """
    graph, capacity = model.graph, interface.max_length or 0
    shorter = shorten(interface, slots)
    specs = {spec.name: spec for spec in (*shorter.inputs, *shorter.outputs)}
    for node in graph:
        for output in node.outputs:
            output.shape = None
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape(list(specs[value.name].shape))
    numbered = False
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype is not ir.DataType.INT64:
            continue
        array = tensor.numpy()
        if array.shape == (capacity,) and (array == np.arange(capacity)).all():
            numbered = True
            _replace(value, np.arange(slots, dtype=np.int64))
        elif array.shape == (4,) and array[_AXIS] == capacity and _shapes(value):
            _replace(value, np.where(np.arange(4) == _AXIS, slots, array))
    if not numbered:
        raise ParityError(f"no mask of the graph compares with its {capacity} slots")


def _shapes(value: ir.Value) -> bool:
    return all(use.node.op_type == "Reshape" and use.idx == 1 for use in value.uses())


def _replace(value: ir.Value, array: Array) -> None:
    value.const_value = ir.Tensor(array, name=value.name)
    value.shape = ir.Shape(array.shape)
