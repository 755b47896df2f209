"""What servers compute, against a small model in PyTorch: each way in which one is wrong has its figure."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.artifact.served import Deed
from llmc.artifact.verdict import MeasurementStatus
from llmc.config import Metric
from llmc.errors import ParityError
from llmc.servers.answer import Answer, Product
from llmc.validate.distribution import log_softmax
from llmc.validate.reference import TorchModel
from llmc.validate.servers import (
    NEW_TOKENS,
    ServerQuestions,
    broken_server,
    measure_exported,
    measure_server,
    merge_figures,
    plan_questions,
    server_record,
)

from .serving import END, tiny_tokenizer

TEXT = "The sea is wide. A list of names begins here, and water boils. " * 20
PROMPTS = ("The sea", "Once", "A list of")


@pytest.fixture(scope="module")
def questions() -> ServerQuestions:
    tokenizer = tiny_tokenizer()
    tokens = np.array(tokenizer(TEXT)["input_ids"], np.int64)
    return plan_questions(TEXT, tokens, PROMPTS, tokenizer, (END,), 64, len(tokenizer))


def right(model: TorchModel, questions: ServerQuestions) -> Answer:
    """The answer of a server that computes what the model computes."""
    logits = tuple(model.logits(ids[:-1], keep=len(ids) - 1) for ids in questions.sequences)
    own = tuple(
        log_softmax(rows.copy())[np.arange(len(rows)), ids[1:]]
        for rows, ids in zip(logits, questions.sequences, strict=True)
    )
    products = []
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weights = matrices(model)(name)
        inputs = np.random.default_rng(0).choice([-1.0, 1.0], (8, weights.shape[1])).astype(np.float32)
        products.append(Product((name,), inputs, inputs @ weights.T))
    greedy = []
    for ids in questions.ids[: questions.continued]:
        text = model.greedy(np.array(ids, np.int64), NEW_TOKENS).tolist()
        greedy.append(tuple(text[: text.index(END) + 1] if END in text else text))
    return Answer(
        server="vllm", version="9.1", where="CPU", dtype="float32", taken=12, skipped=(), unfilled=(),
        token_ids=questions.ids, logits=logits, log_probabilities=own, greedy=tuple(greedy),
        products=tuple(products),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(llama: Any) -> TorchModel:
    return TorchModel(llama)


@pytest.fixture(scope="module")
def answer(model: TorchModel, questions: ServerQuestions) -> Answer:
    return right(model, questions)


def matrices(model: TorchModel) -> Callable[[str], Any]:
    parameters = model.model.state_dict()
    return lambda module: parameters[f"{module}.weight"].numpy() if f"{module}.weight" in parameters else None


def figures(answer: Answer, questions: ServerQuestions, model: TorchModel) -> dict[str, float]:
    found = measure_server(answer, questions, model, model, matrices(model))
    return {metric.value.partition(".")[2]: value for metric, (value, _) in found.items()}


def test_a_right_server_is_right(answer: Answer, questions: ServerQuestions, model: TorchModel) -> None:
    found = figures(answer, questions, model)
    assert found["skipped_tensors"] == 0
    assert found["tokenizer_equal"] == 1
    assert found["logprob_max_abs"] < 1e-4
    assert found["kl_mean"] < 1e-4
    assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert found["greedy_gap"] < 1e-4
    assert found["product_max_rel"] < 1e-5


def test_skipped_and_unfilled_tensors_count(
    answer: Answer, questions: ServerQuestions, model: TorchModel
) -> None:
    bad = replace(answer, skipped=("a.weight_packed",), unfilled=("a.weight", "b.weight"))
    value, detail = measure_server(bad, questions, model, model, matrices(model))[Metric.SERVER_SKIPPED]
    assert (value, detail) == (3, "12 tensors taken, 3 not, the first a.weight_packed")
    assert server_record(bad, {}).skipped == 3


def test_other_scales_of_the_cache_count(
    answer: Answer, questions: ServerQuestions, model: TorchModel
) -> None:
    scales = {0: (0.5, 0.25), 1: (0.75, 0.125)}

    def skipped(given: Answer) -> tuple[float, str]:
        found = measure_server(given, questions, model, model, matrices(model), scales)
        return found[Metric.SERVER_SKIPPED]

    told = {"model.layers.0.self_attn.attn": (0.5, 0.25), "model.layers.1.self_attn.attn": (0.75, 0.125)}
    same = "12 tensors taken, scales of the KV cache of 2 layers"
    assert skipped(replace(answer, cache_scales=told)) == (0, f"{same}, 0 not as in the files")
    value, detail = skipped(
        replace(answer, cache_scales={**told, "model.layers.1.self_attn.attn": (0.75, 1)})
    )
    assert value == 1
    assert "layer 1, whose scales are (0.75, 1) and (0.75, 0.125) in the files" in detail
    assert skipped(replace(answer, cache_scales={}))[0] == 2
    assert skipped(answer) == (0, f"{same}, which it does not tell")
    assert skipped(replace(answer, logits=None)) == (0, f"{same}, read, not executed")


def test_another_tokenizer_is_named(answer: Answer, questions: ServerQuestions, model: TorchModel) -> None:
    token_ids = ((1, *questions.ids[0]), *questions.ids[1:])
    bad = replace(answer, token_ids=token_ids)
    value, detail = measure_server(bad, questions, model, model, matrices(model))[Metric.SERVER_TOKENIZER]
    assert value == 0.75
    assert "'The sea' is encoded as [1, " in detail


def test_other_logits_are_other_figures(
    answer: Answer, questions: ServerQuestions, model: TorchModel
) -> None:
    assert answer.logits is not None
    logits = tuple(3 * rows for rows in answer.logits)
    pairs = zip(logits, questions.sequences, strict=True)
    own = tuple(log_softmax(rows.copy())[np.arange(len(rows)), ids[1:]] for rows, ids in pairs)
    found = figures(replace(answer, logits=logits, log_probabilities=own), questions, model)
    assert found["kl_mean"] > 1e-3
    assert found["logprob_max_abs"] > 0.1


def test_other_text_has_a_gap(answer: Answer, questions: ServerQuestions, model: TorchModel) -> None:
    assert answer.greedy is not None
    greedy = (tuple((token + 1) % 100 for token in answer.greedy[0]), *answer.greedy[1:])
    assert figures(replace(answer, greedy=greedy), questions, model)["greedy_gap"] > 0.01


def test_a_text_that_ends_too_early_has_a_gap(
    answer: Answer, questions: ServerQuestions, model: TorchModel
) -> None:
    assert answer.greedy is not None
    assert len(answer.greedy[0]) > 3
    ended = replace(answer, greedy=((*answer.greedy[0][:2], END), *answer.greedy[1:]))
    assert figures(ended, questions, model)["greedy_gap"] > 0.01


def test_a_better_server_has_a_smaller_ratio(
    answer: Answer, questions: ServerQuestions, model: TorchModel
) -> None:
    """Logits that favour the text's own tokens raise its probability."""
    assert answer.logits is not None
    logits = tuple(rows.copy() for rows in answer.logits)
    for rows, ids in zip(logits, questions.sequences, strict=True):
        rows[np.arange(len(rows)), ids[1:]] += 1
    pairs = zip(logits, questions.sequences, strict=True)
    own = tuple(log_softmax(rows.copy())[np.arange(len(rows)), ids[1:]] for rows, ids in pairs)
    found = figures(replace(answer, logits=logits, log_probabilities=own), questions, model)
    assert found["perplexity_ratio"] < 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_have_no_figure(
    answer: Answer, questions: ServerQuestions, model: TorchModel, value: float
) -> None:
    assert answer.logits is not None
    rows = answer.logits[0].copy()
    rows[1, 2] = value
    found = figures(replace(answer, logits=(rows, *answer.logits[1:])), questions, model)
    assert math.isnan(found["kl_mean"])
    assert math.isnan(found["greedy_gap"])
    assert found["skipped_tensors"] == 0


