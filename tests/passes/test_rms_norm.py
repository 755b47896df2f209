"""RMSNorm as ONNX Runtime's SimplifiedLayerNormalization."""

import pytest

from llmc.catalog import list_targets
from llmc.passes import run_passes
from tests.passes.harness import (
    LAYERS,
    counts,
    graph_before,
    graph_of,
    hold_numbers,
    hold_refusal,
    lowered,
    operators,
    scale_another_tensor,
)


@pytest.mark.parametrize(("model_type", "per_layer"), [("llama", 2), ("gemma2", 4)])
def test_applies_everywhere_and_keeps_the_numbers(model_type: str, per_layer: int) -> None:
    before, after, report = lowered("rms-norm", model_type)
    assert counts(report) == ([per_layer] * LAYERS, 1)
    assert operators(before)["ReduceMean"]
    assert not operators(after)["ReduceMean"]
    assert operators(after)["SimplifiedLayerNormalization"] == per_layer * LAYERS + 1
    hold_numbers(before, after)


def test_declines_a_norm_of_another_tensor() -> None:
    graph = graph_before("rms-norm", "llama")
    hold_refusal("rms-norm", graph, scale_another_tensor, "norm-form", "ReduceMean")


def test_every_target_leaves_such_a_norm_in_plain_operators() -> None:
    targets = [listed.document for listed in list_targets()]
    norms = {
        spec
        for target in targets
        for spec in target.passes
        if spec.name in ("rms-norm", "rms-normalization", "layer-norm")
    }
    assert {spec.name for spec in norms} == {"rms-norm", "rms-normalization", "layer-norm"}
    for spec in norms:
        graph = graph_before("layer-norm", "cohere") if spec.name == "layer-norm" else graph_of("llama")
        scale_another_tensor(graph)
        run_passes(graph, [spec])
