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


@pytest.mark.parametrize("pieces", [(), (40, 30)], ids=["one pass", "two steps"])
def test_fused_attention_gives_the_numbers_of_eager_attention(
    tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch, pieces: tuple[int, ...]
) -> None:
    """At chosen positions of two rows, in blocks of nine queries that see a window of eight keys."""
    model = build("MistralConfig", sliding_window=8, attn_implementation="eager")
    reference, positions = TorchModel(model), np.array([0, 8, 39, 40, 69])
    rows = np.stack([tokens[:70], tokens[100:170]])
    expected = np.stack([reference.logits(row, keep=70)[positions] for row in rows])
    keys: list[int] = []
    fused = attention._fused

    def note(module: Any, query: Any, key: Any, *rest: Any, **named: Any) -> Any:
        keys.append(key.shape[2])
        return fused(module, query, key, *rest, **named)

    monkeypatch.setattr(attention, "SCORE_BYTES", 4 * 4 * 70 * 18)
    monkeypatch.setattr(attention, "_fused", note)
    made = reference.logits_at(rows, positions, pieces=pieces)
    np.testing.assert_allclose(made, expected, atol=1e-5)
    np.testing.assert_array_equal(reference.logits_at(rows[0], positions, pieces=pieces).shape, (5, 256))
    assert keys
    assert max(keys) < 40
    assert not attention._is_plain(model.model.layers[0].self_attn, {"softcap": 50.0})
