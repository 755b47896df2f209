"""Matrices for TensorRT: codes and scales, what the operators make of them, what is refused."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from pydantic import ValidationError

from llmc.backends.model_file import write_model
from llmc.config import Dtype, EngineRule, EngineScheme, WeightFormat, WeightRole
from llmc.errors import UnsupportedError
from llmc.graph.model import Graph
from llmc.graph.verify import verify_graph
from llmc.quantize.activations import InputRange, plan_inputs
from llmc.quantize.engine import quantize_for_engine
from llmc.runtime.computable import computable
from llmc.runtime.static_ort_model import StaticOrtModel
from tests.lowering import lower, write_lowered

INT4 = EngineRule(scheme=EngineScheme(format=WeightFormat.INT4, block_size=16))
INT8 = EngineRule(scheme=EngineScheme(format=WeightFormat.INT8))
FP8 = EngineRule(scheme=EngineScheme(format=WeightFormat.FP8))
NVFP4 = EngineRule(scheme=EngineScheme(format=WeightFormat.NVFP4))
W8A8 = EngineRule(scheme=EngineScheme(format=WeightFormat.INT8, activations="static"))
W4A4 = EngineRule(scheme=EngineScheme(format=WeightFormat.NVFP4, activations="dynamic"))


@pytest.mark.parametrize(
    ("model_type", "rule", "least_db"),
    [
        ("llama", INT8, 25),
        ("llama", INT4, 6),
        ("gemma2", INT8, 25),
        ("llama", FP8, 15),
        ("llama", NVFP4, 5),
    ],
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
    (head,) = (t for t in quantize_for_engine(graph, (INT8,), None)[0] if t.role is WeightRole.LM_HEAD)
    codes = graph.graph.initializers[f"{head.name}.codes"]
    assert codes.shape == head.shape[::-1]
    ((dequantize, _),) = codes.uses()
    assert {u.op_type: u.attributes.get_int("axis", 0) for u, _ in dequantize.outputs[0].uses()} == {
        "Gather": 1,
        "MatMul": 0,
    }


def _ranges(graph: Graph, rule: EngineRule, peak: float, snr_db: float = 40) -> dict[str, InputRange]:
    return {plan.sources[0]: InputRange(peak, None, snr_db) for plan in plan_inputs(graph, (rule,))}


def test_a_static_activation_is_rounded_by_its_range() -> None:
    graph, _ = lower("llama", Dtype.FLOAT16, "pack-shared")
    _, kept = quantize_for_engine(graph, (W8A8,), _ranges(graph, W8A8, 2.54))
    verify_graph(graph)
    assert kept == ()
    quantize = [n for n in graph.graph if n.op_type == "QuantizeLinear"]
    assert len(quantize) == 4 * 3 + 1  # one for the products that share an activation
    for node in quantize:
        scale, zero = (v.const_value for v in node.inputs[1:] if v is not None)
        assert (scale.numpy(), scale.dtype) == (np.float16(0.02), ir.DataType.FLOAT16)  # type: ignore[union-attr]
        assert (zero.numpy(), zero.dtype) == (0, ir.DataType.INT8)  # type: ignore[union-attr]
        ((back, _),) = node.outputs[0].uses()
        assert back.op_type == "DequantizeLinear"
        assert {user.op_type for user, _ in back.outputs[0].uses()} == {"MatMul"}


def test_what_does_not_bear_it_stays_in_float() -> None:
    graph, _ = lower("llama", Dtype.FLOAT16, "pack-shared")
    ranges = _ranges(graph, W8A8, 1.0)
    down = "model.layers.1.mlp.down_proj.weight"
    ranges[down] = InputRange(1.0, None, 9.5)
    del ranges["lm_head.weight"]
    stored, kept = quantize_for_engine(graph, (W8A8,), ranges, 12)
    assert {each.weight: each.reason for each in kept} == {
        down: "9.5 dB as int8, less than 12",
        "lm_head.weight": "calibration did not see its input",
    }
    assert sum(n.op_type == "QuantizeLinear" for n in graph.graph) == 4 * 3 - 1
    assert all(t.scheme == W8A8.scheme for t in stored)  # their weights are int8 all the same


def test_dynamic_activations_are_spelled_for_the_cpu(tmp_path: Path) -> None:
    """Against the definition of NVFP4 by ml_dtypes, through the first product of the graph."""
    graph, _ = lower("llama", Dtype.FLOAT32, "pack-shared")
    quantize_for_engine(graph, (W4A4,), _ranges(graph, W4A4, 3.0))
    verify_graph(graph)
    first = next(n for n in graph.graph if n.op_type == "TRT_FP4DynamicQuantize")
    given, (back,) = first.inputs[0], [u for u, _ in first.outputs[0].uses()]
    for value in (given, back.outputs[0]):
        graph.graph.outputs.append(value)
    names = [str(v.name) for v in (given, back.outputs[0]) if v is not None]
    write_model(graph.model, tmp_path)
    with computable(tmp_path, graph.interface()) as (folder, _, done):
        assert done == "NVFP4 by arithmetic"
        session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        feeds = {
            i.name: np.zeros([d if isinstance(d, int) else 1 for d in i.shape], np.float32)
            for i in session.get_inputs()
        }
        feeds |= {"input_ids": np.arange(3, 20)[None], "write_indices": np.zeros(1, np.int64)}
        before, after = session.run(names, feeds)
    whole = np.float32(3.0 / (6 * 448))
    blocks = before.reshape(-1, 16)
    scale = np.minimum(np.abs(blocks).max(axis=1, keepdims=True) / 6 / whole, 448).astype(
        ml_dtypes.float8_e4m3fn
    )
    real = scale.astype(np.float32) * whole
    codes = np.clip(blocks / real, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    close = np.isclose(after, (codes * real).reshape(before.shape), rtol=1e-5)
    assert close.mean() > 0.995  # where a quotient lies between two codes the last bit decides
    assert not np.array_equal(before, after)


def test_rules_by_role_and_a_ledger() -> None:
    graph, _ = lower("llama", Dtype.FLOAT16)
    head = EngineRule(role=WeightRole.LM_HEAD, scheme=None)
    stored = {t.name: t for t in quantize_for_engine(graph, (head, INT8), None)[0]}
    assert stored["lm_head.weight"].scheme is None
    query = stored["model.layers.0.self_attn.q_proj.weight"]
    assert query.scheme == INT8.scheme
    assert query.bytes == 64 * 64 + 2 * 64


def test_blocks_that_do_not_fit_are_refused() -> None:
    graph, _ = lower("llama", Dtype.FLOAT16)
    rule = EngineRule(scheme=EngineScheme(format=WeightFormat.INT4, block_size=128))
    message = "int4 by block of 128 needs input features divisible by 128; .* has 64"
    with pytest.raises(UnsupportedError, match=message) as caught:
        quantize_for_engine(graph, (rule,), None)
    assert caught.value.hint == "use a block of 64"


def test_activations_go_with_their_format() -> None:
    with pytest.raises(ValidationError, match="int4 supports activations float, not static"):
        EngineScheme(format=WeightFormat.INT4, block_size=32, activations="static")
    with pytest.raises(ValidationError, match="nvfp4 supports activations dynamic or float, not static"):
        EngineScheme(format=WeightFormat.NVFP4, activations="static")


def test_block_sizes_belong_to_int4() -> None:
    with pytest.raises(ValidationError, match="block_size is required for int4"):
        EngineScheme(format=WeightFormat.INT8, block_size=32)
    with pytest.raises(ValidationError, match="block_size is required for int4"):
        EngineScheme(format=WeightFormat.INT4)
