"""Quality on text: KL divergence, top-1 agreement and perplexity, token by token over the KV cache.

KL divergence is that of the artifact's next-token distribution q from the original's p,
sum p (log p - log q) in nats (Kullback and Leibler 1951); perplexity is exp of the mean negative
log-likelihood of the next token (Jelinek et al. 1977). Both accumulate in float64.
"""

from dataclasses import dataclass, field

import numpy as np

from llmc.artifact.interface import Measurement
from llmc.config import Metric
from llmc.errors import ConfigError
from llmc.validate.measure import measure, measured, require_comparable
from llmc.validate.reference import TorchModel
from llmc.validate.session import Session

Array = np.ndarray

METRICS = (Metric.TEXT_KL_MEAN, Metric.TEXT_TOP1, Metric.TEXT_PERPLEXITY_RATIO)

#: Windows of the text, their length, and the part that is prefilled before decoding; in tokens.
WINDOWS = 8
WINDOW_TOKENS = 288
PREFIX_TOKENS = 32
#: Fewest tokens that a measurement may rest on.
LEAST_TOKENS = 16
#: Most bytes of the original's logits held at a time.
LOGITS_BYTES = 512 << 20


@dataclass
class _Totals:
    kl: list[Array] = field(default_factory=list)
    equal: int = 0
    nll_original: float = 0.0
    nll_artifact: float = 0.0

    def add(self, original: Array, artifact: Array, targets: Array) -> None:
        """One step: logits (batch, vocabulary) of both, next tokens (batch,)."""
        p, q = log_softmax(original), log_softmax(artifact)
        self.kl.append(np.sum(np.exp(p) * (p - q), axis=-1))
        self.equal += int(np.sum(original.argmax(-1) == artifact.argmax(-1)))
        rows = np.arange(len(targets))
        self.nll_original -= float(p[rows, targets].sum())
        self.nll_artifact -= float(q[rows, targets].sum())


def measure_quality(
    model: Session, reference: TorchModel, tokens: Array, *, start: tuple[int, ...]
) -> tuple[Measurement, ...]:
    """KL divergence, top-1 agreement and perplexity ratio on a text.

    The text is cut into windows spread over it. Of each window the first tokens are prefilled and
    the rest decoded one by one, which is how an artifact serves, whatever logits it returns; several
    windows go as one batch. The original sees each window in one forward pass.

    Args:
        tokens: (n,) int64, the text without special tokens.
        start: Tokens that the tokenizer puts before a text, such as the beginning-of-sequence token.

    Returns:
        One measurement for each of METRICS.

    Raises:
        ConfigError: The text, or the model's positions, are too short.
    """
    length = WINDOW_TOKENS
    if model.interface.max_length is not None:
        length = min(length, model.interface.max_length)
    length = min(length, len(tokens) + len(start))
    prefix = len(start) + max(1, min(PREFIX_TOKENS, (length - len(start)) // 4))
    if length - prefix < LEAST_TOKENS:
        raise ConfigError(
            f"{len(tokens)} tokens of text and {model.interface.max_length} positions leave"
            f" {max(0, length - prefix)} tokens to measure on, at least {LEAST_TOKENS} are needed",
            hint="use a longer evaluation text",
        )
    windows = cut_windows(tokens, length - len(start), start)

    def take() -> tuple[Measurement, ...]:
        totals = _Totals()
        vocabulary = reference.logits(windows[0], keep=1).shape[-1]
        batch = max(1, LOGITS_BYTES // (4 * (length - prefix) * vocabulary))
        for i in range(0, len(windows), batch):
            _compare(model, reference, windows[i : i + batch], prefix, totals)
        return _measurements(totals, len(windows), length, model.where)

    return measure(METRICS, model.where, take)


def cut_windows(tokens: Array, length: int, start: tuple[int, ...]) -> Array:
    """Up to WINDOWS windows of `length` tokens that do not overlap, spread evenly, each after `start`.

    Returns:
        (windows, len(start) + length) int64.
    """
    count = min(WINDOWS, len(tokens) // length)
    stride = len(tokens) // count
    cut = [tokens[i * stride : i * stride + length] for i in range(count)]
    return np.array([[*start, *window] for window in cut], np.int64)


def log_softmax(logits: Array) -> Array:
    """Log of the softmax along the last axis, in float64."""
    shifted: Array = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _compare(model: Session, reference: TorchModel, windows: Array, prefix: int, totals: _Totals) -> None:
    length = windows.shape[1]
    # Logits at position i speak of token i + 1: those from prefix - 1 to length - 2 are measured.
    expected = [reference.logits(row[:-1], keep=length - prefix) for row in windows]
    logits = model.prefill(windows[:, :prefix], steps=length - prefix - 1)[:, -1]
    for step in range(length - prefix):
        at = prefix + step
        if step > 0:
            logits = model.decode(windows[:, at - 1 : at])[:, -1]
        original = np.stack([row[step] for row in expected])
        require_comparable(logits, original, f"position {at - 1} of the evaluation text")
        totals.add(original, logits, windows[:, at])


def _measurements(totals: _Totals, windows: int, length: int, where: str) -> tuple[Measurement, ...]:
    kl = np.concatenate(totals.kl)
    count = len(kl)
    detail = f"{count} tokens in {windows} windows of {length}, decoded one by one"
    with np.errstate(over="ignore"):  # an infinite perplexity fails its gate
        original, artifact = np.exp(np.array([totals.nll_original, totals.nll_artifact]) / count)
    spread = {"kl_p99": float(np.percentile(kl, 99)), "kl_max": float(kl.max()), "tokens": float(count)}
    perplexities = {"perplexity_original": float(original), "perplexity_artifact": float(artifact)}
    return (
        measured(METRICS[0], float(kl.mean()), detail, where, spread),
        measured(METRICS[1], totals.equal / count, detail, where),
        measured(METRICS[2], float(artifact / original), detail, where, perplexities),
    )
