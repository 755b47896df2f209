"""Stacked matrices of experts as QMoE, against the float operator on the weights that are read back."""

import numpy as np
import onnx_ir as ir
import pytest
from transformers import PreTrainedModel

from llmc.arrays import Array
from llmc.config import Dtype, Quantization, WeightRole
from llmc.errors import UnsupportedError
from llmc.graph.linear import find_linears
from llmc.graph.model import Graph
from llmc.graph.serial import load_graph
from llmc.graph.verify import verify_graph
from llmc.graph.weights import LazyWeight, WeightGroup
from llmc.passes import registered_passes
from llmc.quantize.blocks import dequantize_blocks
from llmc.quantize.encode import quantize_blocks
from llmc.quantize.linear import quantize_weights
from llmc.runtime.stacks import in_float32
from tests.caches import shared_trace
from tests.models import build_tiny_model
from tests.quantize.reference import scheme
from tests.state_store import StateStore, run_steps

LAYERS = 3


def _lowered(model: PreTrainedModel) -> Graph:
    graph = load_graph(shared_trace(model.config, Dtype.FLOAT32))
    graph.bind(StateStore(model), {})
    registered_passes()["experts"].run(graph)
    return graph


def _rules(**kind: object) -> Quantization:
    rules = ({"role": "experts", "scheme": scheme(**kind)},)  # type: ignore[arg-type]
    return Quantization.model_validate({"accuracy_level": 0, "rules": rules})


def _logits(graph: Graph) -> Array:
    ids = np.random.default_rng(0).integers(3, 250, (2, 12))
    return run_steps(graph, ids, np.ones_like(ids), np.tile(np.arange(12), (2, 1)), prompt=10)


def _read_back(model: PreTrainedModel, transposed: bool, **kind: object) -> None:
    """Give the experts of `model` the weights that their codes stand for."""
    import torch

    for name, parameter in model.named_parameters():
        if "experts" in name and parameter.ndim == 3:
            for expert in parameter.data:
                rows = (expert.T if transposed else expert).contiguous().numpy()
                read = dequantize_blocks(quantize_blocks(rows, scheme(**kind)))  # type: ignore[arg-type]
                expert.copy_(torch.from_numpy(read.T.copy() if transposed else read))


@pytest.mark.parametrize(
    ("model_type", "symmetric"), [("mixtral", False), ("qwen3_moe", True), ("gpt_oss", False)]
)
def test_computes_with_the_dequantized_weights(model_type: str, symmetric: bool) -> None:
    model = build_tiny_model(model_type)
    graph = _lowered(model)
    report = quantize_weights(graph, _rules(block_size=32, symmetric=symmetric), Dtype.FLOAT32)
    verify_graph(graph)
    assert [n.op_type for n in graph.graph].count("QMoE") == LAYERS
    stored = [t for t in report.tensors if t.role is WeightRole.EXPERTS]
    assert len(stored) == 2 * LAYERS
    assert all(t.scheme == scheme(4, 32, symmetric) for t in stored)
    _read_back(model, model_type == "gpt_oss", bits=4, block_size=32, symmetric=symmetric)
    np.testing.assert_allclose(_logits(graph), _logits(_lowered(model)), atol=1e-4)


def test_eight_bits_take_int8_activations() -> None:
    model = build_tiny_model("mixtral", num_hidden_layers=1)
    graph = _lowered(model)
    quantize_weights(graph, _rules(bits=8, block_size=32), Dtype.FLOAT32)
    found, expected = _logits(graph), _logits(_lowered(model))
    assert 0 < np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected)


def test_a_block_size_that_does_not_divide_is_made_smaller() -> None:
    graph = _lowered(build_tiny_model("mixtral", num_hidden_layers=1))
    report = quantize_weights(graph, _rules(block_size=128), Dtype.FLOAT32)
    assert report.notes == (
        "experts are stored by block of 32: 128 does not divide both 64 and 96 input features",
    )
    assert {t.scheme.block_size for t in report.tensors if t.scheme} == {32}


def test_without_a_common_block_size_experts_stay_in_float() -> None:
    graph = _lowered(build_tiny_model("mixtral", num_hidden_layers=1, intermediate_size=24))
    report = quantize_weights(graph, _rules(block_size=32), Dtype.FLOAT32)
    assert report.notes == ("experts stay in float: 64 and 24 input features have no block size in common",)
    assert [n.op_type for n in graph.graph].count("MoE") == 1
    assert {t.scheme for t in report.tensors} == {None}


def test_kernels_for_cuda_take_codes_in_their_stated_order_and_whole_tiles() -> None:
    def quantized(inner: int, **kind: object) -> tuple[ir.Node, tuple[str, ...]]:
        model = build_tiny_model("mixtral", num_hidden_layers=1, intermediate_size=inner)
        graph = load_graph(shared_trace(model.config, Dtype.FLOAT16))
        graph.bind(StateStore(model), {})
        registered_passes()["experts"].run(graph)
        notes = quantize_weights(graph, _rules(**kind), Dtype.FLOAT16).notes
        return next(n for n in graph.graph if n.op_type in ("MoE", "QMoE")), notes

    node, notes = quantized(128, block_size=32)
    assert (node.op_type, notes) == ("QMoE", ())
    assert node.attributes["weights_prepacked"].as_int() == 0
    node, notes = quantized(96, block_size=32)
    assert node.op_type == "MoE"
    assert notes == (
        "experts stay in float: kernels for CUDA take multiples of 64 input features, here 64 and 96",
    )
    node, notes = quantized(128, block_size=16)
    assert node.op_type == "MoE"
    assert notes == ("experts stay in float: kernels for CUDA take blocks of 32 and more, not of 16",)


def test_eight_bits_in_float16_are_read_back_in_float16() -> None:
    model = build_tiny_model("mixtral", num_hidden_layers=1, intermediate_size=128)
    graph = load_graph(shared_trace(model.config, Dtype.FLOAT16))
    graph.bind(StateStore(model), {})
    registered_passes()["experts"].run(graph)
    quantize_weights(graph, _rules(bits=8, block_size=32), Dtype.FLOAT16)
    for value in graph.graph.initializers.values():
        if isinstance(value.const_value, LazyWeight):
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    in_float32(next(n for n in graph.graph if n.op_type == "QMoE"))
    node = next(n for n in graph.graph if n.op_type == "MoE")
    assert {v.dtype for v in node.inputs if v is not None} == {ir.DataType.FLOAT16}
    assert not {"weights_prepacked", "block_size"} & set(node.attributes)


def test_computed_experts_are_refused() -> None:
    graph = _lowered(build_tiny_model("mixtral", num_hidden_layers=1))
    node = next(n for n in graph.graph if n.op_type == "MoE")
    down = node.inputs[4]
    assert down is not None
    data = np.zeros((4, 64, 96), np.float32)
    group = WeightGroup(("a", "b"), lambda: {"value": data})
    down.const_value = LazyWeight(
        name=str(down.name), dtype=ir.DataType.FLOAT, shape=data.shape, group=group, key="value"
    )
    with pytest.raises(UnsupportedError, match=r"experts\.down_proj is computed from a, b"):
        quantize_weights(graph, _rules(), Dtype.FLOAT32)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_routers_have_a_role_of_their_own(model_type: str) -> None:
    graph = _lowered(build_tiny_model(model_type))
    registered_passes()["linear"].run(graph)
    assert sum(linear.role is WeightRole.ROUTER for linear in find_linears(graph)) == LAYERS
