"""A graph in bfloat16 as one in float32, since onnxruntime computes no bfloat16 on the CPU.

Every bfloat16 number is a float32 number, so that weights are the same. What bfloat16 activations round away
is not seen: the graph's structure and its weights are what is measured.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from llmc.artifact.disk import space_errors
from llmc.artifact.manifest import MODEL
from llmc.graph.interface import Interface, TensorSpec

_NARROW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


@contextmanager
def widened(folder: Path, interface: Interface) -> Iterator[tuple[Path, Interface]]:
    """A folder with model.onnx in float32, and its interface; both as they are if nothing is bfloat16.

    Raises:
        ResourceError: Disk full.
    """
    if all(spec.dtype != "bfloat16" for spec in (*interface.inputs, *interface.outputs)):
        yield folder, interface
        return
    with TemporaryDirectory(prefix="llmc-float32-") as scratch:
        model = ir.load(folder / MODEL)
        _widen(model)
        with space_errors(Path(scratch)):
            ir.save(model, Path(scratch) / MODEL, external_data=f"{MODEL}.data")
        changed = {"inputs": _specs(interface.inputs), "outputs": _specs(interface.outputs)}
        yield Path(scratch), interface.model_copy(update=changed)


def _specs(specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(
        spec.model_copy(update={"dtype": "float32"}) if spec.dtype == "bfloat16" else spec for spec in specs
    )


def _widen(model: ir.Model) -> None:
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values()):
        _widen_value(value)
    for nodes in (graph, *model.functions.values()):
        for node in nodes:
            for value in node.outputs:
                _widen_value(value)
            for name, attribute in list(node.attributes.items()):
                if attribute.type is ir.AttributeType.INT and name in ("to", "output_dtype"):
                    if attribute.as_int() == _NARROW:
                        node.attributes[name] = ir.AttrInt64(name, _WIDE)
                elif attribute.type is ir.AttributeType.TENSOR:
                    node.attributes[name] = ir.AttrTensor(name, _widen_tensor(attribute.as_tensor()))


def _widen_value(value: ir.Value) -> None:
    if value.dtype is _NARROW:
        value.dtype = _WIDE
    if value.const_value is not None:
        value.const_value = _widen_tensor(value.const_value)


def _widen_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """`tensor` in float32 if it is bfloat16; its data is read when it is written."""
    if tensor.dtype is not _NARROW:
        return tensor
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name),
        dtype=_WIDE,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )
