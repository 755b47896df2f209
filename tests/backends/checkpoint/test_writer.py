"""Safetensors files as they are written: what safetensors reads back, offsets, several files, refusals."""

import json
import resource
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors import safe_open

from llmc.arrays import Array
from llmc.artifact.store.folder import digest_file
from llmc.backends.checkpoint.writer import INDEX, SINGLE, write_tensors
from llmc.backends.written import WrittenTensors
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.errors import GraphError, ResourceError


def group(**arrays: Array) -> WrittenTensors:
    specs = {name: (ir.DataType.from_numpy(each.dtype), each.shape) for name, each in arrays.items()}
    return WrittenTensors(specs, lambda: arrays)


def streamed(name: str, array: Array, rows: int) -> WrittenTensors:
    pieces = [array[i : i + rows] for i in range(0, len(array), rows)]
    specs = {name: (ir.DataType.from_numpy(array.dtype), array.shape)}
    return WrittenTensors(specs, lambda: {name: array}, rows=partial(iter, pieces))


RANDOM = np.random.default_rng(0)
ODD = RANDOM.normal(size=(3,)).astype(ml_dtypes.bfloat16)  # 6 bytes: what follows would not be aligned
ARRAYS: Mapping[str, Array] = {
    "odd": ODD,
    "scalar": np.float32(0.25).reshape(()),
    "packed": RANDOM.integers(-9, 9, (4, 6), np.int32),
    "shape": np.array([4, 48], np.int64),
    "scale": RANDOM.normal(size=(4, 3)).astype(ml_dtypes.bfloat16),
    "codes": RANDOM.normal(size=(4, 16)).astype(ml_dtypes.float8_e4m3fn),
    "copied": RANDOM.normal(size=(8, 4)).astype(np.float16),
}


def groups() -> list[WrittenTensors]:
    together = {name: ARRAYS[name] for name in ("scale", "shape", "packed", "scalar")}
    return [
        group(odd=ODD),
        group(**together),
        streamed("copied", ARRAYS["copied"], 3),
        group(codes=ARRAYS["codes"]),
    ]


def test_safetensors_reads_back_every_bit(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    digests = write_tensors(groups(), tmp_path, lambda done, total: seen.append((done, total)))
    assert digests == {SINGLE: digest_file(tmp_path / SINGLE)}
    total = sum(each.nbytes for each in ARRAYS.values())
    assert seen[-1] == (total, total)
    assert {each for _, each in seen} == {total}
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(ARRAYS)
    store = SafetensorsStore.open(tmp_path)
    for name, array in ARRAYS.items():
        assert store.read(name).tobytes() == array.tobytes(), name
        assert store.read(name).dtype == array.dtype


def test_every_tensor_begins_at_a_multiple_of_its_element(tmp_path: Path) -> None:
    write_tensors(groups(), tmp_path)
    data = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for name, array in ARRAYS.items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0, name
    assert list(header)[1:] == ["scale", "shape", "packed", "copied", "codes", "scalar", "odd"]


def test_files_are_cut_between_computations_and_indexed(tmp_path: Path) -> None:
    digests = write_tensors(groups(), tmp_path, file_bytes=150)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(digests) == sorted([*names, INDEX])
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in ARRAYS.values())
    placed = index["weight_map"]
    assert len({placed[name] for name in ("scale", "shape", "packed", "scalar")}) == 1
    assert set(placed) == set(ARRAYS)
    store = SafetensorsStore.open(tmp_path)
    assert all(store.read(name).tobytes() == array.tobytes() for name, array in ARRAYS.items())
    assert all(digest == digest_file(tmp_path / name) for name, digest in digests.items())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ((ir.DataType.FLOAT, (2, 2)), r"a is computed as float32 \(4,\), and float32 \(2, 2\) is declared"),
        ((ir.DataType.FLOAT16, (4,)), r"a is computed as float32 \(4,\), and float16 \(4,\) is declared"),
    ],
)
def test_a_value_that_is_not_as_declared_is_refused(
    tmp_path: Path, spec: tuple[ir.DataType, tuple[int, ...]], message: str
) -> None:
    wrong = WrittenTensors({"a": spec}, lambda: {"a": np.zeros(4, np.float32)})
    with pytest.raises(GraphError, match=message):
        write_tensors([wrong], tmp_path)


def test_rows_that_are_missing_are_refused(tmp_path: Path) -> None:
    short = WrittenTensors(
        {"a": (ir.DataType.FLOAT, (4, 2))}, dict, rows=lambda: iter([np.zeros((3, 2), np.float32)])
    )
    with pytest.raises(GraphError, match="a has 24 bytes, and 32 are declared"):
        write_tensors([short], tmp_path)


def test_a_tensor_that_no_computation_gives_is_refused(tmp_path: Path) -> None:
    empty = WrittenTensors({"a": (ir.DataType.FLOAT, (2,))}, dict)
    with pytest.raises(GraphError, match="the computation of a gives no a"):
        write_tensors([empty], tmp_path)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    large = WrittenTensors({"a": (ir.DataType.FLOAT, (1 << 50,))}, dict)
    with pytest.raises(ResourceError, match="bytes free, but the build writes"):
        write_tensors([large], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_full_disk_in_the_middle_of_a_file_is_a_resource_error(is_streamed: bool, tmp_path: Path) -> None:
    rows = np.ones((1024, 16), np.float32)
    large = streamed("large", rows, 64) if is_streamed else group(large=rows)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(ResourceError, match=r"model\.safetensors cannot be written: File too large"):
            write_tensors([large], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
