"""The session over a transformers model gives the logits of one pass, however tokens are cut into steps."""

from typing import Any, cast

import numpy as np
import pytest

from llmc.arrays import Array
from llmc.errors import ParityError
from llmc.graph.interface import Interface, StateSlot
from llmc.validate.reference import TorchModel
from llmc.validate.torch_session import TorchSession, interface_in_transformers
from tests.lowering import tiny
from tests.models import build_tiny_model
from tests.states import TYPES as STATES

#: Rotary embeddings, sliding windows in some layers, learned positions, and positions behind an offset.
TYPES = ("llama", "gemma2", "gpt2", "opt")
TOKENS = np.random.default_rng(0).integers(5, 250, (4, 48))
ROUNDING = 2e-5


def interface(states: bool = False) -> Interface:
    slot = StateSlot(layer=0, kind="conv", past="past", present="present", shape=(2, 3))
    return Interface(
        inputs=(),
        outputs=(),
        cache=(),
        logits="all",
        position_ids=True,
        padding="any",
        max_length=None,
        states=(slot,) if states else (),
    )


def open_session(model: Any, states: bool = False) -> TorchSession:
    return TorchSession(model, interface(states), "transformers")


def expected(model: Any, tokens: Array) -> Array:
    return TorchModel(model).logits(tokens, keep=len(tokens))


def apart(actual: Array, wanted: Array) -> float:
    return float(np.abs(actual - wanted).max())


@pytest.mark.parametrize("kind", TYPES)
def test_steps_give_the_logits_of_one_pass(kind: str) -> None:
    model, tokens = tiny(kind), TOKENS[0]
    session, whole = open_session(model), expected(tiny(kind), TOKENS[0])
    parts = [session.prefill(tokens[None, :20], steps=28)]
    parts += [session.decode(tokens[None, a:b]) for a, b in ((20, 37), (37, 38), (38, 47))]
    state = session.state()
    assert apart(np.concatenate(parts, axis=1)[0], whole[:47]) < ROUNDING
    for at in (30, 5, 46):
        session.rewind(state, at)
        assert apart(session.decode(tokens[None, at : at + 2])[0], whole[at : at + 2]) < ROUNDING
    session.restore(state)
    assert session.next_tokens(tokens[None, 47])[0] == whole[47].argmax()


#: Windows count slots, and so the padding behind a row: interfaces of such models allow it on the left alone.
SIDES = [(kind, side) for kind in TYPES for side in ("left", "right") if (kind, side) != ("gemma2", "right")]


@pytest.mark.parametrize(("kind", "side"), SIDES)
def test_padded_rows_give_what_each_gives_alone(kind: str, side: str) -> None:
    model, lengths = tiny(kind), (20, 3, 11)
    ids = np.full((3, 20), 7)
    mask = np.zeros_like(ids)
    for row, n in enumerate(lengths):
        slots = slice(0, n) if side == "right" else slice(20 - n, 20)
        ids[row, slots], mask[row, slots] = TOKENS[row, :n], 1
    session = open_session(model)
    first = session.prefill(ids, mask, steps=2)
    steps = [session.decode(np.array([[TOKENS[r, n + i]] for r, n in enumerate(lengths)])) for i in (0, 1)]
    for row, n in enumerate(lengths):
        whole = expected(model, TOKENS[row, : n + 2])
        actual = np.concatenate([first[row, mask[row] == 1], *(step[row] for step in steps)])
        assert apart(actual, whole) < ROUNDING


def test_rows_beside_windows_are_padded_on_the_left() -> None:
    stated = interface()
    assert interface_in_transformers(stated, None) == stated
    assert interface_in_transformers(stated, 8).padding == "left"
    alone = stated.model_copy(update={"padding": "none"})
    assert interface_in_transformers(alone, 8) == alone


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1", "mamba"])
def test_a_model_with_states_runs_from_the_first_token(kind: str) -> None:
    model, tokens = build_tiny_model(kind, **STATES[kind][0]), TOKENS[0, :24]
    session, whole = open_session(model, states=True), expected(model, tokens)
    parts = [session.prefill(tokens[None, :9], steps=15), session.decode(tokens[None, 9:20])]
    state = session.state()
    parts.append(session.decode(tokens[None, 20:21]))
    assert apart(np.concatenate(parts, axis=1)[0], whole[:21]) < ROUNDING
    session.rewind(state, 12)
    assert apart(session.decode(tokens[None, 12:16])[0], whole[12:16]) < ROUNDING


def test_a_failure_is_named() -> None:
    session = open_session(tiny("llama"))
    with pytest.raises(ParityError, match="transformers fails at a step of 2 tokens of 1 rows: IndexError"):
        session.prefill(cast(Array, np.array([[1, 10_000]])), steps=0)
