"""Read the weights of a graph that TensorRT Edge-LLM's exporter wrote, as its kernels compute with them.

The layouts are taken from release 0.11.0. `Int4GroupwiseGemmPluginV2` multiplies by (code - 8) * scale. Its
codes lie in the order of the kernel's fragments: blocks of 128 outputs, of 64 inputs, of 16 inputs, halves of
64 outputs, then 128 words of 32 bits, the t-th of which has outputs t // 4 and t // 4 + 32 and inputs
2 * (t % 4) and the 1st, 8th and 9th after it. Matrices in fp8 and nvfp4 are inputs of `DequantizeLinear`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.errors import ParityError
from llmc.graph.match import array_of

_PREFIX = "_model."
#: Half of the outputs, and the input, of each nibble of a word, the lowest first.
_NIBBLES = ((0, 0), (0, 8), (1, 0), (1, 8), (0, 1), (0, 9), (1, 1), (1, 9))
_OUTPUTS, _INPUTS = 128, 64


def exported_matrices(graph: Path) -> Mapping[str, Callable[[], Array]]:
    """Return functions that read each matrix, (outputs, inputs) float32, by the name of its module.

    Raises:
        ParityError: The graph cannot be read.
    """
    try:
        nodes = list(ir.load(graph).graph)
    except Exception as error:  # protobuf and onnx_ir raise many kinds of errors on a damaged file
        raise ParityError(f"{graph.name} of Edge-LLM is not an ONNX model: {error}") from error
    found: dict[str, Callable[[], Array]] = {}
    for node in nodes:
        if node.op_type not in _READERS:
            continue
        place, reader = _READERS[node.op_type]
        weight = node.inputs[place]
        if weight is None or weight.const_value is None or weight.name is None:
            continue
        module, _, last = weight.name.removeprefix(_PREFIX).rpartition(".")
        if last in ("weight", "qweight"):
            found[module] = lambda node=node, reader=reader: reader(node)  # type: ignore[misc]
    return found


def unpack_fragments(packed: Array, outputs: int, inputs: int) -> Array:
    """Return codes 0 to 15, (outputs, inputs) uint8, of a buffer of fragments, (rows, 512) int8."""
    blocks, tiles = -(-outputs // _OUTPUTS), -(-inputs // _INPUTS)
    words = np.ascontiguousarray(packed).view("<u4").reshape(blocks, tiles, 4, 2, 32, 4)
    codes = np.empty((blocks, 2, 2, 32, tiles, 4, 16), np.uint8)  # half of 64, half of 32, output; 16 inputs
    pairs = 2 * np.arange(4)
    for place, (half, first) in enumerate(_NIBBLES):
        nibble = ((words >> np.uint32(4 * place)) & np.uint32(15)).astype(np.uint8)
        codes[:, :, half, :, :, :, first + pairs] = nibble.transpose(5, 0, 3, 4, 1, 2)
    whole = codes.reshape(blocks * _OUTPUTS, tiles * _INPUTS)
    return whole[:outputs, :inputs]


def _int4(node: ir.Node) -> Array:
    outputs, inputs, group = (node.attributes[name].as_int() for name in ("gemm_n", "gemm_k", "group_size"))
    scales = _constant(node, 2).astype(np.float32).T
    codes = unpack_fragments(_constant(node, 1), outputs, inputs)
    matrix = (codes.astype(np.float32) - 8) * np.repeat(scales, group, axis=1)
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is not None and source.op_type == "Gather" and source.inputs[1] is not None:
        order = array_of(source.inputs[1])
        if order is not None and order.shape == (inputs,):
            turned = np.empty_like(matrix)
            turned[:, order] = matrix
            return turned
    return matrix


def _constant(node: ir.Node, number: int) -> Array:
    value = node.inputs[number]
    array = None if value is None else array_of(value)
    if array is None:
        raise ParityError(
            f"input {number} of {node.op_type} {node.name} in Edge-LLM's graph is not a constant"
        )
    return array


def _dequantized(node: ir.Node) -> Array:
    """Return codes times their scales: one, or one for each block, which in nvfp4 are codes in turn."""
    codes = _constant(node, 0).astype(np.float32)
    scale = node.inputs[1]
    source = None if scale is None else scale.producer()
    scales = _constant(node, 1).astype(np.float32) if source is None else _dequantized(source)
    if scales.size == 1:
        return codes * scales.reshape(())
    if scales.ndim != 2 or codes.shape != (
        len(scales),
        scales.shape[1] * node.attributes["block_size"].as_int(),
    ):
        shapes = f"{codes.shape} codes and {scales.shape} scales"
        raise ParityError(f"{node.name} of Edge-LLM's graph has {shapes}, which llmc does not read")
    return codes * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


#: Which input of an operator is the weight, and what reads the node.
_READERS: Mapping[str, tuple[int, Callable[[ir.Node], Array]]] = {
    "Int4GroupwiseGemmPluginV2": (1, _int4),
    "DequantizeLinear": (0, _dequantized),
}
