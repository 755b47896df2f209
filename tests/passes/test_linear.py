"""A Gemm as MatMul and Add."""

import onnx_ir as ir
import pytest

from llmc.config import WeightRole
from llmc.graph.linear import find_linears
from llmc.graph.model import Graph
from tests.passes.harness import (
    LAYERS,
    counts,
    graph_of,
    hold_numbers,
    hold_refusal,
    in_layer,
    lowered,
    operators,
)


@pytest.mark.parametrize(("model_type", "per_layer"), [("gpt2", 4), ("opt", 2)])
def test_applies_everywhere_and_keeps_the_numbers(model_type: str, per_layer: int) -> None:
    before, after, report = lowered("linear", model_type)
    assert counts(report) == ([per_layer] * LAYERS, 0)
    assert operators(before)["Gemm"]
    assert not operators(after)["Gemm"]
    hold_numbers(before, after)


def test_products_of_rows_lose_their_reshapes() -> None:
    _, after, _ = lowered("linear", "gpt2")
    linears = [linear for linear in find_linears(after) if linear.role is not WeightRole.LM_HEAD]
    assert len(linears) == 4 * LAYERS
    assert all(len(linear.output.shape or ()) == 3 for linear in linears)


def _scale(graph: Graph) -> None:
    in_layer(graph, "Gemm").attributes["alpha"] = ir.AttrFloat32("alpha", 2.0)


def test_declines_a_product_with_a_factor() -> None:
    hold_refusal("linear", graph_of("gpt2"), _scale, "gemm-scale", "Gemm")
