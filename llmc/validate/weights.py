"""Compare every tensor that an artifact stores with the checkpoint's, as a signal-to-noise ratio.

The ratio is 10 log10(sum w**2 / sum (w - w')**2) in dB; it is infinite where nothing was lost. Errors of
integers are reported in steps as well, the distance between neighbouring codes, which is the scale: rounding
to the nearest code costs at most half a step.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Family, Metric
from llmc.graph.weights import (
    CastRows,
    ConcatRows,
    ExpertRows,
    Rows,
    ScaledRows,
    ShiftedRows,
    StoredRows,
    row_chunks,
)
from llmc.validate.measure import measured, unmeasured
from llmc.validate.reference import Advance, quietly
from llmc.validate.stored import Stored

#: Replaces the energy of a block of zeros.
_TINY = np.float32(1e-30)


@dataclass(frozen=True)
class WeightParity:
    """The result of comparing the weights.

    Args:
        measurements: One for each metric of weights beside the original's.
        digest: sha256 over the artifact's values of the parameters that lost anything, be it only by a
            narrower type; empty if none did, so that the original itself has these weights.
        changed: Names in `expected` of the tensors that lost anything.
        unread: Names of the tensors that are stored in a form that nothing here reads.
    """

    measurements: tuple[Measurement, ...]
    digest: str
    changed: tuple[str, ...]
    unread: tuple[str, ...] = ()


def compare_weights(
    stored: Mapping[str, Stored], expected: Mapping[str, Rows], advance: Advance = quietly
) -> WeightParity:
    """Compare every weight of an artifact with its source.

    Args:
        stored: The weights as the artifact stores them; those of `expected` that it lacks cannot be read.
        expected: The rows that each weight of the lowered graph is computed from, by the name of its
            initializer before quantization.
        advance: Called with the number of tensors done and their total.

    Raises:
        ParityError: The values of a weight cannot be read.
    """
    ratios, blocks, steps, changed = {}, {}, {}, []
    digest = hashlib.sha256()
    for name, tensor in stored.items():
        compared = _compare(expected[name], tensor)
        ratios[name], blocks[name] = compared.ratio, compared.block
        if tensor.steps is not None:
            steps[name] = compared.steps
        if compared.ratio != math.inf or _narrows(expected[name]):
            changed.append(name)
            digest.update(f"{name}\0{compared.digest}\n".encode())
        advance(len(ratios), len(stored))
    where = "numpy, from the files"
    unread = tuple(name for name in expected if name not in stored)
    if not stored:
        why = f"{len(unread)} tensors are stored in another form and were not read"
        status = MeasurementStatus.NOT_MEASURED
        return WeightParity(
            tuple(unmeasured(m, status, why, where) for m in Family.WEIGHTS.metrics), "", (), unread
        )
    measurements = []
    series = (
        (Metric.WEIGHTS_SNR, ratios, min, f"worst of {len(ratios)} tensors"),
        (Metric.WEIGHTS_BLOCK_SNR, blocks, min, f"worst block of {len(ratios)} tensors"),
        (Metric.WEIGHTS_MAX_STEPS, steps, max, f"worst of {len(steps)} tensors of integers"),
    )
    for metric, values, worse, what in series:
        if not values:
            why = "no tensor is stored as integers whose scales are read here"
            measurements.append(unmeasured(metric, MeasurementStatus.NOT_MEASURED, why, where))
            continue
        worst = worse(values, key=lambda n: values[n])
        detail = f"{what}, {worst}"
        if unread:
            detail += (
                f"; {len(unread)} tensors are stored in another form and were not read, first {unread[0]}"
            )
        finite = {n: v for n, v in values.items() if v != math.inf}
        measurements.append(measured(metric, values[worst], detail, where, finite))
    return WeightParity(tuple(measurements), digest.hexdigest() if changed else "", tuple(changed), unread)


def parameters(rows: Rows, array: Array, *, scaled: bool = False) -> Iterator[tuple[str, Array]]:
    """Yield the checkpoint's parameters that a tensor of the artifact is made of, with their values in it.

    A tensor that is computed from a parameter (a norm's 1 + weight) yields none, unless its channels are
    scaled: then the artifact stores other values, which its type rounds.

    Args:
        scaled: Whether channels of the tensor that has `rows` in it are scaled.
    """
    match rows:
        case StoredRows():
            yield rows.info.name, array
        case CastRows():
            yield from parameters(rows.inner, array, scaled=scaled)
        case ShiftedRows() if scaled:
            yield from parameters(rows.inner, array - np.float32(rows.shift), scaled=True)
        case ConcatRows():
            start = 0
            for part in rows.parts:
                yield from parameters(part, array[start : start + part.shape[0]], scaled=scaled)
                start += part.shape[0]
        case ExpertRows():
            yield from parameters(rows.inner, rows.undo(array), scaled=scaled)
        case ScaledRows():
            yield from parameters(rows.inner, rows.undo(array), scaled=True)


def _narrows(rows: Rows) -> bool:
    """Return whether a type on the way to `rows` may lose digits of the checkpoint's."""
    match rows:
        case CastRows():
            exact = rows.dtype is ir.DataType.FLOAT or rows.dtype is rows.inner.dtype
            return not exact or _narrows(rows.inner)
        case ConcatRows():
            return any(_narrows(part) for part in rows.parts)
        case ExpertRows() | ScaledRows():
            return _narrows(rows.inner)
    return False


class StoredParameters(Mapping[str, Array]):
    """The checkpoint's parameters with the artifact's values, each read from the files on demand.

    Args:
        rows: The rows that each tensor of the artifact is computed from, by its name.
        stored: The tensors, by the same names.
    """

    def __init__(self, rows: Mapping[str, Rows], stored: Mapping[str, Stored]) -> None:
        self._rows, self._stored = rows, stored
        self._tensor = {
            parameter: name
            for name in stored
            # Only the names are needed here: one zero represents all values.
            for parameter, _ in parameters(
                rows[name], np.broadcast_to(np.zeros((), np.float32), rows[name].shape)
            )
        }

    def __getitem__(self, name: str) -> Array:
        tensor = self._tensor[name]
        return dict(parameters(self._rows[tensor], self._stored[tensor].whole()))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensor)

    def __len__(self) -> int:
        return len(self._tensor)


