"""A graph as one that onnxruntime can compute on the CPU, where it lacks kernels for the graph's types.

bfloat16 becomes float32. Every bfloat16 number is one, so that weights are the same; what activations in
bfloat16 round away is not seen. Codes of NVFP4 become twice their value in int8, which is exact, and
activations are rounded to NVFP4 and back by arithmetic in float32: this stands for TensorRT's own operator.
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

_NARROW, _WIDE, _FP8 = ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN
_DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"
_BLOCK = 16


@contextmanager
def computable(folder: Path, interface: Interface) -> Iterator[tuple[Path, Interface, str]]:
    """A folder with a model.onnx that can be computed, its interface, and what was done; empty if nothing.

    Raises:
        ResourceError: Disk full.
    """
    bfloat = any(spec.dtype == "bfloat16" for spec in (*interface.inputs, *interface.outputs))
    model = ir.load(folder / MODEL)
    fp4 = any(v.dtype is ir.DataType.FLOAT4E2M1 for v in model.graph.initializers.values())
    if not bfloat and not fp4:
        yield folder, interface, ""
        return
    done = []
    with TemporaryDirectory(prefix="llmc-computable-") as scratch:
        if fp4:
            _spell_fp4(model.graph)
            done.append("NVFP4 by arithmetic")
        if bfloat:
            _widen(model)
            done.append("in float32")
            changed = {"inputs": _specs(interface.inputs), "outputs": _specs(interface.outputs)}
            interface = interface.model_copy(update=changed)
        with space_errors(Path(scratch)):
            ir.save(model, Path(scratch) / MODEL, external_data=f"{MODEL}.data")
        yield Path(scratch), interface, ", ".join(done)


def _spell_fp4(graph: ir.Graph) -> None:
    """Weights and activations in NVFP4 as what the CPU has kernels for."""
    for node in list(graph):
        if node.op_type == _DYNAMIC_QUANTIZE:
            _round_trip(graph, node)
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if value.dtype is not ir.DataType.FLOAT4E2M1 or tensor is None:
            continue
        ((node, _),) = value.uses()
        value.dtype = ir.DataType.INT8
        value.const_value = _doubled(tensor)
        output = node.outputs[0]
        name, output.name = output.name, f"{output.name}.twice"
        half = ir.Value(
            name=f"{name}.half",
            type=output.type,
            shape=ir.Shape(()),
            const_value=ir.tensor(np.array(0.5, output.dtype.numpy()), name=f"{name}.half"),  # type: ignore[union-attr]
        )
        graph.register_initializer(half)
        halved = ir.node("Mul", [output, half], name=f"{name}/halved")
        halved.outputs[0].name, halved.outputs[0].type = name, output.type
        halved.outputs[0].shape = output.shape
        for user, index in list(output.uses()):
            if user is not halved:
                user.replace_input_with(index, halved.outputs[0])
        graph.insert_after(node, halved)


def _doubled(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.LazyTensor(
        lambda: ir.Tensor((tensor.numpy().astype(np.float32) * 2).astype(np.int8), name=tensor.name),
        dtype=ir.DataType.INT8,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def _round_trip(graph: ir.Graph, node: ir.Node) -> None:
    """Spell TensorRT's dynamic quantization and the two dequantizations behind it, in float32.

    A block of 16 has the scale max|x| / 6 / whole rounded to E4M3, times whole; codes are the nearest of
    0, 0.5, 1, 1.5, 2, 3, 4 and 6, and of two that are as near the even one.
    """
    x, whole = node.inputs[:2]
    ((dequantize, _),) = node.outputs[0].uses()
    result = dequantize.outputs[0]
    if x is None or whole is None or x.dtype is None:
        raise ValueError(f"{node.name} has no typed input")
    stem, before = str(node.name), node
    count = 0

    def op(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nonlocal count
        count += 1
        made = ir.node(kind, list(inputs), attributes, name=f"{stem}/{count}")
        made.outputs[0].name = f"{stem}.{count}"
        graph.insert_before(before, made)
        return made.outputs[0]

    def constant(number: object, dtype: ir.DataType) -> ir.Value:
        name = f"{stem}.{dtype.name}.{number}"
        if name not in graph.initializers:
            tensor = ir.tensor(np.array(number, dtype.numpy()), name=name)
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
            graph.register_initializer(value)
        return graph.initializers[name]

    def number(value: float) -> ir.Value:
        return constant(value, _WIDE)

    shape = op("Shape", x)
    rank = len(x.shape or ())
    split = constant([0] * (rank - 1) + [-1, _BLOCK], ir.DataType.INT64)
    blocks = op("Reshape", op("Cast", x, to=int(_WIDE)), split)
    unit = op("Cast", whole, to=int(_WIDE))
    peak = op("ReduceMax", op("Abs", blocks), constant([-1], ir.DataType.INT64), keepdims=1)
    part = op("Min", op("Div", op("Div", peak, number(6)), unit), number(448))
    zero = constant(0, _FP8)
    part = op("DequantizeLinear", op("QuantizeLinear", part, number(1), zero), number(1), zero)
    scale = op("Mul", part, unit)
    scale = op("Where", op("Equal", scale, number(0)), unit, scale)
    codes = op("Div", blocks, scale)
    size = op("Min", op("Abs", codes), number(6))
    step = op("Where", op("Less", size, number(4)), number(1), number(2))
    step = op("Where", op("Less", size, number(2)), number(0.5), step)
    size = op("Mul", op("Round", op("Div", size, step)), step)
    values = op("Mul", op("Mul", op("Sign", codes), size), scale)
    spelled = op("Cast", op("Reshape", values, shape), to=int(x.dtype))
    spelled.type, spelled.shape = result.type, result.shape
    spelled.name, result.name = result.name, f"{result.name}.before"
    ir.convenience.replace_all_uses_with(result, spelled, replace_graph_outputs=True)
    scales = dequantize.inputs[1]
    graph.remove(dequantize, safe=True)
    if scales is not None and (producer := scales.producer()) is not None:
        graph.remove(producer, safe=True)
    graph.remove(node, safe=True)


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
