"""Quantize a matrix that is read a range of rows at a time, on every core."""

import math
from functools import partial

import numpy as np

from llmc.arrays import Array
from llmc.config import WeightScheme
from llmc.graph.weights import CastRows, Rows, TransposedRows
from llmc.quantize.blocks import PackedBlocks, ScaleType, count_blocks, dequantize_blocks
from llmc.quantize.encode import Encoder, quantize_blocks
from llmc.threads import spread

#: Number of elements that one task reads: 4 MiB as float32.
_TASK = 1 << 20


def quantize_rows(
    rows: Rows, scheme: WeightScheme, scale_type: ScaleType, *, name: str, outputs_first: bool = True
) -> PackedBlocks:
    """Quantize a matrix of shape (N, K), or (K, N) if not `outputs_first`, with a few MiB of it in float.

    Raises:
        CheckpointError: A value is not finite, or its scale does not fit `scale_type`.
    """
    while isinstance(rows, CastRows | TransposedRows):
        outputs_first ^= isinstance(rows, TransposedRows)
        rows = rows.inner
    out_features, in_features = rows.shape if outputs_first else rows.shape[::-1]
    encoder = Encoder(name, out_features, in_features, scheme, scale_type)

    def encode_outputs(start: int, stop: int) -> None:
        encoder.encode_rows(start, rows.rows(start, stop))

    def encode_block(block: int) -> None:
        start = block * scheme.block_size
        encoder.encode_inputs(block, rows.rows(start, min(start + scheme.block_size, in_features)))

    if outputs_first:
        step = max(1, _TASK // max(1, in_features))
        starts = range(0, out_features, step)
        spread([partial(encode_outputs, start, min(start + step, out_features)) for start in starts])
    else:
        blocks = range(count_blocks(in_features, scheme.block_size))
        spread([partial(encode_block, block) for block in blocks])
    return encoder.finish()


def quantize_stack(rows: Rows, scheme: WeightScheme, scale_type: ScaleType, *, name: str) -> PackedBlocks:
    """Quantize stacked matrices (experts, N, K) as one (experts * N, K), with one expert per core in float.

    Raises:
        CheckpointError: A value is not finite, or its scale does not fit `scale_type`.
    """
    experts, out_features, in_features = rows.shape
    encoder = Encoder(name, experts * out_features, in_features, scheme, scale_type)

    def encode_expert(index: int) -> None:
        encoder.encode_rows(index * out_features, rows.rows(index, index + 1)[0])

    spread([partial(encode_expert, index) for index in range(experts)])
    return encoder.finish()


def weight_snr(rows: Rows, scheme: WeightScheme, scale_type: ScaleType = np.float32) -> float:
    """Return the signal-to-noise ratio (dB) of a quantized matrix (N, K); infinite if nothing is lost."""
    step = max(1, _TASK // max(1, rows.shape[1]))
    signal = noise = 0.0
    for start in range(0, rows.shape[0], step):
        weights: Array = rows.rows(start, min(start + step, rows.shape[0])).astype(np.float32)
        error = dequantize_blocks(quantize_blocks(weights, scheme, scale_type)) - weights
        signal += float(np.square(weights, dtype=np.float64).sum())
        noise += float(np.square(error, dtype=np.float64).sum())
    return 10 * math.log10(signal / noise) if noise else math.inf
