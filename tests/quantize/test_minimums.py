"""Matrices of code * scale + minimum, as GGUF files have them, in the operators of a graph."""

import onnx_ir as ir

from llmc.config import Dtype
from llmc.graph.model import Graph
from llmc.graph.weights import Array, TensorInfo
from llmc.quantize.linear import quantize_weights
from tests.quantize.test_linear import Tensors, decoder, everything
from tests.quantize.test_stored import minimum_rows

WIDTH = 96


class CodedTensors(Tensors):
    """A store whose tensors all have codes with minimums, `bits` wide in groups of `group`."""

    def __init__(self, shapes: dict[str, tuple[int, int]], bits: int, group: int) -> None:
        made = {n: minimum_rows(len(n), s, bits, group) for n, s in shapes.items()}
        super().__init__({name: values for name, (_, values) in made.items()})
        self._codes = {name: rows.info.codes for name, (rows, _) in made.items()}

    def infos(self) -> dict[str, TensorInfo]:
        plain = super().infos()
        return {n: TensorInfo(n, i.shape, i.dtype, self._codes[n]) for n, i in plain.items()}


def coded_decoder(bits: int, group: int, *, tied: bool, level: int = 0) -> tuple[Graph, dict[str, Array]]:
    """A quantized decoder, its matrices kept, and their values."""
    shapes = {"embed": (50, WIDTH), "proj": (WIDTH, WIDTH)} | ({} if tied else {"head": (50, WIDTH)})
    store = CodedTensors(shapes, bits, group)
    graph = decoder(store, tied=tied)
    quantize_weights(graph, everything(level), Dtype.FLOAT32)
    return graph, store.arrays


def test_zero_points_are_float_operands() -> None:
    graph, _ = coded_decoder(4, 32, tied=False)
    for node in graph.graph:
        at = {"MatMulNBits": 3, "GatherBlockQuantized": 3}[node.op_type]
        zeros = node.inputs[at]
        assert zeros is not None
        assert zeros.dtype is ir.DataType.FLOAT
        assert zeros.shape is not None
        assert zeros.shape.numpy() == (50 if "proj" not in str(zeros.name) else WIDTH, WIDTH // 32)
