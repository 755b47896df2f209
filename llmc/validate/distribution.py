"""Store next-token distributions of the original in a form that is small enough for a whole text.

The likeliest tokens of a position are stored one by one; the rest, at most REST of the probability, is stored
as one event. A KL divergence is therefore never larger than the exact one, by the log-sum inequality, and
smaller by the rest's probability times the divergence within the rest: 0.06 % of a divergence of 0.09 nats on
SmolLM2-135M. The text's own next token has its exact log-probability.

A log-probability is stored in 16 bits as a whole number of steps of 2**-11 nats below zero, so that the
largest code, 32 nats, stands for everything less likely than 1e-14. The rounding error is at most 2**-12 nats
in both directions. It changes a divergence of k nats at one position by up to 2**-11 times the square root of
k, and the mean by a negligible amount.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmc.arrays import Array

#: Number of likeliest tokens that are named exactly.
TOP = 5
#: Maximum total probability of the tokens of a position that are not stored one by one.
REST = 2.5e-4
_STEPS_PER_NAT = 2048
#: Number of codes per bin in the search for the least probability stored: a sixteenth of a nat.
_BIN = _STEPS_PER_NAT // 16
_LEAST = np.iinfo(np.uint16).max
#: Nats. Probabilities below this are not distinguished.
LEAST_LIKELY = _LEAST / _STEPS_PER_NAT


@dataclass(frozen=True)
class Distribution:
    """The original's distribution of the next token at one position.

    Args:
        top: (TOP,) int32, the likeliest tokens of the exact logits, the first the likeliest.
        target: Exact log-probability of the text's own next token.
        rest: Total probability of all tokens that are not stored.
        bits: uint8, a bit for each token of the vocabulary whose log-probability is in `codes`.
        codes: uint16, steps of 2**-11 nats below zero, in the tokens' order.
    """

    top: Array
    target: float
    rest: float
    bits: Array
    codes: Array

    @classmethod
    def of_logits(cls, row: Array, target: int) -> "Distribution":
        """Build a distribution from logits (vocabulary,) float32 and the text's next token."""
        log_probabilities = log_softmax(row)
        best = np.argpartition(row, -TOP)[-TOP:]
        codes = np.minimum(np.rint(log_probabilities * -_STEPS_PER_NAT), _LEAST).astype(np.uint16)
        bins = codes // _BIN
        mass = np.bincount(bins, weights=np.exp(log_probabilities, dtype=np.float64))
        # Take bins from the likeliest on until at most REST of the probability is left.
        behind = np.append(np.cumsum(mass[:0:-1])[::-1], 0.0)
        last = int(np.argmax(behind <= REST))
        stored = bins <= last
        top = best[np.argsort(-row[best], kind="stable")]
        return cls(
            top, float(log_probabilities[target]), float(behind[last]), np.packbits(stored), codes[stored]
        )

    def divergence(self, q: Array) -> float:
        """Return the KL divergence from this, in nats, of log-probabilities `q` (vocabulary,) float32."""
        kept = np.unpackbits(self.bits, count=len(q)).astype(bool)
        p = self.codes * np.float32(-1 / _STEPS_PER_NAT)
        chances = np.exp(p, dtype=np.float64)
        scale = (1 - self.rest) / chances.sum()  # rounding leaves the sum a little off
        value = float((scale * chances * (p + np.log(scale) - q[kept])).sum())
        if self.rest > 0:
            others = q[~kept].astype(np.float64)
            most = others.max()
            held = most + np.log(np.exp(others - most).sum())
            value += float(self.rest * (np.log(self.rest) - held))
        return value


@dataclass(frozen=True)
class Distributions:
    """The original's distributions of the next token at some positions of a text.

    Args:
        vocabulary: Number of tokens.
        positions: One distribution each.
    """

    vocabulary: int
    positions: tuple[Distribution, ...]

    @classmethod
    def of_logits(cls, logits: Array, targets: Array) -> "Distributions":
        """Build them from logits (positions, vocabulary) float32 and the text's next tokens (positions,)."""
        distributions = (Distribution.of_logits(row, int(t)) for row, t in zip(logits, targets, strict=True))
        return cls(logits.shape[1], tuple(distributions))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Distributions":
        """Read what `to_bytes` returned; the codes share the memory of `data`."""
        count, vocabulary = np.frombuffer(data, np.int32, 2).tolist()
        return cls(vocabulary, tuple(_read(data, count, vocabulary)))

    def to_bytes(self) -> bytes:
        """Return sizes (2,) int32; of all positions top int32, target and rest float64, bits; then codes."""
        rows = self.positions
        return b"".join(
            [
                np.array([len(rows), self.vocabulary], np.int32).tobytes(),
                *(row.top.astype(np.int32).tobytes() for row in rows),
                np.array([(row.target, row.rest) for row in rows], np.float64).tobytes(),
                *(row.bits.tobytes() for row in rows),
                *(row.codes.tobytes() for row in rows),
            ]
        )

    def divergences(self, logits: Array) -> Array:
        """Return float64 KL divergences of each position's softmax of `logits` (positions, vocabulary)."""
        pairs = zip(self.positions, logits, strict=True)
        return np.array([known.divergence(log_softmax(row)) for known, row in pairs], np.float64)


def _read(data: bytes, count: int, vocabulary: int) -> Iterator[Distribution]:
    at, packed = 8, -(-vocabulary // 8)
    tops = np.frombuffer(data, np.int32, count * TOP, at).reshape(count, TOP)
    at += tops.nbytes
    pairs = np.frombuffer(data[at : at + 16 * count], np.float64).reshape(count, 2)
    at += pairs.nbytes
    bits = np.frombuffer(data, np.uint8, count * packed, at).reshape(count, packed)
    at += bits.nbytes
    for top, (target, rest), row in zip(tops, pairs, bits, strict=True):
        size = int(np.unpackbits(row, count=vocabulary).sum(dtype=np.int64))
        codes = np.frombuffer(data[at : at + 2 * size], np.uint16)
        at += 2 * size
        yield Distribution(top, float(target), float(rest), row, codes)


def log_softmax(logits: Array) -> Array:
    """Return the log of the softmax along the last axis, in the input's type; sums are in float64."""
    shifted: Array = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(shifted.dtype)
    return shifted
