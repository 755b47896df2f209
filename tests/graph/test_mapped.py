"""Tensors that are read from their files take no memory for long."""

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from llmc.graph import mapped
from llmc.graph.mapped import MappedPages

#: Elements of a tensor, float32.
SIZE = 4 << 20


def mapped_bytes() -> int:
    """Memory of this process that is mapped from files."""
    found = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.fixture
def graph(tmp_path: Path) -> ir.Graph:
    values = []
    for i in range(4):
        tensor = ir.Tensor(np.full(SIZE, i + 1, np.float32), name=f"w{i}")
        values.append(ir.Value(name=f"w{i}", const_value=tensor))
    made = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21})
    ir.save(ir.Model(made, ir_version=10), tmp_path / "model.onnx", external_data="model.onnx.data")
    return ir.load(tmp_path / "model.onnx").graph


@pytest.mark.parametrize("most", [0, 1 << 40])
def test_pages_are_dropped_once_enough_was_read(
    most: int, graph: ir.Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "_MOST", most)
    before, pages = mapped_bytes(), MappedPages(graph)
    kept = []
    for i, value in enumerate(graph.initializers.values()):
        assert value.const_value is not None
        array = value.const_value.numpy()
        assert array.sum(dtype=np.float64) == SIZE * (i + 1)
        pages.count(array.nbytes)
        kept.append(array)
    grown = mapped_bytes() - before
    assert grown < 4 * SIZE if most == 0 else grown > 3 * 4 * SIZE
    assert [int(array[-1]) for array in kept] == [1, 2, 3, 4]
