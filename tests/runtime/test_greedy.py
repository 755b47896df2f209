"""Greedy generation over lowered graphs: pieces, stop tokens, batches, the cache's end, text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from llmc.artifact.store.codec import TextCodec
from llmc.artifact.text import TextRecord
from llmc.config import Dtype
from llmc.errors import ConfigError
from llmc.graph.interface import Interface
from llmc.runtime.greedy import generate_greedy, stream_text
from llmc.runtime.ort_model import OrtModel
from llmc.runtime.session import Session
from llmc.runtime.static_ort_model import StaticOrtModel
from llmc.runtime.static_session import StaticSession
from llmc.validate.reference import TorchModel
from tests.lowering import CAPACITY, tiny, write_lowered
from tests.models import save_tiny_model

PROMPTS = ([5, 9, 200, 31, 7], [77], [12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22])


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Interface]:
    folder = tmp_path_factory.mktemp("lowered")
    return folder, write_lowered(folder, "mistral", Dtype.FLOAT32, last="last-token-logits")


@pytest.fixture(scope="module", params=[None, 4, 1])
def session(request: pytest.FixtureRequest, graph: tuple[Path, Interface]) -> StaticSession:
    """The graph, taking any number of tokens at once, four, or one."""
    folder, interface = graph
    return StaticOrtModel(folder, interface, threads=1, most=request.param)


def _rows(session: Session, prompts: Sequence[Sequence[int]], count: int, stop: Sequence[int] = ()):
    made = list(generate_greedy(session, prompts, count, stop))
    return [[step[row] for step in made] for row in range(len(prompts))]


def _original(prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
    return TorchModel(tiny("mistral")).generate(np.array(prompt), count, stop).tolist()


def test_a_batch_continues_as_each_row_does_in_pytorch(session: StaticSession) -> None:
    assert session.interface.logits == "last"
    assert _rows(session, PROMPTS, 12) == [_original(prompt, 12) for prompt in PROMPTS]
    assert _rows(session, PROMPTS[:1], 3) == [_original(PROMPTS[0], 3)]


def test_logits_of_every_position_serve_as_well(tmp_path: Path) -> None:
    interface = write_lowered(tmp_path, "mistral", Dtype.FLOAT32)
    assert interface.logits == "all"
    session = StaticOrtModel(tmp_path, interface, threads=1, most=4)
    assert _rows(session, PROMPTS, 6) == [_original(prompt, 6) for prompt in PROMPTS]


def test_rows_end_at_their_stop_tokens(session: StaticSession) -> None:
    free = [_original(prompt, 12) for prompt in PROMPTS]
    stop = [free[0][3], free[2][6]]
    rows = _rows(session, PROMPTS, 12, stop)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        ended = _original(prompt, 12, stop)
        assert row == ended + [None] * (len(row) - len(ended))
    first = free[1][0]
    assert _rows(session, [PROMPTS[1]], 12, [first]) == [[]]


def test_it_ends_with_the_cache(session: StaticSession) -> None:
    prompt = np.random.default_rng(1).integers(3, 250, CAPACITY - 3).tolist()
    assert _rows(session, [prompt], 50) == [_original(prompt, 3)]
    assert len(_rows(session, [prompt, [4]], 50)[1]) == 3
    message = f"the prompt has {CAPACITY} tokens, but the KV cache has only {CAPACITY} slots"
    with pytest.raises(ConfigError, match=message):
        _rows(session, [[7] * CAPACITY], 1)


def test_a_growing_cache_serves_as_well(tmp_path: Path) -> None:
    interface = write_lowered(tmp_path, "mistral", Dtype.FLOAT32, last="rotary-embedding")
    session = OrtModel(tmp_path, interface, threads=1, share_buffer=False)
    assert _rows(session, PROMPTS, 12) == [_original(prompt, 12) for prompt in PROMPTS]
    prompt = [7] * (CAPACITY - 3)
    assert _rows(session, [prompt], 50) == [_original(prompt, 3)]
    message = f"the prompt has {CAPACITY} tokens, but the model's context ends at {CAPACITY}"
    with pytest.raises(ConfigError, match=message):
        _rows(session, [[7] * CAPACITY], 1)
    session.interface = interface.model_copy(update={"max_length": None})
    assert _rows(session, PROMPTS[:1], 3) == [_original(PROMPTS[0], 3)]


def test_what_cannot_be_continued(session: StaticSession) -> None:
    with pytest.raises(ConfigError, match="the prompt has no tokens"):
        _rows(session, [[1], []], 1)
    with pytest.raises(ConfigError, match="0 new tokens are requested"):
        _rows(session, [[1]], 0)


def test_going_back_takes_the_lengths_alone(session: StaticSession) -> None:
    prompt = np.array([PROMPTS[2]])
    session.prefill(prompt, steps=20)
    point = session.state()
    once = session.decode(np.array([[30, 31, 32]]))
    session.decode(np.array([[40]]))
    session.restore(point)
    np.testing.assert_array_equal(session.decode(np.array([[30, 31, 32]])), once)


def test_a_graph_without_a_fixed_cache_is_refused(graph: tuple[Path, Interface]) -> None:
    folder, interface = graph
    growing = interface.model_copy(update={"max_length": None})
    with pytest.raises(ConfigError, match="KV cache has no fixed length"):
        StaticOrtModel(folder, growing, threads=1)


def test_text_comes_as_it_is_made(session: StaticSession, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path, tokenizer=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for record in (TextRecord(), TextRecord(chat=True)):
        codec = TextCodec(folder, record)
        ids = codec.encode_prompt("the river", codec.render)
        pieces: list[str] = []
        assert stream_text(session, codec, "the river", 8, (), pieces.append) == 8
        assert "".join(pieces) == tokenizer.decode(_original(ids, 8), skip_special_tokens=True)