def test_log_probabilities_must_be_those_of_the_logits(
    answer: Answer, questions: ServerQuestions, model: TorchModel
) -> None:
    assert answer.log_probabilities is not None
    own = tuple(each - 0.5 for each in answer.log_probabilities)
    found = measure_server(replace(answer, log_probabilities=own), questions, model, model, matrices(model))
    value, detail = found[Metric.SERVER_KL_MEAN]
    assert math.isnan(value)
    assert "0.5 nats from those of its logits" in detail


def test_the_worst_of_several_servers_counts(
    answer: Answer, questions: ServerQuestions, model: TorchModel
) -> None:
    good = measure_server(answer, questions, model, model, matrices(model))
    bad = measure_server(replace(answer, skipped=("a",)), questions, model, model, matrices(model))
    merged = {m.metric: m for m in merge_figures({"vllm 9.1": good, "deepspeed 3": bad}, ())}
    assert merged[Metric.SERVER_SKIPPED].value == 1
    assert merged[Metric.SERVER_SKIPPED].figures == {"vllm 9.1": 0.0, "deepspeed 3": 1.0}
    dead = broken_server(ParityError("vllm 9.1 ended with signal 9"))
    merged = {m.metric: m for m in merge_figures({"vllm 9.1": dead, "deepspeed 3": good}, ())}
    value = merged[Metric.SERVER_TOKENIZER].value
    assert value is not None
    assert math.isnan(value)


