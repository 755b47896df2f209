"""Rotary tables computed at load: the values stay, the file holds frequencies."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from llmc.arrays import Array
from llmc.backends.model_file import DATA, write_model
from llmc.backends.onnxruntime.rotary_tables import compute_tables, find_pairs
from llmc.graph.model import Graph

POSITIONS, PAIRS = 8192, 32


def tables(amplitude: float = 1.0) -> tuple[Array, Array]:
    frequencies = (1 / 10000 ** (np.arange(PAIRS) / PAIRS)).astype(np.float32)
    angles = np.arange(POSITIONS, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles) * np.float32(amplitude), np.sin(angles) * np.float32(amplitude)


def rotation(cos: Array, sin: Array) -> Graph:
    """Rotary embedding of heads (batch, 2, sequence, 64)."""

    def value(name: str, dims: list[int | str], kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(kind))

    heads, turned = (value(n, ["batch", 2, "sequence", 64]) for n in ("heads", "turned"))
    ids = value("position_ids", ["batch", "sequence"], ir.DataType.INT64)
    weights = []
    for name, array in (("cos", cos), ("sin", sin)):
        weights.append(value(name, list(array.shape)))
        weights[-1].const_value = ir.tensor(array, name=name)
    node = ir.node(
        "RotaryEmbedding", [heads, ids, *weights], {"num_heads": 2}, outputs=[turned], domain="com.microsoft"
    )
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph(
        [heads, ids], [turned], nodes=[node], initializers=weights, opset_imports=opsets, name="g"
    )
    return Graph(ir.Model(graph, ir_version=10), cache=(), layers=1)


def turn(graph: Graph, folder: Path) -> Array:
    folder.mkdir()
    write_model(graph.model, folder)
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    heads = np.random.default_rng(0).standard_normal((1, 2, 5, 64), np.float32)
    ids = np.array([[0, 1, 77, 4000, 8191]])
    return np.asarray(session.run(None, {"heads": heads, "position_ids": ids})[0])


@pytest.mark.parametrize("amplitude", [1.0, 1.19])
def test_values_stay_and_the_file_shrinks(amplitude: float, tmp_path: Path) -> None:
    graph = rotation(*tables(amplitude))
    expected = turn(graph, tmp_path / "stored")
    compute_tables(graph, find_pairs(graph))
    np.testing.assert_allclose(turn(graph, tmp_path / "computed"), expected, atol=3e-6)
    assert (tmp_path / "stored" / DATA).stat().st_size == 8 * POSITIONS * PAIRS
    assert not (tmp_path / "computed" / DATA).exists()


@pytest.mark.parametrize("row", [3, 8191])
def test_other_tables_stay_as_they_are(row: int) -> None:
    cos, sin = tables()
    cos[row, 5] += 1e-5
    assert find_pairs(rotation(cos, sin)) == []
    assert find_pairs(rotation(cos[:100], sin[:100])) == []
