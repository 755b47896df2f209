"""Graphs as others that the CPU can compute: what is the same, and what is left out on purpose."""

from pathlib import Path

import numpy as np
import pytest

from llmc.backends.model_file import write_model
from llmc.config import Dtype, EngineRule, EngineScheme, WeightFormat
from llmc.quantize.activations import InputRange, plan_inputs
from llmc.quantize.engine import quantize_for_engine
from llmc.runtime.static_ort_model import StaticOrtModel
from tests.lowering import lower, write_lowered

IDS = np.arange(3, 20)[None]


def _logits(folder: Path, dtype: Dtype, rule: EngineRule | None, *, exact: bool) -> tuple[np.ndarray, str]:
    folder.mkdir()
    graph, _ = lower("llama", dtype, "pack-shared")
    if rule is not None:
        # A range that leaves next to nothing of any activation.
        ranges = {plan.sources[0]: InputRange(1e-3, None, 0.0) for plan in plan_inputs(graph, (rule,))}
        quantize_for_engine(graph, (rule,), ranges)
    write_model(graph.model, folder)
    model = StaticOrtModel(folder, graph.interface(), threads=1, exact=exact)
    return model.prefill(IDS, steps=0), model.where


@pytest.mark.parametrize(
    ("kind", "activations", "near"),
    [(WeightFormat.INT8, "static", 0.4), (WeightFormat.NVFP4, "dynamic", 4.0)],
)
def test_exact_leaves_activations_as_they_come(
    kind: WeightFormat, activations: str, near: float, tmp_path: Path
) -> None:
    plain, _ = _logits(tmp_path / "plain", Dtype.FLOAT32, None, exact=False)
    rule = EngineRule(scheme=EngineScheme.model_validate({"format": kind, "activations": activations}))
    rounded, where = _logits(tmp_path / "rounded", Dtype.FLOAT16, rule, exact=False)
    assert ("NVFP4 by arithmetic" in where) == (kind is WeightFormat.NVFP4)
    exact, where = _logits(tmp_path / "exact", Dtype.FLOAT16, rule, exact=True)
    assert "unrounded activations" in where
    assert where.endswith("in float32")
    # What is left are quantized weights.
    difference = np.abs(exact - plain).max()
    assert difference < near
    assert np.abs(rounded - plain).max() > 1.5 * difference


@pytest.mark.parametrize("dtype", [Dtype.FLOAT16, Dtype.BFLOAT16])
def test_half_precision_in_float32(dtype: Dtype, tmp_path: Path) -> None:
    plain, _ = _logits(tmp_path / "plain", Dtype.FLOAT32, None, exact=False)
    (tmp_path / "half").mkdir()
    interface = write_lowered(tmp_path / "half", "llama", dtype)
    model = StaticOrtModel(tmp_path / "half", interface, threads=1, exact=True)
    assert {spec.dtype for spec in model.interface.outputs} == {"float32"}
    assert np.abs(model.prefill(IDS, steps=0) - plain).max() < (0.03 if dtype is Dtype.FLOAT16 else 0.2)


def test_a_graph_in_float32_is_taken_as_it_is(tmp_path: Path) -> None:
    _, where = _logits(tmp_path / "plain", Dtype.FLOAT32, None, exact=True)
    assert where.startswith("onnxruntime")
    assert "," not in where
