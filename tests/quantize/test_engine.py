"""Matrices for TensorRT: codes and scales, what the operators make of them, what is refused."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from llmc.config import Dtype, EngineRule, EngineScheme, WeightFormat, WeightRole
from llmc.errors import UnsupportedError
from llmc.quantize.engine import encode, quantize_for_engine
from llmc.validate.static_session import StaticOrtModel
from tests.lowering import lower, write_lowered

INT4 = EngineRule(scheme=EngineScheme(format=WeightFormat.INT4, block_size=16))
INT8 = EngineRule(scheme=EngineScheme(format=WeightFormat.INT8))


def _noise(weights: np.ndarray, kind: WeightFormat, block: int) -> float:
    """Signal-to-noise ratio in dB."""
    codes, scales = encode(weights, kind, block, ir.DataType.FLOAT16)
    back = codes.astype(np.float32) * np.repeat(scales.astype(np.float32), block, axis=1)
    return 10 * np.log10(np.square(weights).sum() / np.square(weights - back).sum())


def test_codes_and_scales() -> None:
    weights = np.random.default_rng(0).normal(size=(48, 128)).astype(np.float32)
    codes, scales = encode(weights, WeightFormat.INT4, 32, ir.DataType.FLOAT16)
    assert codes.shape == (48, 128)
    assert scales.shape == (48, 4)
    assert scales.dtype == np.float16
    assert (scales > 0).all()
    assert codes.min() >= -8
    assert codes.max() <= 7
    codes, scales = encode(weights, WeightFormat.INT8, 128, ir.DataType.FLOAT16)
    assert scales.shape == (48, 1)
    assert codes.min() >= -127
    assert _noise(weights, WeightFormat.INT4, 32) > 19.5
    assert _noise(weights, WeightFormat.INT8, 128) > 40


def test_a_block_of_zeros_has_codes_of_zero() -> None:
    codes, scales = encode(np.zeros((2, 32), np.float32), WeightFormat.INT4, 16, ir.DataType.FLOAT16)
    assert not codes.any()
    assert (scales == 1).all()


@pytest.mark.parametrize(
    ("model_type", "rule", "least_db"), [("llama", INT8, 25), ("llama", INT4, 6), ("gemma2", INT8, 25)]
)
def test_the_graph_computes_with_them(
    model_type: str, rule: EngineRule, least_db: float, tmp_path: Path
) -> None:
    ids = np.arange(3, 20)[None]
    logits = []
    for name, rules in (("float", ()), ("quantized", (rule,))):
        folder = tmp_path / name
        folder.mkdir()
        interface = write_lowered(folder, model_type, Dtype.FLOAT32, rules)
        logits.append(StaticOrtModel(folder, interface, threads=1).prefill(ids, steps=0))
    noise = np.square(logits[0] - logits[1]).sum()
    assert noise > 0
    assert 10 * np.log10(np.square(logits[0]).sum() / noise) > least_db
    assert (tmp_path / "quantized/model.onnx.data").stat().st_size < (
        tmp_path / "float/model.onnx.data"
    ).stat().st_size / 2


def test_a_tied_table_is_stored_once_as_the_products_take_it() -> None:
    graph, _ = lower("gemma2", Dtype.FLOAT16)
    (head,) = (t for t in quantize_for_engine(graph, (INT8,)) if t.role is WeightRole.LM_HEAD)
    codes = graph.graph.initializers[f"{head.name}.codes"]
    assert codes.shape == head.shape[::-1]
    ((dequantize, _),) = codes.uses()
    assert {u.op_type: u.attributes.get_int("axis", 0) for u, _ in dequantize.outputs[0].uses()} == {
        "Gather": 1,
        "MatMul": 0,
    }


def test_rules_by_role_and_a_ledger() -> None:
    graph, _ = lower("llama", Dtype.FLOAT16)
    head = EngineRule(role=WeightRole.LM_HEAD, scheme=None)
    stored = {t.name: t for t in quantize_for_engine(graph, (head, INT8))}
    assert stored["lm_head.weight"].scheme is None
    query = stored["model.layers.0.self_attn.q_proj.weight"]
    assert query.scheme == INT8.scheme
    assert query.bytes == 64 * 64 + 2 * 64


def test_blocks_that_do_not_fit_are_refused() -> None:
    graph, _ = lower("llama", Dtype.FLOAT16)
    rule = EngineRule(scheme=EngineScheme(format=WeightFormat.INT4, block_size=128))
    message = "int4 by block of 128 needs input features divisible by 128; .* has 64"
    with pytest.raises(UnsupportedError, match=message) as caught:
        quantize_for_engine(graph, (rule,))
    assert caught.value.hint == "use a block of 64"


def test_formats_without_an_encoding_are_refused() -> None:
    graph, _ = lower("llama", Dtype.FLOAT16)
    rule = EngineRule(scheme=EngineScheme(format=WeightFormat.FP8))
    with pytest.raises(UnsupportedError, match="cannot be stored as fp8"):
        quantize_for_engine(graph, (rule,))


def test_block_sizes_belong_to_int4() -> None:
    with pytest.raises(ValidationError, match="block_size goes with int4"):
        EngineScheme(format=WeightFormat.INT8, block_size=32)
    with pytest.raises(ValidationError, match="block_size goes with int4"):
        EngineScheme(format=WeightFormat.INT4)
