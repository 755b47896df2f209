"""The original's attention in blocks of queries, and its steps across a switch."""

import sys
from typing import Any

import numpy as np
import pytest

from llmc.validate import attention
from llmc.validate.reference import TorchModel
from tests.models import longrope

from .conftest import build


@pytest.mark.parametrize("mask_bytes", [1 << 30, 1 << 10], ids=["whole mask", "mask by rows"])
def test_blocks_of_queries_give_the_same_numbers(
    tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch, mask_bytes: int
) -> None:
    model = build("MistralConfig", sliding_window=8, attn_implementation="eager")
    reference = TorchModel(model)
    expected = reference.logits(tokens[:70], keep=70)
    monkeypatch.setattr(attention, "SCORE_BYTES", 4 * 4 * 70 * 9)
    monkeypatch.setattr(attention, "MASK_BYTES", mask_bytes)
    modules = [layer.self_attn for layer in model.model.layers]
    shapes: list[tuple[int, ...]] = []
    eager = sys.modules[type(modules[0]).__module__].eager_attention_forward

    def note(module: Any, query: Any, *rest: Any, **named: Any) -> Any:
        shapes.append(tuple(query.shape))
        return eager(module, query, *rest, **named)

    monkeypatch.setattr(sys.modules[eager.__module__], "eager_attention_forward", note)
    np.testing.assert_allclose(reference.logits(tokens[:70], keep=70), expected, atol=1e-5)
    assert [shape[2] for shape in shapes] == [9, 9, 9, 9, 9, 9, 9, 7] * 2
    assert model.config._attn_implementation == "eager"


def test_steps_across_a_switch_are_those_of_the_cache(tokens: np.ndarray) -> None:
    reference = TorchModel(build("LlamaConfig", rope_parameters=longrope(20)))
    ids = tokens[:24]
    whole, stepped = reference.logits(ids, keep=24), reference.logits(ids, keep=24, pieces=(18,))
    assert np.abs(whole - stepped).max() > 0.1
    np.testing.assert_array_equal(stepped[:18], reference.logits(ids[:18], keep=18))
    first = reference.prefill(ids[:18])
    made = [first, *(reference.decode(int(token)) for token in ids[18:])]
    assert made == stepped[17:].argmax(axis=1).tolist()
    np.testing.assert_allclose(reference.logits(ids[:20], keep=2, pieces=(18,)), stepped[18:20], atol=1e-4)
