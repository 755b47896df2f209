"""Channels of activations scaled before weights are rounded, by calibration text (AWQ, Lin et al. 2024).

Where the channels of an activation can be divided by factors s at no cost (see fold.py), the weights that
read it are multiplied by them and rounded after that: a loud channel has finer steps then, and the weights
of a block come nearer to one size. s = x**a / w**(1 - a), with x the root mean square of the channel and w
the mean magnitude of the weights that read it. Of the exponents a that are tried, and of doing nothing, the
one is taken whose searched scales and nearest codes leave the least error in the products: with D what is
lost and H = sum(x x'), that is the sum of D H D' over outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmc.arrays import Array
from llmc.calibration.hessian import weigh_features
from llmc.config import WeightScheme
from llmc.graph.match import lazy_of
from llmc.graph.model import Graph
from llmc.graph.weights import CastRows, ConcatRows
from llmc.quantize.blocks import PackedBlocks, dequantize_blocks
from llmc.quantize.encode import quantize_blocks
from llmc.quantize.fold import Factor, find_shared_inputs

#: Exponents that are tried.
EXPONENTS = (0.0, 0.25, 0.5, 0.75)
#: A channel, or its weights, counts as no quieter than this part of the one in the middle.
_QUIET = 1e-2
#: Outputs of a matrix that exponents are compared on.
_OUTPUTS = 256


@dataclass(frozen=True)
class Divided:
    """Outputs start:stop of a tensor of the checkpoint, which are divided in the place of an activation."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class ChannelPlan:
    """An activation whose channels can be divided at no cost.

    Args:
        sources: The checkpoint's names of the weights that read it.
        divided: What is divided in its place, as far as it is outputs of matrices, in the channels' order.
    """

    sources: tuple[str, ...]
    divided: tuple[Divided, ...]


def plan_channels(graph: Graph, schemes: Mapping[str, WeightScheme]) -> tuple[ChannelPlan, ...]:
    """Activations of `graph` that only matrices read which calibration quantizes, in graph order.

    Args:
        schemes: The checkpoint's tensors that are quantized on calibration text, and how.
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
    """Outputs of the checkpoint's matrices that are divided; none where it is a vector that is."""
    rows = lazy_of(factor.weight).rows
    while isinstance(rows, CastRows):
        rows = rows.inner
    if rows is None or len(rows.shape) != 2:
        return []
    parts = rows.parts if isinstance(rows, ConcatRows) else (rows,)
    found, first = [], 0
    for part in parts:
        last = first + part.shape[0]
        start, stop = max(factor.start, first), min(factor.stop, last)
        if start < stop:
            found.append(Divided(", ".join(part.sources), start - first, stop - first))
        first = last
    return found


def search_channels(
    weights: Sequence[Array], hessian: Array, schemes: Sequence[WeightScheme], name: str
) -> Array | None:
    """Factors of the channels that several matrices read, float32 (K,); None if none are better.

    Args:
        weights: (N, K) each.
        hessian: sum of x x' over tokens, (K, K).
        schemes: How each matrix is stored.
        name: What errors call the matrices.
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


def divide_outputs(blocks: PackedBlocks, start: int, stop: int, factors: Array) -> PackedBlocks:
    """The same codes for a matrix whose outputs start:stop are divided by `factors` (stop - start,)."""
    scales = blocks.scales.astype(np.float32)
    scales[start:stop] /= factors[:, None]
    return replace(blocks, scales=scales.astype(blocks.scales.dtype))


def _floored(values: Array) -> Array:
    """Sizes of channels in float64, none of them 0."""
    middle = float(np.median(values))
    floored: Array = np.maximum(values.astype(np.float64), _QUIET * middle if middle > 0 else 1.0)
    return floored


def _lost(weights: Sequence[Array], hessian: Array, schemes: Sequence[WeightScheme], name: str) -> float:
    """Error of the products with the nearest codes, summed over outputs and tokens."""
    important = weigh_features(np.diagonal(hessian))
    total = 0.0
    for matrix, scheme in zip(weights, schemes, strict=True):
        lost = dequantize_blocks(quantize_blocks(matrix, scheme, np.float32, name, important)) - matrix
        total += float(np.einsum("ij,ij->", lost @ hessian, lost))
    return total
