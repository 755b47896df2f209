"""Operators read weights as the file stores them."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from llmc.backends.onnxruntime.one_copy import read_as_stored
from llmc.graph.model import Graph
from tests.passes.harness import ORDER, graph_of, logits_of, operators, run_pass, with_fields


def prepared(graph: Graph) -> Graph:
    for name in ORDER:
        run_pass(name, graph)
    return graph


def tied() -> Graph:
    """Return a graph whose embedding is also its language-model head."""
    return prepared(with_fields("llama", tie_word_embeddings=True))


def loaded_bytes(graph: Graph, folder: Path) -> int:
    """Return the bytes of the matrices that a session keeps when it has folded what it can."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    data = ir.to_proto(graph.model).SerializeToString()
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(folder / "optimized.onnx").graph.initializer
    return sum(4 * int(np.prod(each.dims)) for each in loaded if len(each.dims) == 2)


def test_products_read_matrices_as_they_are_stored(tmp_path: Path) -> None:
    before, after = tied(), tied()
    read_as_stored(after)
    assert "Transpose" not in operators(after)
    assert operators(after)["FusedMatMul"] == operators(before)["MatMul"] == 13
    np.testing.assert_array_equal(logits_of(after), logits_of(before))
    stored = sum(
        4 * int(np.prod(value.shape.numpy()))
        for value in after.graph.initializers.values()
        if value.shape is not None and len(value.shape) == 2
    )
    assert loaded_bytes(after, tmp_path) == stored
    assert loaded_bytes(before, tmp_path) == stored + 4 * 256 * 64  # the embedding, and its transpose


def test_matrices_of_inputs_and_outputs_stay() -> None:
    """GPT-2 stores (inputs, outputs); its tied head alone is transposed."""
    graph = prepared(graph_of("gpt2"))
    products = operators(graph)["MatMul"]
    read_as_stored(graph)
    assert (operators(graph)["MatMul"], operators(graph)["FusedMatMul"]) == (products - 1, 1)


def test_a_product_whose_first_factor_is_a_matrix_is_one_of_rows() -> None:
    """Mamba multiplies its time steps as columns."""
    before, after = (graph_of("mamba", ("linear", "rms-norm", "states")) for _ in range(2))
    first = [n for n in before.graph if n.op_type == "MatMul" and n.inputs[0].const_value is not None]  # type: ignore[union-attr]
    assert len(first) == 3
    read_as_stored(after)
    assert "MatMul" not in operators(after)
    np.testing.assert_allclose(logits_of(after), logits_of(before), atol=1e-5)
