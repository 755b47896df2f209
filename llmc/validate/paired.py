"""Run the served program beside the same program in float32, over the same inputs.

Compiled kernels round activations to 8 bits, which moves every logit at every position by a similar amount. A
fault of a kernel moves the logits at some positions, for instance after pieces of one length, or those of
some tokens, for instance the last ones of the vocabulary. The difference of the two programs is therefore
measured by its size and by how evenly it is spread.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.artifact.manifest import MODEL
from llmc.artifact.verdict import Measurement
from llmc.config import Family, Metric
from llmc.errors import ParityError
from llmc.graph.interface import Interface
from llmc.runtime.session import Session
from llmc.validate.distribution import log_softmax
from llmc.validate.measure import broken, measured

#: Minimum number of positions with equally many tokens in their call that are judged, and by which quantile.
_LEAST, _QUANTILE = 4, 0.25
_CHOICES = frozenset({"TopK", "MoE", "QMoE"})
#: Number of positions that are compared at once, which bounds the memory of a long prompt with all logits.
_POSITIONS = 64
#: Bound above the lowest number of float16, which masks a token as those of wider types do.
_MASKED = -6e4


@dataclass
class Paired:
    """The session of the exact program that also runs the served program and records the differences.

    Args:
        exact: The program in float32, whose logits are returned.
        served: The program as it is served.
        routed: Whether a router chooses experts: rounding decides near ties, which moves a fifth of the
            positions by far more than others where there are few experts. Positions are therefore compared by
            the number of tokens in their call, and by the lower quartile: a fault moves all of them.
    """

    exact: Session
    served: Session
    routed: bool = False
    _kl: list[float] = field(default_factory=list)
    _noise: list[float] = field(default_factory=list)
    _weights: list[float] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)
    _by_token: Array = field(default_factory=lambda: np.zeros(0))
    _chosen: Array = field(default_factory=lambda: np.zeros(0, np.bool_))

    def __post_init__(self) -> None:
        self.interface: Interface = self.exact.interface
        self.where: str = self.exact.where

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        """Return logits of a prompt by the exact program; padded positions are not compared."""
        logits = self.exact.prefill(input_ids, mask, steps=steps)
        served = self.served.prefill(input_ids, mask, steps=steps)
        real = mask is not None and logits.shape[1] == mask.shape[1]
        self._compare(
            input_ids.shape[1], logits, served, mask.astype(bool) if real and mask is not None else None
        )
        return logits

    def decode(self, tokens: Array) -> Array:
        """Return logits of further tokens of every row by the exact program."""
        logits = self.exact.decode(tokens)
        self._compare(tokens.shape[1], logits, self.served.decode(tokens), None)
        return logits

    def state(self) -> tuple[Any, Any]:
        """Return this point of the sequence in both programs."""
        return self.exact.state(), self.served.state()

    def rewind(self, state: tuple[Any, Any], total: int) -> None:
        """Return to the first `total` tokens of `state`, taken since the last prefill of one row."""
        self.exact.rewind(state[0], total)
        self.served.rewind(state[1], total)

    def measure(self) -> tuple[Measurement, ...]:
        """Measure size and evenness of all differences so far; NaN if nothing was compared."""
        if not self._kl:
            return broken(Family.ROUNDING.metrics, ParityError("no position was compared"), self.where)
        noise = self._by_position()
        tokens = np.sqrt(self._by_token / len(self._noise))
        median = float(np.median(self._noise))
        detail = f"{len(self._kl)} positions, the served program compared with the same in float32"
        deviation = f"{detail}; the difference of logits without its mean, over their standard deviation"
        each = "each number of tokens in a call" if self.routed else "each position"
        return (
            measured(Metric.ROUNDING_KL_MEAN, float(np.mean(self._kl)), detail, self.where),
            measured(
                Metric.ROUNDING_KL_RATIO,
                self._kl_ratio(median),
                f"{detail}; over the divergence of even noise",
                self.where,
            ),
            measured(
                Metric.ROUNDING_NOISE_RATIO, median, f"{deviation}, median of the positions", self.where
            ),
            measured(
                Metric.ROUNDING_POSITION_RATIO, _unevenness(noise, median), f"{deviation}, {each}", self.where
            ),
            measured(
                Metric.ROUNDING_TOKEN_RATIO,
                _unevenness(tokens, float(np.median(tokens[self._chosen]))),
                f"{deviation}, each token; the worst is {tokens.argmax()}",
                self.where,
            ),
        )

    def _kl_ratio(self, median: float) -> float:
        """Return the mean KL divergence over the divergence that even noise of the median size causes.

        With a router it is the largest of the lower quartiles over calls with equally many tokens.
        """
        even, divergences = np.square(median) * np.array(self._weights), np.array(self._kl)
        if not divergences.any():
            return 1.0
        if not even.any():
            return float("inf")
        if not self.routed:
            return float(divergences.mean() / even.mean())
        return float(
            self._quartiles(divergences / np.maximum(even, np.finfo(np.float64).tiny)).max(initial=0.0)
        )

    def _by_position(self) -> Array:
        """Return the noise of every position; with a router the quartiles by number of tokens in the call."""
        noise = np.array(self._noise)
        return self._quartiles(noise) if self.routed else noise

    def _quartiles(self, values: Array) -> Array:
        """Return lower quartiles over positions whose calls had equally many tokens, if they are enough."""
        counts = np.array(self._tokens)
        groups = [values[counts == count] for count in np.unique(counts)]
        judged = [group for group in groups if len(group) >= _LEAST]
        return np.array([np.quantile(group, _QUANTILE, method="lower") for group in judged])

    def _compare(self, tokens: int, exact: Array, served: Array, real: Array | None) -> None:
        """Record the differences at the positions that are `real`, or at all of them where it is None.

        Args:
            tokens: Number of tokens of each sequence in the call.
            exact, served: Logits, (batch, positions, vocabulary).
        """
        if exact.shape != served.shape:
            raise ParityError(f"served logits have shape {served.shape}, those in float32 {exact.shape}")
        pair = [x.reshape(-1, x.shape[-1]) if real is None else x[real] for x in (exact, served)]
        if len(self._by_token) == 0:
            self._by_token = np.zeros(exact.shape[-1])
            self._chosen = np.zeros(exact.shape[-1], np.bool_)
        for start in range(0, len(pair[0]), _POSITIONS):
            self._record(*(x[start : start + _POSITIONS] for x in pair))
        self._tokens += [tokens] * len(pair[0])

    def _record(self, expected: Array, actual: Array) -> None:
        """Add some positions, (positions, vocabulary) float32 each.

        Tokens that both programs mask do not count: a model gives the lowest number of its type, or minus
        infinity, to those that it never chooses.
        """
        kept = (expected > _MASKED) | (actual > _MASKED)
        p, q = log_softmax(expected), log_softmax(actual)
        chances = np.exp(p)
        moved = _difference(actual, expected, kept)
        moved -= moved.mean(axis=1, keepdims=True, where=kept)  # probabilities do not depend on it
        spread = np.where(kept, expected, 0).std(axis=1, where=kept)
        squares = np.square(moved / np.maximum(spread, np.finfo(np.float32).tiny)[:, None]) * kept
        self._kl += (chances * _difference(p, q, kept)).sum(axis=1, dtype=np.float64).tolist()
        self._noise += np.sqrt(squares.mean(axis=1, dtype=np.float64, where=kept)).tolist()
        # To second order it is half the variance of the logits' change under the distribution itself.
        self._weights += (np.square(spread) * (1 - np.square(chances).sum(axis=1)) / 2).tolist()
        self._by_token += squares.sum(axis=0, dtype=np.float64)
        self._chosen |= kept.any(axis=0)


def _difference(first: Array, second: Array, kept: Array) -> Array:
    """Return first - second where `kept`, and 0 elsewhere."""
    difference: Array = np.subtract(first, second, out=np.zeros_like(first), where=kept)
    return difference


def _unevenness(noise: Array, median: float) -> float:
    """Return the largest noise over the median; 1 where there is no noise at all."""
    most = float(np.max(noise, initial=0.0))
    if most == 0.0:
        return 1.0
    return most / median if median else float("inf")


def chooses_experts(folder: Path) -> bool:
    """Return whether the graph of an artifact contains a choice of experts."""
    import onnx_ir as ir

    return any(node.op_type in _CHOICES for node in ir.load(folder / MODEL).graph)
