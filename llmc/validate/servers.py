"""Compare what servers compute from a checkpoint with the original and with the artifact's own weights.

A server is right if it takes every tensor, encodes text as the original does, and computes what the original
computes with the artifact's own weights, up to its arithmetic: it rounds activations, and quantizes them
where the format says so.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.artifact.served import Deed, ServerRecord
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Family, Metric
from llmc.errors import ParityError
from llmc.servers.answer import Answer, Product, Request
from llmc.validate.distribution import Distributions, log_softmax
from llmc.validate.generation import fitting_prompts
from llmc.validate.measure import measured, require_comparable, unmeasured
from llmc.validate.questions import Question, ask_distributions, ask_followed, read_followed
from llmc.validate.reference import Reference

#: Sequences of the evaluation text, and tokens of each.
SEQUENCES, LENGTH = 2, 128
NEW_TOKENS = 16
#: Characters of the evaluation text that the tokenizers encode besides the prompts.
_CHARACTERS = 2000
#: The most that the logits of all sequences may take on disk.
_LOGIT_BYTES = 512 << 20
#: Nats by which a server's own log-probabilities may differ from its logits, both rounded to float32.
_SAME = 1e-3
#: Error of an exported weight, of the largest of its matrix: scales are rounded to float16.
_ROUNDED = 2**-10
_ARITHMETIC = (
    Metric.SERVER_PRODUCT,
    Metric.SERVER_LOGPROB,
    Metric.SERVER_KL_MEAN,
    Metric.SERVER_PERPLEXITY_RATIO,
    Metric.SERVER_GREEDY_GAP,
)

#: Reads the matrix of a module, (outputs, inputs) float32; None for a module that has none.
Matrix = Callable[[str], Array | None]
#: Figures of one server: the value, and what it is about.
Figures = dict[Metric, tuple[float, str]]


@dataclass(frozen=True)
class ServerQuestions:
    """What all servers are asked about an artifact.

    Args:
        texts: Texts to encode.
        ids: Their tokens by the original's tokenizer.
        continued: How many of the texts are continued, from the first on.
        sequences: Tokens whose distributions are compared.
        stop: The original's end tokens.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    continued: int
    sequences: tuple[Array, ...]
    stop: tuple[int, ...]

    def request(self, threads: int | None) -> Request:
        """Return the request to a server."""
        return Request(
            sequences=[ids.tolist() for ids in self.sequences],
            prompts=self.texts,
            continued=self.ids[: self.continued],
            new_tokens=NEW_TOKENS,
            threads=threads,
        )

    def distributions(self) -> list[Question]:
        """Return the questions for distributions, which both references are asked."""
        return [ask_distributions(ids, len(ids) - 1) for ids in self.sequences]

    def followed(self, answers: Sequence[Answer]) -> list[Question]:
        """Return the questions on the servers' texts, which the original with the own weights is asked."""
        return [
            self.follow(number, text) for answer in answers for number, text in enumerate(answer.greedy or ())
        ]

    def follow(self, number: int, text: Sequence[int]) -> Question:
        """Return the question on the text that a server gave after a prompt."""
        return ask_followed(self.ids[number], self.without_end(text), self.stop)

    def without_end(self, text: Sequence[int]) -> Sequence[int]:
        """Return a text without its end token."""
        return text[:-1] if text and text[-1] in self.stop else text


