"""Tensors of a checkpoint artifact are compared with a build's by name, type, shape and bits."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from llmc.arrays import Array
from llmc.artifact.verdict import Measurement
from llmc.backends.written import WrittenTensors
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.validate.exact_checkpoint import measure_files

TENSORS: dict[str, Array] = {
    "a.weight_packed": np.arange(12, dtype=np.int32).reshape(3, 4),
    "a.weight_scale": np.linspace(1, 2, 6, dtype=np.float32).reshape(3, 2).astype(ml_dtypes.bfloat16),
    "norm.weight": np.array([1.0, -0.0, 2.0], np.float16),
    "a.input_scale": np.array(0.5, np.float32),
}
TYPES = {
    "int32": ir.DataType.INT32,
    "bfloat16": ir.DataType.BFLOAT16,
    "float16": ir.DataType.FLOAT16,
    "float32": ir.DataType.FLOAT,
}


def written(tensors: Mapping[str, Array]) -> list[WrittenTensors]:
    """A matrix of several tensors, and the others one by one."""

    def group(names: list[str], weight: str | None) -> WrittenTensors:
        specs = {name: (TYPES[tensors[name].dtype.name], tensors[name].shape) for name in names}
        return WrittenTensors(specs, lambda: {name: tensors[name] for name in names}, weight)

    matrix = [name for name in tensors if name.startswith("a.")]
    return [group(matrix, "a.weight"), *(group([name], None) for name in tensors if name not in matrix)]


def compare(folder: Path, stored: Mapping[str, Array], unknown: tuple[str, ...] = ()) -> Measurement:
    save_file({name: a.copy() for name, a in stored.items()}, folder / "model.safetensors")
    return measure_files(SafetensorsStore.open(folder), written(TENSORS), lambda name, _: name in unknown)


@dataclass(frozen=True)
class Fault:
    stored: dict[str, Array]
    said: str


def changed(name: str, index: int) -> dict[str, Array]:
    array = TENSORS[name].copy()
    array.reshape(-1).view(f"u{array.dtype.itemsize}")[index] ^= 1
    return {**TENSORS, name: array}


def without(name: str) -> dict[str, Array]:
    return {other: array for other, array in TENSORS.items() if other != name}


FAULTS = {
    "one bit of a word": Fault(
        changed("a.weight_packed", 6),
        "a.weight_packed differs in 1 of 12 elements, "
        r"first at \[1, 2\]",
    ),
    "one bit of a scale": Fault(changed("a.weight_scale", 5), r"a.weight_scale differs in 1 of 6 .*\[2, 1\]"),
    "the sign of zero": Fault(
        {**TENSORS, "norm.weight": np.array([1.0, 0.0, 2.0], np.float16)}, "norm.weight differs in 1 of 3"
    ),
    "missing": Fault(without("norm.weight"), "norm.weight is missing"),
    "added": Fault({**TENSORS, "b.weight": np.ones(2, np.float32)}, "b.weight is not written by a build"),
    "another type": Fault(
        {**TENSORS, "norm.weight": TENSORS["norm.weight"].astype(np.float32)},
        r"norm.weight is FLOAT \[3\], not FLOAT16 \[3\]",
    ),
    "another shape": Fault(
        {**TENSORS, "a.weight_packed": TENSORS["a.weight_packed"].reshape(4, 3)},
        r"a.weight_packed is INT32 \[4, 3\], not INT32 \[3, 4\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_a_difference_is_named(fault: Fault, tmp_path: Path) -> None:
    found = compare(tmp_path, fault.stored)
    assert found.value == 1
    assert re.search(fault.said, found.detail)


def test_equal_files_have_no_difference(tmp_path: Path) -> None:
    found = compare(tmp_path, TENSORS)
    assert (found.value, found.detail) == (0, "4 tensors of the files equal those of a build, bit for bit")


def test_a_renamed_tensor_is_missing_and_added(tmp_path: Path) -> None:
    stored = {**without("norm.weight"), "norm.wieght": TENSORS["norm.weight"]}
    found = compare(tmp_path, stored)
    assert found.value == 2
    assert found.detail == "2 of 4 differ: norm.weight is missing; norm.wieght is not written by a build"


def test_what_calibration_decided_is_compared_by_type_and_shape(tmp_path: Path) -> None:
    packed = changed("a.weight_packed", 0)
    assert compare(tmp_path, packed, ("a.weight_scale",)).value == 1
    found = compare(tmp_path, packed, ("a.weight_packed", "a.input_scale"))
    assert found.value == 0
    assert found.detail.endswith("; compared by type and shape, as their calibration is not known here: 2")


def test_rows_are_compared_a_few_at_a_time(tmp_path: Path) -> None:
    table = np.arange(60, dtype=np.float32).reshape(20, 3)
    specs = {"t": (ir.DataType.FLOAT, table.shape)}
    rows = WrittenTensors(specs, dict, rows=lambda: iter(np.array_split(table, 3)))
    for row, said in (
        (None, "1 tensors of the files equal"),
        (13, r"t differs in 1 of 60 .* first at \[13, 0\]"),
    ):
        stored = table.copy()
        if row is not None:
            stored[row, 0] += 1
        save_file({"t": stored}, tmp_path / "model.safetensors")
        found = measure_files(SafetensorsStore.open(tmp_path), [rows], lambda *_: False)
        assert re.search(said, found.detail)
