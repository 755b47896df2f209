"""The inputs, outputs and states of a recorded step; run on the CPU, which does not record it."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from llmc.backends.onnxruntime.cuda_graph import follow_static_mask
from llmc.runtime.ort_model import OrtModel
from tests.passes.harness import ORDER, graph_of, run_pass

PASSES = (*ORDER[:5], "experts", "states", *ORDER[5:], "last-token-logits")


@pytest.fixture(scope="module", params=["llama", "qwen3_next"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[OrtModel, ...]:
    """Open two sessions of a graph; the second runs steps of one token as it would record them."""
    graph, folder = graph_of(request.param), tmp_path_factory.mktemp("model")
    for name in PASSES:
        run_pass(name, graph)
    assert follow_static_mask(graph) is None
    ir.save(graph.model, folder / "model.onnx")
    plain, recorded = (
        OrtModel(folder, graph.interface(), threads=1, share_buffer=True, chooses=True) for _ in range(2)
    )
    recorded._opened = replace(recorded._opened, graphs=True)
    return plain, recorded


def check_same(models: tuple[OrtModel, ...], tokens: np.ndarray) -> None:
    expected, found = (model.decode(tokens) for model in models)
    np.testing.assert_array_equal(found, expected)


def test_steps_after_a_ragged_batch(models: tuple[OrtModel, ...]) -> None:
    ids = np.random.default_rng(0).integers(3, 250, (3, 9))
    mask = np.ones_like(ids)
    if not models[0].interface.states:
        mask[0, 4:], mask[2, 7:] = 0, 0
    for model in models:
        model.prefill(ids, mask, steps=6)
    for token in range(5):
        check_same(models, np.full((3, 1), 5 + token))
    expected, found = (model.next_tokens(np.array([7, 8, 9])) for model in models)
    np.testing.assert_array_equal(found, expected)


def test_pieces_and_steps_from_an_earlier_point(models: tuple[OrtModel, ...]) -> None:
    ids = np.random.default_rng(1).integers(3, 250, (1, 9))
    for model in models:
        model.prefill(ids, steps=9)
    check_same(models, np.array([[5]]))
    check_same(models, np.array([[6]]))
    points = [model.state() for model in models]
    for tokens in ([[7]], [[8]], [[9, 10]], [[11]]):
        check_same(models, np.array(tokens))
    for _ in range(2):  # from a point that later steps have overwritten
        for model, point in zip(models, points, strict=True):
            model.restore(point)
        check_same(models, np.array([[12]]))
        check_same(models, np.array([[13]]))
    for total in (10, 11, 7):
        for model, point in zip(models, points, strict=True):
            model.rewind(point, total)
        check_same(models, np.array([[14]]))
        check_same(models, np.array([[15, 16]]))


def test_another_prompt_of_the_same_size(models: tuple[OrtModel, ...]) -> None:
    for seed in (2, 3):
        ids = np.random.default_rng(seed).integers(3, 250, (1, 8))
        for model in models:
            model.prefill(ids, steps=3)
        for token in range(3):
            check_same(models, np.array([[5 + token]]))