def plan_questions(
    text: str,
    tokens: Array,
    prompts: Sequence[str],
    tokenizer: Any,
    stop: Sequence[int],
    context: int | None,
    vocabulary: int,
) -> ServerQuestions:
    """Choose what servers are asked: the beginnings of two halves of the text, and the prompts.

    Args:
        text: The evaluation text.
        tokens: Its tokens, (n,) int64, by the original's tokenizer.
        tokenizer: The original's.
        context: Most tokens of a sequence; None for any number.
    """
    length = min(LENGTH, context or LENGTH, max(2, _LOGIT_BYTES // (4 * vocabulary * SEQUENCES)))
    starts = sorted({0, max(0, len(tokens) // 2)})[:SEQUENCES]
    sequences = tuple(tokens[start : start + length] for start in starts)
    fitting = fitting_prompts(prompts, tokenizer, context)
    texts = (*fitting, text[:_CHARACTERS])
    ids = tuple(tuple(int(t) for t in tokenizer(each, verbose=False)["input_ids"]) for each in texts)
    return ServerQuestions(
        texts, ids, len(fitting), tuple(each for each in sequences if len(each) > 1), tuple(stop)
    )


def measure_server(
    answer: Answer,
    questions: ServerQuestions,
    original: Reference,
    own: Reference,
    matrix: Matrix,
    scales: Mapping[int, tuple[float, float]] | None = None,
) -> Figures:
    """Return the figures of one server; NaN for those that its answer is not good for.

    SERVER_SKIPPED counts the tensors of the files that the server did not take, its parameters that none
    filled, and the layers that cache keys and values by other scales than those of the files.
    SERVER_TOKENIZER is the share of texts that its tokenizer encodes as the original's does. SERVER_LOGPROB
    is the largest difference of the log-probability of a text's own token, and SERVER_KL_MEAN the mean KL
    divergence, both from the original with the artifact's own weights; SERVER_PERPLEXITY_RATIO is the ratio
    to the unmodified original's. SERVER_PRODUCT is the largest error of an output of a matrix, in multiples
    of the length of the artifact's own weights for it. SERVER_GREEDY_GAP is the largest margin, in logits,
    by which the original with the artifact's weights prefers another token than one of the server's greedy
    text.

    Args:
        matrix: Reads the artifact's own weights.
        scales: The scales of keys and values in the files, by layer; None if they have none.
    """
    other = _other_scales(answer, scales or {})
    missing = (*answer.skipped, *answer.unfilled, *other)
    named = f"{answer.taken} tensors taken"
    if scales:
        known = (
            "which it does not tell" if answer.cache_scales is None else f"{len(other)} not as in the files"
        )
        if answer.logits is None:
            known = "read, not executed"
        named += f", scales of the KV cache of {len(scales)} layers, {known}"
    if missing:
        named += f", {len(missing)} not, the first {missing[0]}"
    figures: Figures = {Metric.SERVER_SKIPPED: (float(len(missing)), named)}
    if answer.token_ids is not None:
        figures[Metric.SERVER_TOKENIZER] = _compare_tokens(answer.token_ids, questions)
    if answer.logits is None or answer.log_probabilities is None or answer.greedy is None:
        return figures
    try:
        figures |= _compare_distributions(answer, questions, original, own)
        if answer.products is not None:
            figures[Metric.SERVER_PRODUCT] = _compare_products(answer.products, matrix)
        figures[Metric.SERVER_GREEDY_GAP] = _greedy_gap(answer.greedy, questions, own)
    except ParityError as error:
        figures |= dict.fromkeys(_ARITHMETIC, (math.nan, error.fact))
    return figures


def _other_scales(answer: Answer, scales: Mapping[int, tuple[float, float]]) -> list[str]:
    """Say of each layer whose KV cache a server has other scales for than the files, which they are."""
    if answer.cache_scales is None:
        return []
    used = {int(re.findall(r"\d+", name)[-1]): pair for name, pair in answer.cache_scales.items()}
    return [
        f"the KV cache of layer {layer}, whose scales are {used.get(layer, 'none')} and {pair} in the files"
        for layer, pair in sorted(scales.items())
        if used.get(layer) != pair
    ]


def measure_exported(
    exported: Mapping[str, Callable[[], Array]], matrix: Matrix, modules: Sequence[str]
) -> Figures:
    """Return SERVER_WEIGHTS: the number of matrices of an exported graph that are not the artifact's own.

    Args:
        exported: Reads each matrix of the graph by the name of its module.
        matrix: Reads the artifact's own weights.
        modules: Those that the artifact quantizes, each of which the graph must have.
    """
    different = [f"{module} is not in the graph" for module in modules if module not in exported]
    count = 0
    for module in modules:
        own = matrix(module)
        if module not in exported or own is None:
            continue
        found, count = exported[module](), count + 1
        if found.shape != own.shape:
            different.append(f"{module} has shape {found.shape}, the artifact's {own.shape}")
        elif not np.abs(found - own).max(initial=0.0) <= _ROUNDED * np.abs(own).max(initial=0.0):
            different.append(f"{module} differs by {np.abs(found - own).max():.3g}")
    detail = f"{count} matrices of the exported graph"
    if different:
        detail += f", {len(different)} different: {different[0]}"
    return {Metric.SERVER_WEIGHTS: (float(len(different)), detail)}


def broken_server(error: ParityError) -> Figures:
    """Return NaN for every figure of a server that failed."""
    return dict.fromkeys(Family.SERVER.metrics, (math.nan, error.fact))


def merge_figures(
    found: Mapping[str, Figures], reading: Sequence[str], idle: Mapping[str, str] | None = None
) -> tuple[Measurement, ...]:
    """Return one measurement for each metric: the worst of the servers, each named.

    Args:
        found: The figures by server and version.
        reading: The servers among them that only read the checkpoint.
        idle: Why each server that was named was not started.
    """
    return tuple(_merge(metric, found, reading, idle or {}) for metric in Family.SERVER.metrics)


def idle_record(name: str, version: str) -> ServerRecord:
    """Return the record of a server that was not started, since it cannot compute the artifact here."""
    return ServerRecord(name=name, version=version, deed=Deed.NOT_ASKED)


def server_record(answer: Answer, figures: Figures) -> ServerRecord:
    """Return the record of a server that answered."""
    return ServerRecord(
        name=answer.server,
        version=answer.version,
        deed=Deed.READ if answer.logits is None else Deed.EXECUTED,
        where=answer.where,
        dtype=answer.dtype,
        taken=answer.taken,
        skipped=len(answer.skipped) + len(answer.unfilled),
        figures={metric.value: value for metric, (value, _) in figures.items()},
    )


def _merge(
    metric: Metric, found: Mapping[str, Figures], reading: Sequence[str], idle: Mapping[str, str]
) -> Measurement:
    values = {name: figures[metric] for name, figures in found.items() if metric in figures}
    where = ", ".join((*found, *idle))
    if not values:
        reasons = [f"{', '.join(reading)}: {Deed.READ}"] if reading else []
        reasons += [f"{name}: {Deed.NOT_ASKED}, {reason}" for name, reason in idle.items()]
        why = "; ".join(reasons) or "no server that was asked has it"
        return unmeasured(metric, MeasurementStatus.NOT_APPLICABLE, why, where)
    pick = max if metric.better.value == "less" else min
    worst = pick(values, key=lambda name: _order(values[name][0], metric))
    detail = "; ".join(f"{name}: {value:.4g}, {words}" for name, (value, words) in values.items())
    figures = {name: value for name, (value, _) in values.items()} if len(values) > 1 else None
    return measured(metric, values[worst][0], detail, where, figures)


def _order(value: float, metric: Metric) -> float:
    """Return the value, or the worst there can be for one that is NaN."""
    if not math.isnan(value):
        return value
    return math.inf if metric.better.value == "less" else -math.inf


def _compare_tokens(given: Sequence[Sequence[int]], questions: ServerQuestions) -> tuple[float, str]:
    pairs = zip(questions.texts, questions.ids, given, strict=True)
    other = [(text, ids, told) for text, ids, told in pairs if tuple(told) != ids]
    detail = f"{len(given)} texts"
    if other:
        text, ids, told = other[0]
        detail += f"; {text[:40]!r} is encoded as {list(told[:8])}, the original's tokens are {list(ids[:8])}"
    return 1 - len(other) / max(1, len(given)), detail


def _compare_distributions(
    answer: Answer, questions: ServerQuestions, original: Reference, own: Reference
) -> Figures:
    """Compare logits and log-probabilities of the sequences.

    Raises:
        ParityError: They are not finite, have another shape, or contradict each other.
    """
    differences, divergences, served, before = [], [], [], []
    pairs = zip(questions.distributions(), answer.logits or (), answer.log_probabilities or (), strict=True)
    for number, (question, logits, given) in enumerate(pairs):
        place = f"sequence {number + 1}"
        known = Distributions.from_bytes(own.ask(question))
        require_comparable(logits, (len(known.positions), known.vocabulary), place)
        require_comparable(given, (len(known.positions),), place)
        targets = questions.sequences[number][1:]
        computed = log_softmax(logits.astype(np.float32))[np.arange(len(targets)), targets]
        if (apart := float(np.abs(computed - given).max())) > _SAME:
            raise ParityError(f"log-probabilities at {place} are {apart:.3g} nats from those of its logits")
        differences.append(np.abs(given - np.array([p.target for p in known.positions])))
        divergences.append(known.divergences(logits))
        served.append(given.astype(np.float64))
        whole = Distributions.from_bytes(original.ask(question))
        before.append(np.array([p.target for p in whole.positions]))
    count = sum(map(len, differences))
    scope = f"{count} positions, {answer.dtype}"
    ratio = float(np.exp(np.concatenate(before).mean() - np.concatenate(served).mean()))
    return {
        Metric.SERVER_LOGPROB: (float(np.concatenate(differences).max()), scope),
        Metric.SERVER_KL_MEAN: (float(np.concatenate(divergences).mean()), scope),
        Metric.SERVER_PERPLEXITY_RATIO: (ratio, scope),
    }


def _compare_products(products: Sequence[Product], matrix: Matrix) -> tuple[float, str]:
    """Return the largest error of an output, and the matrix that has it.

    An output is a sum of its weights with random signs, whose size is the length of the row of weights.

    Raises:
        ParityError: A product is not finite or has another shape, or the artifact has no such matrix.
    """
    worst, at, count = 0.0, "none", 0
    for product in products:
        start = 0
        for module in product.modules:
            weights = matrix(module)
            if weights is None or weights.shape[1] != product.inputs.shape[1]:
                raise ParityError(f"the artifact has no matrix {module} for {product.inputs.shape[1]} inputs")
            stop = start + len(weights)
            actual = product.outputs[:, start:stop]
            require_comparable(actual, (len(product.inputs), len(weights)), f"the product of {module}")
            length = np.linalg.norm(weights, axis=1) * math.sqrt(len(product.inputs))
            error = np.linalg.norm(actual - product.inputs @ weights.T, axis=0)
            relative = float((error / np.maximum(length, np.finfo(np.float32).tiny)).max())
            worst, at = max((worst, at), (relative, module))
            start, count = stop, count + 1
    return worst, f"{count} matrices, the worst {at}"


def _greedy_gap(
    texts: Sequence[Sequence[int]], questions: ServerQuestions, own: Reference
) -> tuple[float, str]:
    gaps = []
    for number, text in enumerate(texts):
        gap = read_followed(own.ask(questions.follow(number, text))).gap
        inner = len(questions.without_end(text))
        ended = inner < NEW_TOKENS  # an end token was chosen
        gaps.append(float(gap[: inner + ended].max(initial=0.0)))
    return max(gaps, default=0.0), f"{len(texts)} prompts, {NEW_TOKENS} new tokens each"
