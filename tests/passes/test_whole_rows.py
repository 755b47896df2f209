"""No Reshape of tokens to rows around operators over the features."""

import onnx_ir as ir

from llmc.graph.match import dims_of
from llmc.graph.model import Graph
from tests.passes.harness import (
    LAYERS,
    copy_of,
    counts,
    graph_of,
    hold_numbers,
    hold_refusal,
    in_layer,
    lowered,
    operators,
    run_pass,
)

BEFORE = ("linear",)


def _flat(graph: Graph) -> list[ir.Node]:
    return [n for n in graph.graph if dims_of(n.outputs[0])[:1] == ["batch*sequence"]]


def test_applies_everywhere_and_keeps_the_numbers() -> None:
    before, after, report = lowered("whole-rows", "opt", BEFORE)
    assert counts(report) == ([1] * LAYERS, 0)
    assert _flat(before)
    assert not _flat(after)
    assert operators(before)["Reshape"] - operators(after)["Reshape"] == 2 * LAYERS + 2  # and their shapes
    hold_numbers(before, after, 1e-5)


def test_residual_sums_and_norms_become_one_operator() -> None:
    _, after, report = lowered("skip-norm", "opt", (*BEFORE, "whole-rows", "group-query-attention"))
    assert report.in_layer(1) == 2
    assert operators(after)["SkipLayerNormalization"] == 2 * LAYERS + 1


def test_rows_that_experts_are_routed_by_stay() -> None:
    graph = graph_of("mixtral", BEFORE)
    flat = len(_flat(graph))
    report = run_pass("whole-rows", graph)
    assert report.applied == ()
    assert {(r.code, r.layer) for r in report.refusals} == {("rows", n) for n in range(LAYERS)}
    assert len(_flat(graph)) == flat > 0


def _sum_over_rows(graph: Graph) -> None:
    """What follows a Relu reads a sum over all rows beside it."""
    relu = in_layer(graph, "Relu")
    user = relu.outputs[0].consumers()[0]
    total = ir.node("ReduceSum", [copy_of(graph, relu.outputs[0], user)], {"keepdims": 1}, name="total")
    total.outputs[0].shape, total.outputs[0].type = ir.Shape([1, 1]), relu.outputs[0].type
    shifted = ir.node("Add", [relu.outputs[0], total.outputs[0]], name="shifted")
    shifted.outputs[0].shape, shifted.outputs[0].type = relu.outputs[0].shape, relu.outputs[0].type
    graph.graph.insert_before(user, [total, shifted])
    user.replace_input_with(0, shifted.outputs[0])


def test_declines_a_layer_whose_rows_are_summed() -> None:
    hold_refusal("whole-rows", graph_of("opt", BEFORE), _sum_over_rows, "rows", "Relu")
