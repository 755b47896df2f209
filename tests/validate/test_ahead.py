"""A session that knows its texts gives the logits of one pass over each, and refuses other texts."""

import numpy as np
import pytest

from llmc.arrays import Array
from llmc.errors import ParityError
from llmc.graph.interface import Interface, TensorSpec
from llmc.validate.ahead import AheadSession
from llmc.validate.positions import ReferencePass
from llmc.validate.reference import TorchModel
from tests.lowering import tiny

from .test_torch_session import TOKENS, interface

ALL = np.arange(48)
#: A long text, of which some positions will be read; rows that begin alike; and rows for padded batches.
LONG = ReferencePass(TOKENS[0], (), np.array([4, 9, 19, 20, 30, 31, 47]))
ALIKE = ReferencePass(np.stack([TOKENS[1], np.r_[TOKENS[1, :8], TOKENS[2, 8:]]]), (), ALL)
ROWS = ReferencePass(TOKENS[[3, 2]], (), ALL)


@pytest.fixture(scope="module")
def session() -> AheadSession:
    return AheadSession(tiny("llama"), shaped(), "transformers", [LONG, ALIKE, ROWS])


def shaped() -> Interface:
    """An interface that states the size of the vocabulary."""
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch", "sequence", 256))
    return interface().model_copy(update={"outputs": (logits,)})


def expected(tokens: Array) -> Array:
    return TorchModel(tiny("llama")).logits(tokens, keep=len(tokens))


def test_known_positions_have_the_logits_of_one_pass(session: AheadSession) -> None:
    whole = expected(TOKENS[0])
    first = session.prefill(TOKENS[None, 0, :20], steps=28)
    assert first.shape == (1, 20, 256)
    np.testing.assert_allclose(first[0, [4, 9, 19]], whole[[4, 9, 19]], atol=2e-5)
    assert not first[0, [0, 5, 18]].any()
    state = session.state()
    np.testing.assert_allclose(session.decode(TOKENS[None, 0, 20:32])[0, [0, 10]], whole[[20, 30]], atol=2e-5)
    session.rewind(state, 19)
    np.testing.assert_allclose(session.decode(TOKENS[None, 0, 19:21])[0], whole[19:21], atol=2e-5)
    session.restore(state)
    assert session.next_tokens(TOKENS[:1, 20])[0] == whole[20].argmax()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_part_of_a_text(side: str, session: AheadSession) -> None:
    ids, mask, lengths = np.full((2, 12), 9), np.zeros((2, 12), np.int64), (12, 5)
    for row, n in enumerate(lengths):
        slots = slice(0, n) if side == "right" else slice(12 - n, 12)
        ids[row, slots], mask[row, slots] = ROWS.tokens[row, :n], 1
    first = session.prefill(ids, mask, steps=1)
    step = session.decode(np.array([[ROWS.tokens[row, n]] for row, n in enumerate(lengths)]))
    for row, n in enumerate(lengths):
        actual = np.concatenate([first[row, mask[row] == 1], step[row]])
        np.testing.assert_allclose(actual, expected(ROWS.tokens[row, : n + 1]), atol=2e-5)


def test_texts_may_begin_alike(session: AheadSession) -> None:
    session.prefill(TOKENS[None, 1, :6], steps=10)
    session.decode(ALIKE.tokens[1:, 6:8])
    actual = session.decode(ALIKE.tokens[1:, 8:12])
    np.testing.assert_allclose(actual[0], expected(ALIKE.tokens[1, :12])[8:], atol=2e-5)


def test_the_text_that_knows_the_logits_is_taken() -> None:
    """A short text begins like a long one, and does not have the positions that are read."""
    short = ReferencePass(TOKENS[0, :8], (), np.array([6]))
    model = AheadSession(tiny("llama"), shaped(), "transformers", [short, LONG])
    assert model.prefill(TOKENS[None, 0, :5], steps=4)[0, 4].any()
    model.prefill(TOKENS[None, 0, :7], steps=4)
    assert model.decode(TOKENS[None, 0, 7:10])[0, 2].any()


def test_other_texts_are_refused(session: AheadSession) -> None:
    session.prefill(TOKENS[None, 0, :4], steps=4)
    with pytest.raises(ParityError, match="begin no text that is known in advance"):
        session.decode(np.array([[255]]))
    with pytest.raises(ParityError, match="begin no text that is known in advance"):
        session.prefill(np.array([[255, 254]]), steps=0)


def test_the_first_step_decides_beyond_a_switch() -> None:
    short = ReferencePass(TOKENS[0], (16, 32), np.array([10]))
    whole = ReferencePass(TOKENS[0], (), np.array([20]))
    model = AheadSession(tiny("llama"), shaped(), "transformers", [whole, short])
    assert model.prefill(TOKENS[None, 0, :16], steps=0)[0, 10].any()
    assert not model.prefill(TOKENS[None, 0, :17], steps=0)[0, 10].any()