@dataclass(frozen=True)
class _Comparison:
    """The ratio of a tensor and of its worst block in dB, largest error in steps, digest of the values."""

    ratio: float
    block: float
    steps: float
    digest: str


def _compare(rows: Rows, stored: Stored) -> _Comparison:
    signal = noise = steps = 0.0
    worst = math.inf
    digest = hashlib.sha256()
    for start, stop in row_chunks(rows):
        expected = np.atleast_1d(rows.rows(start, stop).astype(np.float32))
        actual = stored.read(start, stop)
        digest.update(actual.tobytes())
        squares = [_block_sums(x * x, stored.block) for x in (expected, expected - actual)]
        if not np.isfinite(squares[1]).all():
            return _Comparison(-math.inf, -math.inf, math.inf, digest.hexdigest())
        signal += float(squares[0].sum(dtype=np.float64))
        noise += float(squares[1].sum(dtype=np.float64))
        lost = squares[1] > 0
        if lost.any():
            shares = squares[1][lost] / np.maximum(squares[0][lost], _TINY)
            worst = min(worst, _decibels(1.0, float(shares.max())))
            if stored.steps is not None:
                step = np.maximum(np.abs(stored.steps(start, stop)), _TINY)
                steps = max(steps, float((np.abs(expected - actual) / step).max()))
    return _Comparison(_decibels(signal, noise), worst, steps, digest.hexdigest())


def _block_sums(squares: Array, block: int) -> Array:
    """Return sums over blocks of the last axis; a vector counts as one row."""
    flat = squares.reshape(-1, squares.shape[-1]) if squares.ndim > 1 else squares.reshape(1, -1)
    starts = np.arange(0, flat.shape[1], block)
    return np.add.reduceat(flat, starts, axis=1)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
