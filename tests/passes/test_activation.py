"""SiLU and GELU as one operator."""

import pytest

from tests.passes.harness import (
    LAYERS,
    copy_of,
    counts,
    graph_before,
    hold_numbers,
    in_layer,
    lowered,
    operators,
    run_pass,
)


@pytest.mark.parametrize(("model_type", "gone"), [("llama", "Sigmoid"), ("gpt2", "Tanh")])
def test_applies_everywhere_and_keeps_the_numbers(model_type: str, gone: str) -> None:
    before, after, report = lowered("activation", model_type)
    assert counts(report) == ([1] * LAYERS, 0)
    assert operators(before)[gone]
    assert not operators(after)[gone]
    hold_numbers(before, after)


def test_a_sigmoid_of_something_else_is_no_silu() -> None:
    graph = graph_before("activation", "llama")
    sigmoid = in_layer(graph, "Sigmoid")
    assert sigmoid.inputs[0] is not None
    sigmoid.replace_input_with(0, copy_of(graph, sigmoid.inputs[0], sigmoid))
    report = run_pass("activation", graph)
    assert [report.in_layer(i) for i in range(LAYERS)] == [1, 0, 1]
