"""Scale channels of activations before weights are rounded, by calibration text (AWQ, Lin et al. 2024).

Where the channels of an activation can be divided by factors s at no cost (see fold.py), the weights that
read it are multiplied by them and rounded after that: a loud channel then has finer steps, and the weights of
a block become more similar in size. s = x**a / w**(1 - a), with x the root mean square of the channel and w
the mean magnitude of the weights that read it. Of the candidate exponents a, and of no scaling, the one is
chosen whose searched scales and nearest codes leave the least error in the products: with D the rounding
error and H = sum(x x'), that is the sum of D H D' over outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.arrays import Array
from llmc.calibration.hessian import weigh_features
from llmc.config import WeightScheme
from llmc.graph.match import lazy_of
from llmc.graph.model import Graph
from llmc.graph.weights import CastRows, ConcatRows
from llmc.quantize.blocks import dequantize_blocks
from llmc.quantize.encode import quantize_blocks
from llmc.quantize.fold import Factor, find_shared_inputs

#: Candidate exponents.
EXPONENTS = (0.0, 0.25, 0.5, 0.75)
#: Lower bound of the size of a channel, or of its weights, relative to the median.
_QUIET = 1e-2
#: Number of outputs of a matrix on which exponents are compared.
_OUTPUTS = 256


@dataclass(frozen=True)
class Divided:
    """The outputs start:stop of a tensor of the checkpoint that are divided instead of an activation."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class ChannelPlan:
    """The plan of an activation whose channels can be divided at no cost.

    Args:
        sources: The checkpoint's names of the weights that read it.
        divided: The outputs of matrices that are divided instead, in the channels' order.
    """

    sources: tuple[str, ...]
    divided: tuple[Divided, ...]


def plan_channels(graph: Graph, schemes: Mapping[str, WeightScheme]) -> tuple[ChannelPlan, ...]:
    """Plan the activations of `graph` that only calibrated matrices read, in graph order.

    Args:
        schemes: The checkpoint's tensors that are quantized on calibration text, and their schemes.
    """
    plans = []
    for shared in find_shared_inputs(graph):
        calibrated = all(s in schemes for s in shared.sources)
        if shared.factors and calibrated and all(linear.transposed for linear in shared.linears):
            divided = [d for factor in shared.factors for d in _divided(factor)]
            if all(d.source in schemes for d in divided):
                plans.append(ChannelPlan(shared.sources, tuple(divided)))
    return tuple(plans)


def _divided(factor: Factor) -> list[Divided]:
    """Return the outputs of the checkpoint's matrices that are divided; none if a vector is divided."""
    rows = lazy_of(factor.weight).rows
    while isinstance(rows, CastRows):
        rows = rows.inner
    if rows is None or len(rows.shape) != 2:
        return []
    parts = rows.parts if isinstance(rows, ConcatRows) else (rows,)
    outputs, first = [], 0
    for part in parts:
        last = first + part.shape[0]
        start, stop = max(factor.start, first), min(factor.stop, last)
        if start < stop:
            outputs.append(Divided(", ".join(part.sources), start - first, stop - first))
        first = last
    return outputs


def search_channels(
    weights: Sequence[Array], hessian: Array, schemes: Sequence[WeightScheme], name: str
) -> Array | None:
    """Search factors of the channels that several matrices read, float32 (K,); None if none reduce the error.

    Args:
        weights: The matrices, (N, K) each.
        hessian: sum of x x' over tokens, (K, K).
        schemes: How each matrix is stored.
        name: Name of the matrices in errors.
    """
    sample = [w[:: -(-len(w) // _OUTPUTS)].astype(np.float32) for w in weights]
    loud = _floored(np.sqrt(np.maximum(np.diagonal(hessian), 0)))
    heavy = _floored(sum(np.abs(w).sum(0, dtype=np.float64) for w in weights) / sum(map(len, weights)))
    best: Array | None = None
    least = _lost(sample, hessian, schemes, name)
    for exponent in EXPONENTS:
        factors = loud**exponent / heavy ** (1 - exponent)
        factors = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
        scaled = hessian / np.outer(factors, factors)
        lost = _lost([w * factors for w in sample], scaled, schemes, name)
        if lost < least:
            best, least = factors, lost
    return best


def divide_outputs(scales: Array, start: int, stop: int, factors: Array) -> Array:
    """Return scales (N, blocks) with those of outputs start:stop divided by `factors` (stop - start,)."""
    divided = scales.astype(np.float32)
    divided[start:stop] /= factors[:, None]
    return divided.astype(scales.dtype)


def _floored(values: Array) -> Array:
    """Return sizes of channels in float64, none of them 0."""
    middle = float(np.median(values))
    floored: Array = np.maximum(values.astype(np.float64), _QUIET * middle if middle > 0 else 1.0)
    return floored


def _lost(weights: Sequence[Array], hessian: Array, schemes: Sequence[WeightScheme], name: str) -> float:
    """Return the error of the products with the nearest codes, summed over outputs and tokens."""
    important = weigh_features(np.diagonal(hessian))
    total = 0.0
    for matrix, scheme in zip(weights, schemes, strict=True):
        lost = dequantize_blocks(quantize_blocks(matrix, scheme, np.float32, name, important)) - matrix
        total += float(np.einsum("ij,ij->", lost @ hessian, lost))
    return total
