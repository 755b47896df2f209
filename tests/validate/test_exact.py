"""Graphs and tensors against those of a build, and what of a graph depends on the machine alone."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from llmc.artifact.verdict import MeasurementStatus
from llmc.errors import ParityError
from llmc.graph.weights import LazyWeight, StoredRows, TensorInfo
from llmc.validate.exact import measure_graph, measure_tensors

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)
TABLE = np.cos(np.arange(8, dtype=np.float32))


class _Store:
    def infos(self) -> dict[str, TensorInfo]:
        return {"w": TensorInfo("w", WEIGHT.shape, ir.DataType.FLOAT)}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return WEIGHT[start:stop]


def _model(weight: np.ndarray | None, table: np.ndarray = TABLE, digest: str = "0" * 12) -> ir.Model:
    """`weight` times x plus a table; None for the checkpoint's own rows."""
    store = _Store()
    rows = StoredRows(store, store.infos()["w"])
    tensor = LazyWeight.from_rows("w", rows) if weight is None else ir.tensor(weight, name="w")
    x = ir.Value(name="x", shape=ir.Shape([3, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", const_value=tensor, shape=ir.Shape([4, 3]), type=ir.TensorType(tensor.dtype))
    name = f"rotary_cos_{digest}"
    t = ir.Value(name=name, const_value=ir.tensor(table, name=name))
    product = ir.node("MatMul", [w, x], name="product")
    sums = ir.node("Add", [product.outputs[0], t], name=f"{name}.sum")
    product.outputs[0].name, sums.outputs[0].name = f"{name}.product", "y"
    nodes = [product, sums]
    graph = ir.Graph([x], sums.outputs, nodes=nodes, initializers=[w, t], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def _write(folder: Path, model: ir.Model) -> Path:
    ir.save(model, folder / "model.onnx")
    return folder


def test_what_a_build_gives_has_no_mismatches(tmp_path: Path) -> None:
    folder, built = _write(tmp_path, _model(WEIGHT)), _model(None)
    assert measure_graph(folder, built, None).value == 0
    found = measure_tensors(folder, built.graph, {})
    assert (found.value, found.detail) == (0, "1 tensors equal those of a build, bit for bit")


def test_last_digits_of_tables_depend_on_the_cpu(tmp_path: Path) -> None:
    folder = _write(tmp_path, _model(WEIGHT, np.nextafter(TABLE, np.float32(2)), "1" * 12))
    assert measure_graph(folder, _model(None), None).value == 0
    _write(folder, _model(WEIGHT, TABLE[::-1].copy(), "2" * 12))
    assert measure_graph(folder, _model(None), None).value == 1


def test_infinite_constants_are_equal_to_themselves_alone(tmp_path: Path) -> None:
    mask = np.where(TABLE > 0, TABLE, -np.inf).astype(np.float32)
    folder = _write(tmp_path, _model(WEIGHT, mask))
    assert measure_graph(folder, _model(None, mask), None).value == 0
    assert measure_graph(folder, _model(None), None).value == 1


def test_a_changed_weight_is_told_by_place(tmp_path: Path) -> None:
    changed = WEIGHT.copy()
    changed[2, 1] = np.nextafter(changed[2, 1], np.float32(99))
    found = measure_tensors(_write(tmp_path, _model(changed)), _model(None).graph, {})
    assert found.value == 1
    assert "w differs in 1 of 12 elements, first at [2, 1]" in found.detail
    store = _Store()
    left = measure_tensors(tmp_path, _model(None).graph, {"w": StoredRows(store, store.infos()["w"])})
    assert left.value == 0
    assert left.detail.endswith("1 matrices, whose codes cannot be computed here, are compared by value")


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (WEIGHT.astype(np.float16), "w is FLOAT16 [4, 3], not FLOAT [4, 3]"),
        (WEIGHT.T.copy(), "w is FLOAT [3, 4], not FLOAT [4, 3]"),
    ],
)
def test_another_type_or_shape_is_a_mismatch(weight: np.ndarray, said: str, tmp_path: Path) -> None:
    assert said in measure_tensors(_write(tmp_path, _model(weight)), _model(None).graph, {}).detail


def test_another_operator_is_told_unless_tools_differ(tmp_path: Path) -> None:
    model = _model(WEIGHT)
    model.graph[1].op_type = "Sub"
    found = measure_graph(_write(tmp_path, model), _model(None), None)
    assert "node Add rotary_cos" in found.detail
    assert "operator is ::Sub, but ::Add in a build" in found.detail
    other = measure_graph(tmp_path, _model(None), "it was built with torch 1")
    assert other.status is MeasurementStatus.NOT_APPLICABLE
    assert other.detail.startswith("it was built with torch 1, so that graphs are not compared")


def test_a_damaged_graph_is_a_parity_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(ParityError, match="is not an ONNX model"):
        measure_tensors(tmp_path, _model(None).graph, {})
