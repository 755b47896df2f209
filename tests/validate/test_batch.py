"""Many sequences in one pass get what each gets alone, on every architecture, in memory and streamed."""

from collections import ChainMap
from pathlib import Path

import numpy as np
import pytest

from llmc.checkpoint import open_checkpoint
from llmc.validate.batch import answer, plan_passes
from llmc.validate.questions import Question, ask_logits
from llmc.validate.reference import TorchModel
from tests.models import MODEL_TYPES, build_tiny_model, save_tiny_model

LENGTHS = ((40, 3), (1, 1), (37, 37), (12, 2), (40, 1))


def questions() -> list[Question]:
    draw = np.random.default_rng(2)
    return [ask_logits(draw.integers(3, 250, n), keep) for n, keep in LENGTHS]


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "mamba", "rwkv", "bloom"])
def test_answers_are_those_of_each_alone(model_type: str) -> None:
    model = TorchModel(build_tiny_model(model_type))
    asked = questions()
    found = dict(ChainMap(*answer(model, asked)))
    for number, question in enumerate(asked):
        alone = model.logits(question.input_ids, keep=question.keep)
        np.testing.assert_allclose(found[number], alone, atol=2e-5)


def test_a_streamed_model_is_read_once_for_all(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    streamed, model = TorchModel(checkpoint.stream_reference({})), TorchModel(checkpoint.fill_reference())
    assert len(plan_passes(streamed, questions())) == 1
    found = dict(ChainMap(*answer(streamed, questions())))
    for number, question in enumerate(questions()):
        alone = model.logits(question.input_ids, keep=question.keep)
        np.testing.assert_allclose(found[number], alone, atol=2e-5)


def test_lengths_far_apart_and_memory_bound_a_pass(llama: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TorchModel(llama)
    lengths = [len(q.input_ids) for q in questions()]
    passes = [[lengths[i] for i in group] for group in plan_passes(model, questions())]
    assert passes == [[40, 40, 37], [12, 1]]
    monkeypatch.setattr("llmc.validate.batch.PASS_BYTES", 1)
    assert len(plan_passes(model, questions())) == 5
    monkeypatch.undo()
    assert [[lengths[i] for i in g] for g in plan_passes(model, questions(), (38,))] == [
        [40, 40],
        [37],
        [12, 1],
    ]
