"""Add an adapter's change to the rows of a weight as they are read, in float32.

The formulas are the same as in peft's `merge` (peft/tuners/lora): W + scale * B @ A; for DoRA, this sum times
m / |W + scale * B @ A| (https://arxiv.org/abs/2402.09353); and stored rows that replace others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.graph.weights import Rows, row_chunks

_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True, eq=False)
class _Changed:
    """The common part of all changes: the rows that a change is applied to."""

    inner: Rows

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> ir.DataType:
        return _FLOAT

    @property
    def sources(self) -> tuple[str, ...]:
        return self.inner.sources

    def _before(self, start: int, stop: int) -> Array:
        return self.inner.rows(start, stop).astype(np.float32)

    def _plus(self, start: int, stop: int, delta: Array, scale: float) -> Array:
        total: Array = self._before(start, stop) + delta * np.float32(scale)
        return total


@dataclass(frozen=True, eq=False)
class LowRankRows(_Changed):
    """The rows of W + scale * B @ A.

    Args:
        a: Rows of A, (rank, inputs).
        b: Rows of B, (outputs, rank).
        transposed: Whether W is (inputs, outputs), as in gpt2's Conv1D and in an embedding.
    """

    a: Rows
    b: Rows
    scale: float
    transposed: bool

    def rows(self, start: int, stop: int) -> Array:
        if self.transposed:
            delta = _all(self.a)[:, start:stop].T @ _all(self.b).T
        else:
            delta = self.b.rows(start, stop).astype(np.float32) @ _all(self.a)
        return self._plus(start, stop, delta, self.scale)


@dataclass(frozen=True, eq=False)
class ExpertLowRankRows(_Changed):
    """The rows of W[e] + scale * B[e] @ A[e] for stacked experts.

    Args:
        a: (experts * rank, inputs); the ranks of an expert are adjacent.
        b: (outputs, rank * experts); the experts of a rank are adjacent.
        transposed: Whether W is (experts, inputs, outputs) instead of (experts, outputs, inputs).
    """

    a: Rows
    b: Rows
    scale: float
    transposed: bool

    def rows(self, start: int, stop: int) -> Array:
        experts = self.inner.shape[0]
        rank = self.a.shape[0] // experts
        a = self.a.rows(start * rank, stop * rank).astype(np.float32)
        a = a.reshape(stop - start, rank, self.a.shape[1])
        b = _all(self.b).reshape(self.b.shape[0], rank, experts)[:, :, start:stop].transpose(2, 0, 1)
        delta = b @ a
        if self.transposed:
            delta = delta.swapaxes(1, 2)
        return self._plus(start, stop, delta, self.scale)


@dataclass(frozen=True, eq=False)
class MagnitudeRows(_Changed):
    """The rows or columns scaled to the norms that DoRA stores.

    Args:
        magnitude: Norms, (outputs,).
        transposed: Whether outputs are along axis 1; their norms take one pass over the whole tensor.
    """

    magnitude: Rows
    transposed: bool

    def rows(self, start: int, stop: int) -> Array:
        values = self._before(start, stop)
        magnitude = _all(self.magnitude).reshape(-1)
        if self.transposed:
            values *= magnitude / self._column_norms
        else:
            values *= (magnitude[start:stop] / np.linalg.norm(values, axis=1))[:, None]
        return values

    @cached_property
    def _column_norms(self) -> Array:
        squares = np.zeros(self.inner.shape[1], np.float64)
        for start, stop in row_chunks(self.inner):
            squares += np.square(self._before(start, stop), dtype=np.float64).sum(axis=0)
        norms: Array = np.sqrt(squares).astype(np.float32)
        return norms


@dataclass(frozen=True, eq=False)
class TokenRows(_Changed):
    """The rows of an embedding, some of them replaced by stored rows.

    Args:
        indices: Indices of the replaced rows.
        stored: Replacements, (len(indices), width), in that order.
    """

    indices: tuple[int, ...]
    stored: Rows

    def rows(self, start: int, stop: int) -> Array:
        values = self._before(start, stop)
        stored = _all(self.stored)
        for position, index in enumerate(self.indices):
            if start <= index < stop:
                values[index - start] = stored[position]
        return values


@dataclass(frozen=True, eq=False)
class SumRows(_Changed):
    """The sum of a bias and scale * `added`, the bias of B's product."""

    added: Rows
    scale: float

    def rows(self, start: int, stop: int) -> Array:
        return self._plus(start, stop, self.added.rows(start, stop).astype(np.float32), self.scale)


def _all(rows: Rows) -> Array:
    return rows.rows(0, rows.shape[0]).astype(np.float32)
