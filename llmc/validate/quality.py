"""Measure quality on text: KL divergence, agreement and perplexity, token by token over the KV cache.

The KL divergence of the artifact's next-token distribution q from the original's p is sum p (log p - log q)
in nats (Kullback and Leibler 1951); perplexity is exp of the mean negative log-likelihood of the next token
(Jelinek et al. 1977). Sums are in float64. Top-1 agreement is the share of tokens with the same most likely
next token; top-5 agreement is the share of the original's five most likely tokens that are among the
artifact's five. A probability below 1e-14 counts as 1e-14 on both sides. Means have 95 % confidence intervals
over the windows.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np

from llmc.arrays import Array
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Family, Metric
from llmc.errors import ConfigError
from llmc.graph.interface import Interface
from llmc.runtime.session import Session
from llmc.validate.distribution import LEAST_LIKELY, TOP, Distribution, Distributions, log_softmax
from llmc.validate.interval import mean_interval
from llmc.validate.measure import measure, measured, require_comparable, unmeasured
from llmc.validate.positions import ReferencePass
from llmc.validate.questions import Question, ask_distributions, ask_divergence, read_divergence
from llmc.validate.reference import Advance, Reference, quietly
from llmc.validate.sensitivity import SensitiveReference, find_unstable
from llmc.validate.yardstick import compare_with_rounding

#: Maximum number of windows of the text, their length, and the part that is prefilled before decoding, in
#: tokens. Thirty-two windows give the mean KL divergence of the demo to 5 %. A model of 8 billion parameters
#: spends half a minute of a core on each side of a window, so that an original larger than LARGE_BYTES gets
#: twelve. Twice as many are measured where these do not decide a gate.
WINDOWS = 32
LARGE_WINDOWS = 12
LARGE_BYTES = 8 << 30
WINDOW_TOKENS = 160
PREFIX_TOKENS = 32
#: Minimum number of windows, and of tokens in each, that a measurement may be based on.
LEAST_WINDOWS = 4
LEAST_TOKENS = 16
#: Approximate number of windows over which the artifact is compared with plain rounding.
YARDSTICK_WINDOWS = 16
#: Approximate number of tokens whose log-probabilities on both sides are written to the report.
PAIRS = 400
#: Maximum bytes of the artifact's KV cache, which bounds the windows of a batch.
CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Windows:
    """The windows that are cut from a text.

    Args:
        tokens: (windows, length) int64; each begins with what the tokenizer puts before a text.
        prefix: Number of tokens of each that are prefilled; the rest is decoded one by one and measured.
    """

    tokens: Array
    prefix: int

    @property
    def steps(self) -> int:
        """The number of measured tokens of each window."""
        return int(self.tokens.shape[1]) - self.prefix

    def sample(self, count: int) -> "Windows":
        """Return about `count` of the windows, spread over the text."""
        return Windows(self.tokens[:: self._stride(count)], self.prefix)

    def sampled(self, values: Array, count: int) -> Array:
        """Return the `values` (windows, …) of the windows of `sample(count)`."""
        return values[:: self._stride(count)]

    @property
    def reference_pass(self) -> ReferencePass:
        """The pass over all windows that gives the logits of their measured tokens."""
        length = int(self.tokens.shape[1])
        return ReferencePass(self.tokens, (), np.arange(self.prefix - 1, length - 1))

    def questions(self) -> list[Question]:
        """Return what `measure_quality` asks the original."""
        return [self._question(row) for row in self.tokens]

    def known(self, reference: Reference) -> list[Distributions]:
        """Return the original's distributions of the measured tokens of each window."""
        return [Distributions.from_bytes(reference.ask(question)) for question in self.questions()]

    def yardstick_questions(self, original: Reference) -> list[Question]:
        """Return what `measure_quality` asks the original with plainly rounded weights."""

        def known(row: Array) -> Distributions:
            return Distributions.from_bytes(original.ask(self._question(row)))

        return [
            ask_divergence(row, self.steps, partial(known, row), (self.prefix,))
            for row in self.sample(YARDSTICK_WINDOWS).tokens
        ]

    def _question(self, row: Array) -> Question:
        return ask_distributions(row, self.steps, (self.prefix,))

    def _stride(self, count: int) -> int:
        return max(1, len(self.tokens) // count)


@dataclass
class _Totals:
    """The figures of every token, (windows, steps) once joined along the last axis."""

    kl: list[Array] = field(default_factory=list)
    top1: list[Array] = field(default_factory=list)
    top5: list[Array] = field(default_factory=list)
    loss: list[Array] = field(default_factory=list)
    loss_original: list[Array] = field(default_factory=list)

    def add(self, original: Sequence[Distribution], artifact: Array, targets: Array) -> None:
        """Add one step: each row's original distribution, logits (vocabulary,), and the next token."""
        figures: list[tuple[float, ...]] = []
        for row, distribution, target in zip(artifact, original, targets, strict=True):
            q = log_softmax(row)
            # A token is among the artifact's five if fewer than five tokens are more likely.
            among = row[distribution.top] >= np.partition(row, -TOP)[-TOP]
            figures.append(
                (
                    distribution.divergence(q),
                    float(row.argmax() == distribution.top[0]),
                    float(np.mean(among)),
                    min(-float(q[target]), LEAST_LIKELY),
                    min(-distribution.target, LEAST_LIKELY),
                )
            )
        series = (self.kl, self.top1, self.top5, self.loss, self.loss_original)
        for values, part in zip(series, np.array(figures, np.float64).T, strict=True):
            values.append(part)


def most_windows(original_bytes: int) -> int:
    """Return the approximate number of windows to measure first, by the bytes of the original in float32."""
    return LARGE_WINDOWS if original_bytes > LARGE_BYTES else WINDOWS


def plan_windows(interface: Interface, tokens: Array, start: tuple[int, ...], most: int = WINDOWS) -> Windows:
    """Cut a text into windows that are spread over it.

    Args:
        tokens: (n,) int64, the text without special tokens.
        start: Tokens that the tokenizer puts before a text, such as the beginning-of-sequence token.
        most: Maximum number of windows.

    Raises:
        ConfigError: The text, or the model's positions, are too short.
    """
    length = WINDOW_TOKENS
    if interface.max_length is not None:
        length = min(length, interface.max_length)
    length = min(length, len(tokens) // LEAST_WINDOWS + len(start))
    prefix = len(start) + max(1, min(PREFIX_TOKENS, (length - len(start)) // 4))
    if length - prefix < LEAST_TOKENS:
        raise ConfigError(
            f"{len(tokens)} tokens of text and {interface.max_length} positions leave"
            f" {max(0, length - prefix)} tokens in each of {LEAST_WINDOWS} windows, at least {LEAST_TOKENS}"
            " are needed",
            hint="use a longer evaluation text",
        )
    return Windows(cut_windows(tokens, length - len(start), start, most), prefix)


def measure_quality(
    model: Session,
    reference: Reference,
    windows: Windows,
    rows: int | None = None,
    rounding: Reference | None = None,
    unstable: tuple[SensitiveReference, float] | None = None,
    advance: Advance = quietly,
) -> tuple[Measurement, ...]:
    """Measure KL divergence, agreement and perplexity ratio on a text.

    The first tokens of each window are prefilled and the rest is decoded one by one, as when the artifact is
    served, whatever logits it returns; several windows run as one batch. The original sees each window in one
    forward pass, unless it has a switch within.

    Args:
        rows: Maximum number of rows of a batch that the model accepts; None for any number.
        rounding: The original with plainly rounded weights (`llmc.validate.yardstick`); None compares
            with no yardstick.
        unstable: The original, and a bound. If the mean KL divergence may exceed the bound, positions that
            rounding alone moves by more, as the original shows, are left out of all figures; None leaves none
            out.
        advance: Called with the number of decode steps done and their total.

    Returns:
        One measurement for each metric of quality on text.
    """

    def take() -> tuple[Measurement, ...]:
        parts, done, count = [], 0, len(windows.tokens)
        batch = _most_rows(model.interface, windows.tokens.shape[1])
        batch = batch if rows is None else min(batch, rows)

        def step() -> None:
            nonlocal done
            done += 1
            advance(done, -(-count // batch) * windows.steps)

        for i in range(0, count, batch):
            part = Windows(windows.tokens[i : i + batch], windows.prefix)
            parts.append(_compare(model, part, part.known(reference), step))
        figures = np.concatenate(parts, axis=1)
        left_out = np.zeros(figures[0].shape, bool)
        if unstable is not None and mean_interval(figures[0].mean(axis=1).tolist())[1] > unstable[1]:
            left_out = find_unstable(unstable[0], windows.tokens, figures[0], unstable[1])
        measurements = _measurements(figures, left_out, windows.tokens.shape[1], model.where)
        if rounding is None:
            why = "no matrix is stored as integers by block, or the target has no gate on it"
            status = MeasurementStatus.NOT_APPLICABLE
            return (*measurements, unmeasured(Metric.TEXT_KL_RATIO, status, why, model.where))
        plain = [read_divergence(rounding.ask(q)).mean() for q in windows.yardstick_questions(reference)]
        own = windows.sampled(figures[0], YARDSTICK_WINDOWS).mean(axis=1)
        return (*measurements, compare_with_rounding(own, np.array(plain), model.where))

    return measure(Family.TEXT.metrics, model.where, take)


def cut_windows(tokens: Array, length: int, start: tuple[int, ...], most: int = WINDOWS) -> Array:
    """Cut up to `most` windows of `length` tokens that do not overlap, spread evenly, each after `start`.

    Returns:
        (windows, len(start) + length) int64.
    """
    count = min(most, len(tokens) // length)
    stride = len(tokens) // count
    cut = [tokens[i * stride : i * stride + length] for i in range(count)]
    return np.array([[*start, *window] for window in cut], np.int64)


def _compare(
    model: Session, windows: Windows, distributions: Sequence[Distributions], advance: Callable[[], None]
) -> Array:
    """Return (5, windows, steps): KL divergence, top-1, top-5, and the losses of artifact and original.

    Args:
        distributions: The original's distributions of the measured tokens of each window.
        advance: Called after each step.
    """
    totals, tokens = _Totals(), windows.tokens
    shape = (len(tokens), distributions[0].vocabulary)
    # Logits at position i predict token i + 1: those from prefix - 1 to length - 2 are measured.
    logits = model.prefill(tokens[:, : windows.prefix], steps=windows.steps - 1)[:, -1]
    with ThreadPoolExecutor(1) as pool:  # figures of a step are computed while the next one runs
        pending: Future[None] | None = None
        for step in range(windows.steps):
            at = windows.prefix + step
            if step > 0:
                logits = model.decode(tokens[:, at - 1 : at])[:, -1]
            require_comparable(logits, shape, f"position {at - 1} of the evaluation text")
            if pending is not None:
                pending.result()
            step_distributions = [each.positions[step] for each in distributions]
            pending = pool.submit(totals.add, step_distributions, logits, tokens[:, at])
            advance()
        if pending is not None:
            pending.result()
    series = (totals.kl, totals.top1, totals.top5, totals.loss, totals.loss_original)
    return np.stack([np.stack(part, axis=1) for part in series])


def _most_rows(interface: Interface, length: int) -> int:
    """Return how many windows of `length` tokens have caches that fit in CACHE_BYTES, at least one."""
    slots = length
    if interface.static_cache and interface.max_length is not None:
        slots = interface.max_length
    values = sum(slot.kv_heads * (slot.key_width + slot.value_width) for slot in interface.cache)
    fixed = sum(math.prod(state.shape) for state in interface.states)
    return max(1, CACHE_BYTES // max(1, 4 * (values * slots + fixed)))


def _measurements(figures: Array, left_out: Array, length: int, where: str) -> tuple[Measurement, ...]:
    """Summarize figures (5, windows, steps) as one measurement for each metric of text but TEXT_KL_RATIO.

    Args:
        left_out: (windows, steps) bool, positions that are not counted.
    """
    windows, steps = left_out.shape
    tokens = left_out.size - np.count_nonzero(left_out)
    detail = f"{tokens} tokens in {windows} windows of {length}, decoded one by one"
    if left_out.any():
        detail += (
            f"; {np.count_nonzero(left_out)} more are left out, where rounding alone moves the original by "
            "more than the bound"
        )
    # Each of them gets the mean of its window, which does not change the means over windows.
    weights = np.broadcast_to(~left_out, figures.shape)
    averages = np.sum(figures, axis=2, keepdims=True, where=weights) / np.maximum(
        1, np.count_nonzero(weights, axis=2, keepdims=True)
    )
    kl, top1, top5, loss, loss_original = np.where(left_out, averages, figures)
    means = [mean_interval(x.mean(axis=1).tolist()) for x in (kl, top1, top5, loss - loss_original)]
    original, artifact = np.exp(np.array([loss_original.mean(), loss.mean()]))
    ratio_interval = tuple(float(v) for v in np.exp(np.array(means[3])))
    perplexities = {"perplexity_original": float(original), "perplexity_artifact": float(artifact)}
    # The divergence along the text shows how the loss grows with the cache.
    cuts = np.linspace(0, steps, min(steps, 16) + 1).astype(int)
    along = {f"position_{a}": float(kl[:, a:b].mean()) for a, b in pairwise(cuts.tolist())}
    # Every n-th log-probability of the text's own tokens is kept for a picture of both sides.
    sample = np.stack([-loss_original.ravel(), -loss.ravel()], axis=1)[:: max(1, loss.size // PAIRS)]
    perplexity = measured(
        Metric.TEXT_PERPLEXITY_RATIO,
        float(np.exp((loss - loss_original).mean())),
        detail,
        where,
        perplexities,
        (ratio_interval[0], ratio_interval[1]),
    )
    return (
        measured(
            Metric.TEXT_KL_MEAN, float(kl.mean()), detail, where, along | {"tokens": float(tokens)}, means[0]
        ),
        measured(Metric.TEXT_KL_P99, float(np.percentile(kl, 99)), detail, where),
        measured(Metric.TEXT_KL_MAX, float(kl.max()), detail, where),
        measured(Metric.TEXT_TOP1, float(top1.mean()), detail, where, interval=means[1]),
        measured(Metric.TEXT_TOP5, float(top5.mean()), detail, where, interval=means[2]),
        perplexity.model_copy(
            update={"pairs": tuple((round(float(a), 3), round(float(b), 3)) for a, b in sample)}
        ),
    )
