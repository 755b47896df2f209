"""Errors of stored integers, in steps between neighbouring codes."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Metric
from llmc.graph.weights import ScaledRows, ShiftedRows, StoredRows, TensorInfo
from llmc.validate.stored import Stored, read_stored
from llmc.validate.weights import compare_weights, parameters

#: The first block of each output is so quiet beside the second that 8 bits with one scale take it to zero.
LOUD = np.where(np.arange(64) < 32, 1e-4, 1.0).astype(np.float32)
WEIGHTS = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32) * LOUD
INFO = TensorInfo("w", WEIGHTS.shape, ir.DataType.FLOAT)
SCALES = np.abs(WEIGHTS).max(1) / 127
CODES = np.round(WEIGHTS / SCALES[:, None]).astype(np.int8)


class Store:
    def infos(self) -> dict[str, TensorInfo]:
        return {"w": INFO}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return WEIGHTS[start:stop]


def _measure(folder: Path, codes: np.ndarray, axis: int = 0) -> dict[Metric, Measurement]:
    """The measurements of a model that has the weights as `codes`, with a scale for each output."""
    nodes = [
        helper.make_node("DequantizeLinear", ["w.codes", "w.scales"], ["w"], axis=axis),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, None])] for name in "xy"
    )
    stored = [
        numpy_helper.from_array(codes, "w.codes"),
        numpy_helper.from_array(SCALES.astype(np.float32), "w.scales"),
    ]
    graph = helper.make_graph(nodes, "weights", inputs, outputs, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]), folder / "model.onnx")
    rows = {"w": StoredRows(Store(), INFO)}
    found = compare_weights(read_stored(folder, rows), rows).measurements
    return {each.metric: each for each in found}


@pytest.mark.parametrize("axis", [0, 1])
def test_rounding_costs_half_a_step_where_a_block_is_lost(axis: int, tmp_path: Path) -> None:
    found = _measure(tmp_path, CODES if axis == 0 else CODES.T.copy(), axis)
    wanted = float((np.abs(WEIGHTS - CODES * SCALES[:, None]) / SCALES[:, None]).max())
    steps, block = found[Metric.WEIGHTS_MAX_STEPS], found[Metric.WEIGHTS_BLOCK_SNR]
    assert steps.value == pytest.approx(wanted, abs=1e-4)
    assert 0.4 < wanted <= 0.5
    assert block.value is not None
    assert block.value < 0.1  # which no gate could tell from a block that was zeroed by mistake


def test_a_block_that_was_zeroed_is_many_steps_off(tmp_path: Path) -> None:
    zeroed = CODES.copy()
    zeroed[3, 32:] = 0
    value = _measure(tmp_path, zeroed)[Metric.WEIGHTS_MAX_STEPS].value
    assert value == pytest.approx(127)


def test_types_without_steps_are_not_measured(tmp_path: Path) -> None:
    codes = (WEIGHTS / SCALES[:, None]).astype(ml_dtypes.float8_e4m3fn)
    steps = _measure(tmp_path, codes)[Metric.WEIGHTS_MAX_STEPS]
    assert (steps.status, steps.value) == (MeasurementStatus.NOT_MEASURED, None)


def test_a_weight_without_axes_is_read_whole() -> None:
    tensor = Stored((), lambda start, stop: np.full(1, 0.5, np.float32)[start:stop])
    whole = tensor.whole()
    assert (whole.shape, float(whole)) == ((), 0.5)


def test_a_scaled_norm_has_the_value_that_the_artifact_rounds() -> None:
    """Gemma's norms compute with 1 + weight; scaled, they are other values, which bfloat16 rounds."""
    gain, info = WEIGHTS[0], TensorInfo("w", WEIGHTS[0].shape, ir.DataType.FLOAT)
    factors = np.linspace(0.5, 1.5, gain.size, dtype=np.float32)
    shifted = ShiftedRows(StoredRows(Store(), info), 1.0, ir.DataType.FLOAT)
    rounded = ((1 + gain) * factors - 1).astype(ml_dtypes.bfloat16).astype(np.float32)
    found = dict(parameters(ScaledRows(shifted, factors, 0), rounded + 1))
    np.testing.assert_allclose(found["w"], (rounded + 1) / factors - 1, atol=1e-6)
    assert not dict(parameters(shifted, gain + 1)), "unscaled, the original's own value is exact"
