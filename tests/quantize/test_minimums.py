"""Matrices of code * scale + minimum, as GGUF files have them, in the operators of a graph."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from llmc.arrays import Array
from llmc.backends.model_file import write_model
from llmc.backends.onnxruntime.minimums import split_minimums
from llmc.config import Dtype, WeightRole
from llmc.graph.model import Graph
from llmc.graph.weights import TensorInfo
from llmc.quantize.linear import quantize_weights
from llmc.validate.stored import read_stored
from tests.quantize.test_linear import IDS, Tensors, decoder, everything, random, run
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
        return {n: TensorInfo(n, i.shape, i.dtype, self._codes.get(n)) for n, i in plain.items()}


def coded_decoder(
    bits: int, group: int, *, tied: bool, level: int = 0, dtype: Dtype = Dtype.FLOAT32
) -> tuple[Graph, dict[str, Array]]:
    """A quantized decoder, its matrices kept, and their values."""
    shapes = {"embed": (50, WIDTH), "proj": (WIDTH, WIDTH)} | ({} if tied else {"head": (50, WIDTH)})
    store = CodedTensors(shapes, bits, group)
    kind = ir.DataType.FLOAT if dtype is Dtype.FLOAT32 else ir.DataType.FLOAT16
    graph = decoder(store, tied=tied, dtype=kind)
    quantize_weights(graph, everything(level), dtype)
    return graph, store.arrays


def test_zero_points_are_float_operands() -> None:
    graph, _ = coded_decoder(4, 32, tied=False)
    readers = [n for n in graph.graph if n.op_type in ("MatMulNBits", "GatherBlockQuantized")]
    assert len(readers) == 3
    for node in readers:
        zeros = node.inputs[3]
        assert zeros is not None
        assert zeros.dtype is ir.DataType.FLOAT
        assert zeros.shape is not None
        assert zeros.shape.numpy() == (50 if "proj" not in str(zeros.name) else WIDTH, WIDTH // 32)


def test_products_with_kept_codes_have_an_accuracy_of_their_own() -> None:
    store = CodedTensors({"embed": (50, WIDTH), "proj": (WIDTH, WIDTH)}, 4, 32)
    store.arrays["head"] = random(50, WIDTH)
    graph = decoder(store)
    stated = everything(4).model_copy(update={"kept_accuracy": dict.fromkeys(WeightRole, 2)})
    quantize_weights(graph, stated, Dtype.FLOAT32)
    products = [node for node in graph.graph if node.op_type == "MatMulNBits"]
    assert [node.attributes["accuracy_level"].as_int() for node in products] == [2, 4]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("group", [16, 32])
def test_onnx_runtime_computes_with_the_values_of_the_file(bits: int, group: int, tied: bool) -> None:
    graph, values = coded_decoder(bits, group, tied=tied)
    assert split_minimums(graph) == 3
    hidden, mid, logits = run(graph, IDS)
    np.testing.assert_allclose(hidden, values["embed"][IDS], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(mid, hidden @ values["proj"].T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits, mid @ values["embed" if tied else "head"].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 5])
def test_codes_are_centred_for_activations_in_8_bits(bits: int) -> None:
    graph, values = coded_decoder(bits, 32, tied=True, level=4)
    split_minimums(graph)
    hidden, mid, _ = run(graph, IDS)
    expected = hidden @ values["proj"].T
    assert np.linalg.norm(mid - expected) <= 0.01 * np.linalg.norm(expected)


def test_float16_activations() -> None:
    graph, values = coded_decoder(4, 32, tied=True, dtype=Dtype.FLOAT16)
    split_minimums(graph)
    hidden, mid, _ = run(graph, IDS)
    np.testing.assert_allclose(hidden, values["embed"][IDS], rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(mid, hidden.astype(np.float32) @ values["proj"].T, rtol=1e-2, atol=1e-2)


def test_minimums_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    graph, values = coded_decoder(5, 32, tied=True)
    names = ("embed", "proj")
    rows = {n: Tensors(values).rows(n) for n in names}
    split_minimums(graph)
    write_model(graph.model, tmp_path)
    for name, tensor in read_stored(tmp_path, rows).items():
        np.testing.assert_array_equal(tensor.whole(), values[name])
    minimums = graph.graph.initializers["proj.minimums"].const_value
    assert minimums is not None
    assert minimums.dtype is ir.DataType.FLOAT16
