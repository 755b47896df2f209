"""Multiple-choice tasks through lm-evaluation-harness: accuracy of both sides, and what cannot be run."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.artifact.verdict import MeasurementStatus
from llmc.config import Gate, Metric
from llmc.errors import ConfigError, ParityError, ResourceError, UnsupportedError
from llmc.runtime.ort_model import OrtModel
from llmc.validate.gates import evaluate
from llmc.validate.questions import Score, ask_score, read_score
from llmc.validate.reference import TorchModel
from llmc.validate.tasks import _nearest, _score, load_tasks, measure_tasks

from .decoder import Variant, write_decoder
from .questions import write_task


class Bytes:
    """A tokenizer whose tokens are bytes; the beginning of a text is token 1."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        return {"input_ids": [1] * add_special_tokens + list(text.encode())}


CHOICES = ["river", "mills", "stone", "seven"]  # of one length, which decides otherwise


def held(model: Any, text: str, choice: str) -> float:
    """The original's log-likelihood, by torch alone."""
    ids = torch.tensor([[1, *text.encode(), *choice.encode()]])
    with torch.inference_mode():
        scores = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
    count = len(choice.encode())
    return sum(float(scores[-count - 1 + i, token]) for i, token in enumerate(choice.encode()))


@pytest.fixture(scope="module")
def questions(llama: Any) -> list[dict[str, Any]]:
    """Ten items, of which the original gets eight right."""
    made = []
    for number in range(10):
        text = f"Question {number}: what bends twice?"
        best = int(np.argmax([held(llama, text, f" {choice}") for choice in CHOICES]))
        answer = best if number < 8 else (best + 1) % len(CHOICES)
        made.append({"question": text, "choices": CHOICES, "answer": answer})
    return made


@pytest.fixture
def artifact(llama: Any, tmp_path: Path) -> OrtModel:
    interface = write_decoder(llama, tmp_path / "model", Variant(logits="last"))
    return OrtModel(tmp_path / "model", interface, threads=1, share_buffer=False)


def test_a_good_artifact_answers_as_the_original(
    llama: Any, artifact: OrtModel, questions: list[dict[str, Any]], tmp_path: Path
) -> None:
    tasks = load_tasks([write_task(tmp_path / "task", questions)], None)
    made = measure_tasks(artifact, TorchModel(llama), Bytes(), tasks)
    assert (made.metric, made.value) == (Metric.TASK_ACCURACY_CHANGE, 0.0)
    assert (made.low, made.high) == (0.0, 0.0)
    assert made.figures == {
        "accuracy_artifact": 0.8, "rivers_artifact": 0.8, "accuracy_original": 0.8, "rivers_original": 0.8,
    }  # fmt: skip
    assert made.detail == "10 items of rivers: 0.800 right, 0.800 by the original"
    few = measure_tasks(
        artifact, TorchModel(llama), Bytes(), load_tasks([write_task(tmp_path / "task", questions)], 4)
    )
    assert few.figures["accuracy_original"] == 1.0
    assert few.detail.startswith("4 items")


def test_an_artifact_that_answers_worse(
    llama: Any, questions: list[dict[str, Any]], artifact: OrtModel, tmp_path: Path
) -> None:
    """The interval is that of the items' differences, and a gate on it can be failed."""

    class Reversed(OrtModel):
        """The same artifact with every logit turned round."""

        def _run(self, input_ids: np.ndarray) -> np.ndarray:
            return -super()._run(input_ids)

    turned = Reversed(tmp_path / "model", artifact.interface, threads=1, share_buffer=False)
    tasks = load_tasks([write_task(tmp_path / "task", questions)], None)
    made = measure_tasks(turned, TorchModel(llama), Bytes(), tasks)
    assert made.value is not None
    assert made.low is not None
    assert made.high is not None
    assert made.value <= -0.4
    assert made.value == pytest.approx(made.figures["accuracy_artifact"] - 0.8)
    assert made.low < made.value < made.high < 0
    gate = Gate(metric=Metric.TASK_ACCURACY_CHANGE, min=-0.1, reason="no worse than the original")
    assert not evaluate([gate], [made]).passed


