"""Codes of GGUF blocks: with their scales they are the values that the gguf package gives."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from llmc.arrays import Array
from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.gguf_codes import block_codes
from llmc.checkpoint.rearrange import find_arrangement, probe, rearrange
from llmc.graph.weights import CodeGrid, CodeRows, TensorInfo
from tests.checkpoint.tiny_gguf import SCALES_AT, random_blocks, write_gguf

WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")


def values_of(grid: CodeGrid, rows: CodeRows) -> Array:
    """float32 (n, K), in the arithmetic of the gguf package."""
    codes = rows.codes.astype(np.float32)
    scales = np.repeat(rows.scales.astype(np.float32), grid.group_size, 1)
    if rows.minimums is None:
        return (codes - np.repeat(rows.zero_points, grid.group_size, 1)) * scales
    return codes * scales + np.repeat(rows.minimums.astype(np.float32), grid.group_size, 1)


@pytest.mark.parametrize("name", [*WRITTEN, *(kind.name for kind in SCALES_AT if kind is not Kind.IQ2_XXS)])
def test_codes_and_scales_are_the_values(name: str) -> None:
    kind = Kind[name]
    if kind in SCALES_AT:
        raw = random_blocks(kind, (6, 512))
    else:
        raw = quants.quantize(np.random.default_rng(1).standard_normal((6, 512), np.float32), kind)
    form = block_codes(kind)
    assert form is not None
    grid = form.grid(kind, lambda start, stop: raw[start:stop])
    rows = grid.read(1, 5)
    np.testing.assert_array_equal(values_of(grid, rows), quants.dequantize(raw, kind)[1:5])
    assert rows.codes.max() < 1 << grid.bits
    assert rows.scales.dtype == grid.scale_dtype
    assert not grid.symmetric or (rows.zero_points == 1 << (grid.bits - 1)).all()


def test_lattices_have_no_codes() -> None:
    assert block_codes(Kind.IQ2_XS) is None
    assert block_codes(Kind.F16) is None


@pytest.mark.parametrize(
    ("architecture", "turned"), [("llama", 0), ("gemma2", 0), ("gpt2", 8), ("lfm2", 0), ("bloom", 0)]
)
def test_codes_follow_rows_to_where_the_model_has_them(
    architecture: str, turned: int, tmp_path: Path
) -> None:
    tensors = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", architecture, Kind.Q4_1))).tensors
    grids = {n: i.codes() for n, i in tensors.infos().items() if i.codes is not None}
    assert sum(isinstance(grid, CodeGrid) and grid.turned for grid in grids.values()) == turned
    for name, grid in grids.items():
        assert isinstance(grid, CodeGrid), name
        outputs = tensors.infos()[name].shape[int(grid.turned)]
        values = values_of(grid, grid.read(3, outputs))
        expected = tensors.read(name)
        np.testing.assert_array_equal(values, (expected.T if grid.turned else expected)[3:])


def test_experts_say_why_they_have_none(tmp_path: Path) -> None:
    infos = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", "qwen3moe"))).tensors.infos()
    said = {i.codes() for n, i in infos.items() if "experts" in n and i.codes is not None}
    assert said == {"its inputs are rearranged"}


def info(name: str, rows: int, bits: int = 4) -> TensorInfo:
    codes = np.full((rows, 32), len(name), np.uint8) + np.arange(rows, dtype=np.uint8)[:, None]

    def read(start: int, stop: int) -> CodeRows:
        ones = np.ones((stop - start, 1))
        return CodeRows(codes[start:stop], ones.astype(np.uint8), ones.astype(np.float16))

    grid = CodeGrid(bits, 32, False, np.dtype(np.float16), read)
    return TensorInfo(name, (rows, 32), ir.DataType.FLOAT, lambda: grid)


def test_rows_of_two_tensors_interleaved() -> None:
    first, second = probe((4, 2)), probe((4, 2), 8)
    found = find_arrangement(np.stack([first, second], 1).reshape(8, 2), 2)
    codes = rearrange([info("a", 4), info("bb", 4)], found)
    assert codes is not None
    grid = codes()
    assert isinstance(grid, CodeGrid)
    assert grid.read(2, 7).codes[:, 0].tolist() == [2, 3, 3, 4, 4]


def test_what_is_no_arrangement_of_rows() -> None:
    values = probe((4, 2))
    assert find_arrangement(values - 1, 2) is None
    assert find_arrangement(values[:, ::-1], 2) is None
    assert find_arrangement(values.reshape(2, 2, 2), 2) is None
    parts = [info("a", 4), info("b", 4, bits=8)]
    codes = rearrange(parts, find_arrangement(probe((8, 2)), 2))
    assert codes is not None
    assert codes() == "its parts are quantized differently"
    floats = TensorInfo("f", (4, 32), ir.DataType.FLOAT)
    codes = rearrange([info("a", 4), floats], find_arrangement(probe((8, 2)), 2))
    assert codes is not None
    assert codes() == "f, which it is joined with, is not quantized"
    assert rearrange([floats], None) is None
