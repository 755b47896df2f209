"""Dequantize stacked experts of com.microsoft QMoE by its operator schema: (code - zero point) * scale."""

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.errors import ParityError
from llmc.graph.edit import add_initializer, replace_node
from llmc.graph.match import array_of, input_of

#: Inputs of QMoE for each of its matrices: codes, scales, bias and zero points.
PARTS = ((2, 3, 4, 11), (5, 6, 7, 12))


def read_experts(node: ir.Node, parts: tuple[int, int, int, int], start: int, stop: int) -> Array:
    """Dequantize experts start:stop of one stack of matrices, (experts, outputs, inputs) float32."""
    codes, scales, zeros = (array_of(input_of(node, parts[i])) for i in (0, 1, 3))
    if codes is None or scales is None:
        raise ParityError(f"experts {node.name} of the artifact have no codes or no scales")
    bits, block = (node.attributes[key].as_int() for key in ("expert_weight_bits", "block_size"))
    levels = unpack_codes(codes[start:stop], bits).astype(np.float32)
    blocks = levels.reshape(*levels.shape[:2], -1, block)
    middle: Array | float = 1 << (bits - 1)
    if zeros is not None:
        middle = unpack_codes(zeros[start:stop], bits)[:, :, : blocks.shape[2], None].astype(np.float32)
    values: Array = (blocks - middle) * scales[start:stop, :, :, None].astype(np.float32)
    return values.reshape(levels.shape)


def in_float32(node: ir.Node) -> None:
    """Make a QMoE compute in float32: by its attribute, or as MoE with dequantized weights.

    With 8 bits, ONNX Runtime 1.31 has no CPU kernel for float32 activations.
    """
    node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    if node.attributes["expert_weight_bits"].as_int() != 8:
        return
    graph = node.graph
    if graph is None:
        raise ParityError(f"experts {node.name} are not in a graph")
    inputs = list(node.inputs[:2])
    for parts in PARTS:
        weights = read_experts(node, parts, 0, int(_shape(node, parts[0])[0]))
        scales = input_of(node, parts[1])
        if scales is not None and scales.dtype is not None:  # of the type of activations
            weights = weights.astype(scales.dtype.numpy())
        value = add_initializer(graph, ir.tensor(weights, name=f"{node.name}.float.{parts[0]}"))
        inputs += [value, input_of(node, parts[2])]
    attributes = [
        a
        for n, a in node.attributes.items()
        if n not in ("accuracy_level", "expert_weight_bits", "block_size", "weights_prepacked")
    ]
    replace_node(graph, node, [ir.Node(node.domain, "MoE", inputs, attributes)])


def unpack_codes(packed: Array, bits: int) -> Array:
    """Unpack codes (…, k) from uint8 (…, k * bits / 8), the first code of a byte in its low bits."""
    if bits == 8:
        return packed
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)


def _shape(node: ir.Node, index: int) -> tuple[int, ...]:
    value = node.inputs[index]
    return () if value is None or value.const_value is None else tuple(value.const_value.shape.numpy())