def original(model: Any, prompt: np.ndarray, choice: np.ndarray) -> Score:
    return read_score(TorchModel(model).ask(ask_score(prompt, choice)))


def test_scores_are_those_of_torch(llama: Any, artifact: OrtModel) -> None:
    text, choice = "What bends twice?", " a river"
    prompt = np.array([1, *text.encode()], np.int64)
    tokens = np.array(list(choice.encode()), np.int64)
    expected = held(llama, text, choice)
    for made in (original(llama, prompt, tokens), _score(artifact, prompt, tokens)):
        assert made.log_likelihood == pytest.approx(expected, abs=1e-3)
        assert not made.greedy
    greedy = TorchModel(llama).greedy(prompt, 3)
    assert original(llama, prompt, greedy).greedy
    assert _score(artifact, prompt, greedy).greedy
    limit = artifact.interface.max_length
    assert limit is not None
    long = np.resize(prompt, limit + 40)  # its beginning is left out
    assert _score(artifact, long, tokens) == _score(artifact, long[-(limit - len(tokens)) :], tokens)


def test_an_artifact_that_breaks_on_the_way_is_no_figure(
    llama: Any, questions: list[dict[str, Any]], artifact: OrtModel, tmp_path: Path
) -> None:
    class Broken(OrtModel):
        def _run(self, input_ids: np.ndarray) -> np.ndarray:
            raise ParityError("onnxruntime failed at batch 1")

    broken = Broken(tmp_path / "model", artifact.interface, threads=1, share_buffer=False)
    made = measure_tasks(
        broken, TorchModel(llama), Bytes(), load_tasks([write_task(tmp_path / "task", questions)], None)
    )
    assert made.status is MeasurementStatus.MEASURED
    assert made.value is not None
    assert np.isnan(made.value)
    assert made.detail == "onnxruntime failed at batch 1"


ITEM = {"question": "What?", "choices": [" a", " b"], "answer": 0}


@pytest.mark.parametrize(
    ("items", "changes", "error", "message"),
    [
        ([ITEM], {}, ConfigError, "task rivers has 1 items, at least 2 are needed"),
        (
            [ITEM, ITEM], {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]},
            UnsupportedError, "task rivers asks for generate_until; only multiple_choice tasks",
        ),
        (
            [ITEM, ITEM], {"metric_list": [{"metric": "acc_norm"}]},
            UnsupportedError, "task rivers is scored by acc_norm, not by acc",
        ),
        ([ITEM, ITEM], {"dataset_path": "nobody/nothing"}, ConfigError, r"rivers\.yaml cannot be loaded: "),
        ([ITEM, ITEM], {"test_split": "absent"}, ConfigError, r"rivers\.yaml cannot be loaded: "),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_measured(
    items: list[dict[str, Any]], changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        load_tasks([write_task(tmp_path, items, **changes)], None)


def test_an_answer_that_fits_no_choice(llama: Any, artifact: OrtModel, tmp_path: Path) -> None:
    items = [{**ITEM, "answer": 1}, ITEM]
    tasks = load_tasks([write_task(tmp_path / "task", items, doc_to_text="{{ 1 // answer }}")], None)
    with pytest.raises(ConfigError, match="tasks rivers cannot be run: "):
        measure_tasks(artifact, TorchModel(llama), Bytes(), tasks)


def test_a_task_that_there_is_not() -> None:
    with pytest.raises(
        ConfigError, match="there is no task hellaswagg: it is neither a file nor a name"
    ) as caught:
        load_tasks(["hellaswagg"], None)
    assert str(caught.value.hint).startswith("did you mean hellaswag")
    assert _nearest("zzzzzz", ["arc_easy", "mmlu"]) == "`lm-eval ls tasks` lists the tasks it knows"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ResourceError, match=r"lm-evaluation-harness, .*, is not installed") as caught:
        load_tasks(["anything"], None)
    assert caught.value.hint == "pip install 'llmc[lm-eval]'"
