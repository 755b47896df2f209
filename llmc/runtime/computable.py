"""Change a graph so that onnxruntime can compute it on a CPU without kernels for the graph's types.

bfloat16 becomes float32. Every bfloat16 number is a float32 number, so the weights are the same; the rounding
of activations in bfloat16 is not reproduced. Codes of NVFP4 become their doubled value in int8, which is
exact, and activations are rounded to NVFP4 and back by float32 arithmetic, in place of TensorRT's operator.

To check whether a graph is right regardless of its types, all of it can be converted to float32, with
activations unrounded and weights as stored.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
import onnx_ir as ir

from llmc.artifact.manifest import MODEL
from llmc.artifact.store.disk import space_errors
from llmc.errors import ParityError
from llmc.graph.domains import DYNAMIC_QUANTIZE
from llmc.graph.edit import Site, name_constant, take_over
from llmc.graph.interface import Interface, TensorSpec

_WIDE, _FP8 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN
#: Types that become float32 if one of them has to.
_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
_BLOCK = 16


@contextmanager
def computable(
    folder: Path, interface: Interface, *, exact: bool = False
) -> Iterator[tuple[Path, Interface, str]]:
    """Provide a folder with a computable model.onnx, its interface, and a description of the changes, if any.

    Args:
        exact: Whether to convert everything to float32 and leave activations unrounded.

    Raises:
        ResourceError: The disk is full.
    """
    kinds = {spec.dtype for spec in (*interface.inputs, *interface.outputs)}
    narrow = "bfloat16" in kinds or (exact and "float16" in kinds)
    model = ir.load(folder / MODEL)
    plain = exact and _leave_activations(model.graph)
    fp4 = any(v.dtype is ir.DataType.FLOAT4E2M1 for v in model.graph.initializers.values())
    if not narrow and not fp4 and not plain:
        yield folder, interface, ""
        return
    done = []
    with TemporaryDirectory(prefix="llmc-computable-") as scratch:
        if plain:
            done.append("unrounded activations")
        if fp4:
            _spell_fp4(model.graph)
            done.append("NVFP4 by arithmetic")
        if narrow:
            _widen(model)
            done.append("in float32")
            changed = {"inputs": _specs(interface.inputs), "outputs": _specs(interface.outputs)}
            interface = interface.model_copy(update=changed)
        with space_errors(Path(scratch)):
            ir.save(model, Path(scratch) / MODEL, external_data=f"{MODEL}.data")
        yield Path(scratch), interface, ", ".join(done)


def _leave_activations(graph: ir.Graph) -> bool:
    """Let products read quantized activations before quantization; return whether there are any."""
    changed = False
    for node in list(graph):
        if node.op_type not in ("QuantizeLinear", DYNAMIC_QUANTIZE):
            continue
        ((back, _),) = node.outputs[0].uses()
        ir.convenience.replace_all_uses_with(back.outputs[0], _typed_input(node))
        for dead in (back, *_makers(back.inputs[1]), node):
            graph.remove(dead, safe=True)
        changed = True
    return changed


def _typed_input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None or value.dtype is None:
        raise ParityError(f"{node.name} of model.onnx has no typed input")
    return value


def _makers(value: ir.Value | None) -> tuple[ir.Node, ...]:
    node = None if value is None else value.producer()
    return () if node is None else (node,)


def _spell_fp4(graph: ir.Graph) -> None:
    """Express weights and activations in NVFP4 with operators that the CPU has kernels for."""
    for node in list(graph):
        if node.op_type == DYNAMIC_QUANTIZE:
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
        half = name_constant(graph, f"{name}.half", np.array(0.5, output.dtype.numpy()))  # type: ignore[union-attr]
        site = Site(graph, node, metadata={}, after=True)
        halved = site.emit("Mul", [output, half], str(name), like=output, node_name=f"{name}/halved")
        for user, index in list(output.uses()):
            if user is not halved:
                user.replace_input_with(index, halved.outputs[0])


def _doubled(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.LazyTensor(
        lambda: ir.Tensor((tensor.numpy().astype(np.float32) * 2).astype(np.int8), name=tensor.name),
        dtype=ir.DataType.INT8,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def _round_trip(graph: ir.Graph, node: ir.Node) -> None:
    """Express TensorRT's dynamic quantization and the two dequantizations after it in float32.

    A block of 16 has the scale max|x| / 6 / whole rounded to E4M3, times whole; codes are the nearest of 0,
    0.5, 1, 1.5, 2, 3, 4 and 6, with ties to even.
    """
    x, whole = _typed_input(node), cast(ir.Value, node.inputs[1])
    kind = cast(ir.DataType, x.dtype)
    ((dequantize, _),) = node.outputs[0].uses()
    result = dequantize.outputs[0]
    stem, site = str(node.name), Site(graph, node)
    count = 0

    def op(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nonlocal count
        count += 1
        return site.emit(kind, inputs, f"{stem}.{count}", attributes=attributes).outputs[0]

    def constant(number: object, dtype: ir.DataType) -> ir.Value:
        return name_constant(graph, f"{stem}.{dtype.name}.{number}", np.array(number, dtype.numpy()))

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
    rounded = op("Cast", op("Reshape", values, shape), to=int(kind))
    take_over(result, rounded)
    for dead in (dequantize, *_makers(dequantize.inputs[1]), node):
        graph.remove(dead, safe=True)


def _specs(specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(
        spec.model_copy(update={"dtype": "float32"}) if spec.dtype in ("bfloat16", "float16") else spec
        for spec in specs
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
                    if attribute.as_int() in _NARROW:
                        node.attributes[name] = ir.AttrInt64(name, _WIDE)
                elif attribute.type is ir.AttributeType.TENSOR:
                    node.attributes[name] = ir.AttrTensor(name, _widen_tensor(attribute.as_tensor()))


def _widen_value(value: ir.Value) -> None:
    if value.dtype in _NARROW:
        value.dtype = _WIDE
    if value.const_value is not None:
        value.const_value = _widen_tensor(value.const_value)


def _widen_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return `tensor` in float32 if it is narrower; its data is read when it is written."""
    if tensor.dtype not in _NARROW:
        return tensor
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name),
        dtype=_WIDE,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )
