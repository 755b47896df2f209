"""Next-token distributions of the original in a form that is small enough to keep for a whole text.

A log-probability is stored as a whole number of steps of 2**-11 nats below zero in 16 bits, so that the
largest, 32 nats, stands for everything less likely than 1e-14. Rounding is off by 2**-12 nats at most, and
what it does to a KL divergence is of second order: half the variance of the rounding, 1e-8 nats.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

#: Likeliest tokens that are named exactly.
TOP = 5
_STEPS_PER_NAT = 2048
#: Nats. What is less likely than this is not told apart.
LEAST_LIKELY = np.iinfo(np.uint16).max / _STEPS_PER_NAT


@dataclass(frozen=True)
class Distributions:
    """What the original holds of the next token at some positions.

    Args:
        top: (positions, TOP) int32, the likeliest tokens of the exact logits, the first the likeliest.
        codes: (positions, vocabulary) uint16, steps of 2**-11 nats below zero.
    """

    top: Array
    codes: Array

    @classmethod
    def of_logits(cls, logits: Array) -> "Distributions":
        """From logits (positions, vocabulary) float32, one position at a time."""
        positions, vocabulary = logits.shape
        top, codes = np.empty((positions, TOP), np.int32), np.empty((positions, vocabulary), np.uint16)
        for at, row in enumerate(logits):
            best = np.argpartition(row, -TOP)[-TOP:]
            top[at] = best[np.argsort(-row[best], kind="stable")]
            steps = np.rint(log_softmax(row) * -_STEPS_PER_NAT)
            codes[at] = np.minimum(steps, np.iinfo(np.uint16).max)
        return cls(top, codes)

    @classmethod
    def from_bytes(cls, data: bytes, positions: int) -> "Distributions":
        """What `to_bytes` wrote; the arrays share the memory of `data`."""
        top = np.frombuffer(data, np.int32, positions * TOP)
        codes = np.frombuffer(data, np.uint16, offset=top.nbytes)
        return cls(top.reshape(positions, TOP), codes.reshape(positions, -1))

    def to_bytes(self) -> bytes:
        """Both arrays, one after the other."""
        return self.top.tobytes() + self.codes.tobytes()

    def log_probabilities(self, at: int) -> Array:
        """Of position `at`, (vocabulary,) float32, normalized again after rounding."""
        return log_softmax(self.codes[at] * np.float32(-1 / _STEPS_PER_NAT))


def log_softmax(logits: Array) -> Array:
    """Log of the softmax along the last axis; float32 in gives float32, with sums in float64."""
    shifted: Array = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(shifted.dtype)
    return shifted
