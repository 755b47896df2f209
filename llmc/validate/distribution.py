"""Next-token distributions of the original in a form that is small enough to keep for a whole text.

The likeliest tokens of a position are kept one by one, the rest, at most REST of the probability, as one
event. So a KL divergence is never more than the exact one, by the log-sum inequality, and less by the rest's
probability times the divergence within the rest: 0.06 % of a divergence of 0.09 nats on SmolLM2-135M. The
text's own next token has its exact log-probability.

A log-probability is stored as a whole number of steps of 2**-11 nats below zero in 16 bits, so that the
largest, 32 nats, stands for everything less likely than 1e-14. Rounding is off by 2**-12 nats at most, either
way: a divergence of k nats at one position by up to 2**-11 of the root of k, their mean by next to nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmc.arrays import Array

#: Likeliest tokens that are named exactly.
TOP = 5
#: Most probability of the tokens of a position that are not kept one by one.
REST = 2.5e-4
_STEPS_PER_NAT = 2048
#: Codes that share a bin where the least kept probability is looked for: a sixteenth of a nat.
_BIN = _STEPS_PER_NAT // 16
_LEAST = np.iinfo(np.uint16).max
#: Nats. What is less likely than this is not told apart.
LEAST_LIKELY = _LEAST / _STEPS_PER_NAT


@dataclass(frozen=True)
class Distribution:
    """What the original holds of the next token at one position.

    Args:
        top: (TOP,) int32, the likeliest tokens of the exact logits, the first the likeliest.
        target: Exact log-probability of the text's own next token.
        rest: Probability of all tokens that are not kept.
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
        """From logits (vocabulary,) float32 and the text's next token."""
        held = log_softmax(row)
        best = np.argpartition(row, -TOP)[-TOP:]
        codes = np.minimum(np.rint(held * -_STEPS_PER_NAT), _LEAST).astype(np.uint16)
        bins = codes // _BIN
        mass = np.bincount(bins, weights=np.exp(held, dtype=np.float64))
        # Bins from the likeliest on until no more than REST is left behind them.
        behind = np.append(np.cumsum(mass[:0:-1])[::-1], 0.0)
        last = int(np.argmax(behind <= REST))
        kept = bins <= last
        top = best[np.argsort(-row[best], kind="stable")]
        return cls(top, float(held[target]), float(behind[last]), np.packbits(kept), codes[kept])

    def divergence(self, q: Array) -> float:
        """KL divergence from this, in nats, of log-probabilities `q` (vocabulary,) float32."""
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
    """What the original holds of the next token at some positions of a text.

    Args:
        vocabulary: Number of tokens.
        positions: One distribution each.
    """

    vocabulary: int
    positions: tuple[Distribution, ...]

    @classmethod
    def of_logits(cls, logits: Array, targets: Array) -> "Distributions":
        """From logits (positions, vocabulary) float32 and the text's next tokens (positions,)."""
        made = (Distribution.of_logits(row, int(t)) for row, t in zip(logits, targets, strict=True))
        return cls(logits.shape[1], tuple(made))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Distributions":
        """What `to_bytes` wrote; codes share the memory of `data`."""
        count, vocabulary = np.frombuffer(data, np.int32, 2).tolist()
        return cls(vocabulary, tuple(_read(data, count, vocabulary)))

    def to_bytes(self) -> bytes:
        """Sizes (2,) int32; of all positions top int32, target and rest float64, bits of bits; codes."""
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
        """KL divergence of each position's softmax of `logits` (positions, vocabulary), float64."""
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
    """Log of the softmax along the last axis; float32 in gives float32, with sums in float64."""
    shifted: Array = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(shifted.dtype)
    return shifted