def test_a_server_that_only_reads_executes_nothing(
    answer: Answer, questions: ServerQuestions, model: TorchModel
) -> None:
    reader = replace(answer, token_ids=None, logits=None, log_probabilities=None, greedy=None)
    found = measure_server(reader, questions, model, model, matrices(model))
    assert server_record(reader, found).deed is Deed.READ
    merged = {m.metric: m for m in merge_figures({"edgellm 0.11.0": found}, ["edgellm 0.11.0"])}
    assert merged[Metric.SERVER_SKIPPED].value == 0
    assert merged[Metric.SERVER_KL_MEAN].status is MeasurementStatus.NOT_APPLICABLE
    assert merged[Metric.SERVER_KL_MEAN].detail == "edgellm 0.11.0: read, not executed"


@pytest.mark.parametrize("output", [0, 5])
def test_one_scale_that_is_two_percent_off_is_seen(
    answer: Answer, questions: ServerQuestions, model: TorchModel, output: int
) -> None:
    assert answer.products is not None
    first, second = answer.products
    outputs = second.outputs.copy()
    outputs[:, output] *= 1.02
    bad = replace(answer, products=(first, replace(second, outputs=outputs)))
    value, detail = measure_server(bad, questions, model, model, matrices(model))[Metric.SERVER_PRODUCT]
    assert 0.008 < value < 0.05
    assert detail == "2 matrices, the worst model.layers.1.mlp.down_proj"


def test_a_matrix_that_the_artifact_has_not_is_no_figure(
    answer: Answer, questions: ServerQuestions, model: TorchModel
) -> None:
    assert answer.products is not None
    strange = replace(answer.products[0], modules=("model.layers.9.mlp.up_proj",))
    found = measure_server(replace(answer, products=(strange,)), questions, model, model, matrices(model))
    value, detail = found[Metric.SERVER_PRODUCT]
    assert math.isnan(value)
    assert detail == "the artifact has no matrix model.layers.9.mlp.up_proj for 64 inputs"


def test_exported_weights_are_compared(model: TorchModel) -> None:
    read = matrices(model)
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    exported = {name: lambda name=name: read(name) for name in names}
    assert measure_exported(exported, read, names)[Metric.SERVER_WEIGHTS][0] == 0
    lost = measure_exported({names[0]: exported[names[0]]}, read, names)[Metric.SERVER_WEIGHTS]
    assert lost == (1, f"1 matrices of the exported graph, 1 different: {names[1]} is not in the graph")
    exported[names[1]] = lambda: read(names[1]) * np.nan
    assert measure_exported(exported, read, names)[Metric.SERVER_WEIGHTS][0] == 1
    exported[names[1]] = lambda: read(names[1]).T
    value, detail = measure_exported(exported, read, names)[Metric.SERVER_WEIGHTS]
    assert (value, f"{names[1]} has shape" in detail) == (1, True)
    exported[names[1]] = lambda: 1.02 * read(names[1])
    value, detail = measure_exported(exported, read, names)[Metric.SERVER_WEIGHTS]
    assert value == 1
    assert f"{names[1]} differs by" in detail
