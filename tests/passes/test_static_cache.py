"""Lowering to a KV cache of fixed length: counts, what is left, the numbers of PyTorch, refusals."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from llmc.backends.model_file import write_model
from llmc.config import Dtype, Metric
from llmc.errors import GraphError, UnsupportedError
from llmc.graph.edit import Site
from llmc.graph.model import Graph
from llmc.graph.verify import verify_graph
from llmc.passes import registered_passes
from llmc.runtime.static_ort_model import StaticOrtModel
from llmc.validate.reference import TorchModel
from tests.lowering import CAPACITY, lower, tiny, write_lowered
from tests.passes.harness import LAYERS, chunked_attention, operators, shared_cache
from tests.state_store import run_steps
from tests.validate.levels import parity_of


def _parity(folder: Path, model_type: str, dtype: Dtype) -> dict[Metric, float | None]:
    interface = write_lowered(folder, model_type, dtype)
    model = StaticOrtModel(folder, interface, threads=1)
    tokens = np.random.default_rng(0).integers(3, 250, 200)
    measured = parity_of(model, TorchModel(tiny(model_type)), tokens).measure()
    return {m.metric: m.value for m in measured}


def _below(values: dict[Metric, float | None], limit: float, *metrics: Metric) -> bool:
    """Whether each was measured and lies below `limit`."""
    found = [values[metric] for metric in metrics]
    return all(value is not None and value < limit for value in found)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "mixtral"])
def test_the_lowered_graph_has_the_numbers_of_the_original(model_type: str, tmp_path: Path) -> None:
    values = _parity(tmp_path, model_type, Dtype.FLOAT32)
    limits = (Metric.PREFILL_MAX_ABS, Metric.DECODE_MAX_ABS, Metric.RAGGED_MAX_ABS)
    assert _below(values, 1e-4, *limits), values
    window = values[Metric.WINDOW_MAX_ABS]
    assert (window is not None) == (model_type != "llama")
    assert window is None or window < 1e-4


@pytest.mark.parametrize("make", [shared_cache, chunked_attention])
def test_shared_slots_and_chunks_have_the_numbers_of_the_dialect(
    make: Callable[[], Graph], tmp_path: Path
) -> None:
    before, after = make(), make()
    after.max_length = 32
    for name in ("rotary-embedding", "static-cache"):
        registered_passes()[name].run(after)
    verify_graph(after)
    assert operators(after)["TensorScatter"] == 2 * len(after.cache)
    write_model(after.model, tmp_path)
    model = StaticOrtModel(tmp_path, after.interface(), threads=1)
    ids = np.random.default_rng(0).integers(3, 250, (2, 16))
    mask = np.ones_like(ids)
    mask[0, 5:11] = 0
    logits = [model.prefill(ids[:, :11], mask[:, :11], steps=5)]
    logits += [model.decode(ids[:, i : i + 1]) for i in range(11, 16)]
    expected = run_steps(before, ids, mask, np.clip(mask.cumsum(1) - 1, 0, None), prompt=11)
    np.testing.assert_allclose(np.concatenate(logits, 1)[mask == 1], expected[mask == 1], atol=1e-4)


def test_fused_attention_has_the_numbers_of_the_original(tmp_path: Path) -> None:
    values = _parity(tmp_path, "mistral", Dtype.FLOAT16)
    limits = (Metric.PREFILL_MAX_ABS, Metric.DECODE_MAX_ABS, Metric.RAGGED_MAX_ABS, Metric.WINDOW_MAX_ABS)
    assert _below(values, 0.1, *limits), values


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_graph_in_bfloat16_is_computed_in_float32(model_type: str, tmp_path: Path) -> None:
    interface = write_lowered(tmp_path, model_type, Dtype.BFLOAT16)
    assert {spec.dtype for spec in interface.inputs} == {"int64", "bfloat16"}
    before = sorted(path.name for path in tmp_path.iterdir())
    model = StaticOrtModel(tmp_path, interface, threads=1)
    assert model.where.endswith(", in float32")
    rounded = tiny(model_type).__class__(tiny(model_type).config)
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in tiny(model_type).state_dict().items()})
    tokens = np.random.default_rng(0).integers(3, 250, 200)
    measured = {m.metric: m.value for m in parity_of(model, TorchModel(rounded.eval()), tokens).measure()}
    # Weights are equal; cosines and sines, which are part of the graph, stay rounded to bfloat16.
    limits = (Metric.PREFILL_MAX_ABS, Metric.DECODE_MAX_ABS, Metric.RAGGED_MAX_ABS)
    assert _below(measured, 0.1, *limits), measured
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_attention_is_fused_in_half_precision() -> None:
    graph, reports = lower("llama", Dtype.FLOAT16)
    report = reports["static-cache"]
    assert report.refusals == ()
    assert report.applied == (0, 1, 2)
    found = operators(graph)
    assert found["Attention"] == LAYERS
    assert found["TensorScatter"] == 2 * LAYERS
    assert found["RMSNormalization"] == 2 * LAYERS + 1
    assert found["RotaryEmbedding"] == 2 * LAYERS
    assert not {"CachedAttention", "ReduceMean", "Neg", "Concat"} & set(found)
    assert graph.model.opset_imports[""] == 24
    assert not graph.model.functions


def test_the_interface_is_static() -> None:
    interface = lower("mistral", Dtype.FLOAT16)[0].interface()
    shapes = {spec.name: spec.shape for spec in interface.inputs}
    assert list(shapes)[:2] == ["input_ids", "write_indices"]
    assert not {"attention_mask", "position_ids"} & set(shapes)
    assert shapes["past_key_values.0.key"] == ("batch", 2, CAPACITY, 16)
    assert interface.static_cache
    assert interface.padding == "right"


def test_what_has_no_kernel_is_spelled_out_by_layer() -> None:
    graph, reports = lower("gemma2", Dtype.FLOAT16)
    refusals = reports["static-cache"].refusals
    assert [(r.code, r.layer) for r in refusals] == [("softcap", i) for i in range(LAYERS)]
    assert "scores are capped at 50; no kernel caps" in refusals[0].reason
    assert operators(graph)["Softmax"] == LAYERS
    assert "Attention" not in operators(graph)
    _, reports = lower("llama", Dtype.FLOAT32)
    assert {r.code for r in reports["static-cache"].refusals} == {"float32-attention"}


def test_a_graph_without_a_largest_length_is_refused() -> None:
    with pytest.raises(GraphError, match="needs the graph's largest length, but it has none"):
        lower("gpt2", Dtype.FLOAT32, capacity=None)


def test_a_mask_that_others_read_is_refused() -> None:
    graph, _ = lower("llama", Dtype.FLOAT32, last="rotary-embedding")
    mask = next(v for v in graph.graph.inputs if v.name == "attention_mask")
    logits = next(v for v in graph.graph.outputs if v.name == "logits")
    head = logits.producer()
    assert head is not None
    site = Site(graph.graph, head)
    summed = site.emit(
        "ReduceSum", [mask], "total", attributes={"keepdims": 0}, shape=[], dtype=ir.DataType.INT64
    )
    cast = site.emit("Cast", summed.outputs, "real", attributes={"to": 1}, shape=[], dtype=ir.DataType.FLOAT)
    hidden = head.inputs[0]
    scaled = site.emit("Mul", [hidden, cast.outputs[0]], "scaled", like=hidden)
    head.replace_input_with(0, scaled.outputs[0])
    with pytest.raises(UnsupportedError, match=r"total/ReduceSum \(ReduceSum\) reads attention_mask outside"):
        registered_passes()["static-cache"].run(graph)
