"""PyTorch is asked once for each question; other weights or another question is another answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.artifact.cache import StageCache
from llmc.validate.reference import TorchModel
from llmc.validate.remembered import RememberedModel


def test_answers_are_those_of_the_model_and_come_from_the_cache(llama: Any, tmp_path: Path) -> None:
    cache = StageCache(tmp_path / "reference")
    model = TorchModel(llama)
    first = RememberedModel(lambda: model, cache, {"weights": "a"}, None)
    ids = np.arange(5, 17)

    def refuse() -> TorchModel:
        raise AssertionError("asked again")

    second = RememberedModel(refuse, cache, {"weights": "a"}, None)
    for asked in (first, second):
        np.testing.assert_array_equal(asked.logits(ids, keep=3), model.logits(ids, keep=3))
        np.testing.assert_array_equal(asked.greedy(ids, 4), model.greedy(ids, 4))
        np.testing.assert_array_equal(asked.generate(ids, 4, (2,)), model.generate(ids, 4, (2,)))
    for question in (
        lambda m: m.logits(ids, keep=4),
        lambda m: m.logits(ids[1:], keep=3),
        lambda m: m.greedy(ids, 5),
        lambda m: m.generate(ids, 4, (3,)),
    ):
        with pytest.raises(AssertionError, match="asked again"):
            question(second)
    other = RememberedModel(refuse, cache, {"weights": "b"}, None)
    with pytest.raises(AssertionError, match="asked again"):
        other.logits(ids, keep=3)
