"""PyTorch is asked once for each question; other weights or another question is another answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.artifact.store.cache import StageCache
from llmc.validate.questions import ask_distributions, ask_followed, ask_logits, ask_score
from llmc.validate.reference import TorchModel
from llmc.validate.remembered import RememberedModel

IDS = np.arange(5, 17)


class Full(StageCache):
    """A cache that takes nothing."""

    def put(self, key: str, data: bytes) -> None:
        pass


def refuse() -> TorchModel:
    raise AssertionError("asked again")


def test_answers_are_those_of_the_model_and_come_from_the_cache(llama: Any, tmp_path: Path) -> None:
    cache, model = StageCache(tmp_path / "reference"), TorchModel(llama)
    first = RememberedModel(lambda: model, cache, {"weights": "a"}, None)
    second = RememberedModel(refuse, cache, {"weights": "a"}, None)
    for asked in (first, second):
        np.testing.assert_array_equal(asked.logits(IDS, keep=3), model.logits(IDS, keep=3))
        np.testing.assert_array_equal(asked.greedy(IDS, 4), model.greedy(IDS, 4))
        assert asked.ask(ask_score(IDS, IDS[:2])) == model.ask(ask_score(IDS, IDS[:2]))
    for question in (
        lambda m: m.logits(IDS, keep=4),
        lambda m: m.logits(IDS[1:], keep=3),
        lambda m: m.greedy(IDS, 5),
        lambda m: m.ask(ask_score(IDS, IDS[1:3])),
        lambda m: m.ask(ask_score(IDS[:-1], np.append(IDS[-1:], IDS[:2]))),
    ):
        with pytest.raises(AssertionError, match="asked again"):
            question(second)
    other = RememberedModel(refuse, cache, {"weights": "b"}, None)
    with pytest.raises(AssertionError, match="asked again"):
        other.logits(IDS, keep=3)


@pytest.mark.parametrize("kept", [True, False])
def test_prepared_answers_need_no_model(llama: Any, tmp_path: Path, kept: bool) -> None:
    """Whether or not the cache takes them."""
    cache, told = (StageCache if kept else Full)(tmp_path / "reference"), []
    asked = RememberedModel(lambda: TorchModel(llama), cache, {}, None)
    questions = [ask_logits(IDS, 2), ask_distributions(IDS[3:], 4), ask_followed([7, 8], [9], (2,))]
    asked.prepare([*questions, questions[0]], lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (3, 3)]  # all in one pass
    asked.release()
    asked._load = refuse
    assert all(asked.ask(question) for question in questions)


def test_a_killed_run_goes_on(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.validate.batch.PASS_BYTES", 1)  # one question a pass
    cache, told = StageCache(tmp_path / "reference"), []
    questions = [ask_logits(IDS[n:], 1) for n in range(4)]

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RememberedModel(lambda: TorchModel(llama), cache, {}, None).prepare(questions, stop)
    again = RememberedModel(lambda: TorchModel(llama), cache, {}, None)
    again.prepare(questions, lambda done, total: told.append((done, total)))
    assert told[-1] == (2, 2)
