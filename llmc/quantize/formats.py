"""Compute codes and scales of the types in which products are computed; all of them are symmetric.

    w = code * scale          int8, -127 to 127, and fp8 E4M3 by output feature; int4, -8 to 7, by block
    w = code * scale * whole  NVFP4: codes E2M1, a scale in fp8 E4M3 by block of 16, one for the whole tensor

Scales are positive. Scales of blocks are searched for least squared error among multiples of the scale that
just spans the block. Sources: ONNX DequantizeLinear, opset 23; E2M1 and E4M3 of the OCP Microscaling and
8-bit Floating Point specifications; NVFP4 as in NVIDIA's TensorRT documentation, "Working with Quantized
Types".
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.config import WeightFormat

#: The largest code of each format.
HIGHEST = {WeightFormat.INT8: 127.0, WeightFormat.INT4: 7.0, WeightFormat.FP8: 448.0, WeightFormat.NVFP4: 6.0}
#: The smallest code, where it is not the negative of the largest.
_LOWEST = {WeightFormat.INT4: -8.0}
TYPES = {
    WeightFormat.INT8: ir.DataType.INT8,
    WeightFormat.INT4: ir.DataType.INT4,
    WeightFormat.FP8: ir.DataType.FLOAT8E4M3FN,
    WeightFormat.NVFP4: ir.DataType.FLOAT4E2M1,
}
#: Number of elements that share a scale in NVFP4.
NVFP4_BLOCK = 16
#: Candidate scales, relative to the scale that spans a block or an output; the best one is then refined.
_PARTS = {
    WeightFormat.INT8: (1.0,),
    WeightFormat.INT4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75),
    WeightFormat.FP8: (1.0,),
    # Codes of E2M1 lie 1 apart below 4 and 2 apart above: a block may do better to end at 4.
    WeightFormat.NVFP4: (1.0, 1.5, 0.9, 1.25),
}


def whole_scale(peak: float, scale_type: ir.DataType) -> Array:
    """Return NVFP4's scale for a whole tensor whose largest magnitude is `peak`, as it is stored; a scalar.

    The scale of the block with the peak is then the largest that fp8 can represent.
    """
    return _stored(np.float32(peak / (HIGHEST[WeightFormat.NVFP4] * HIGHEST[WeightFormat.FP8])), scale_type)


def served_whole_scale(peak: float) -> Array:
    """Return NVFP4's scale for a whole tensor as servers need it, float32, a scalar: a power of two.

    It is at most twice `whole_scale`. Some servers store its inverse, some keep weights in bfloat16: with a
    power of two, every one of them has the same weights, since a code times a scale in fp8 has 6 bits.
    """
    exact = peak / (HIGHEST[WeightFormat.NVFP4] * HIGHEST[WeightFormat.FP8])
    return np.asarray(2.0 ** np.ceil(np.log2(exact)) if exact > 0 else 1.0, np.float32)


def tensor_scale(peak: float, kind: WeightFormat) -> Array:
    """Return the scale for all weights of a tensor whose largest magnitude is `peak`, float32, a scalar.

    It has 8 significant bits, so that servers that convert it to bfloat16 or float16 have the same weights.
    """
    mantissa, exponent = np.frexp(peak / HIGHEST[kind])
    short = np.ldexp(np.ceil(mantissa * 256) / 256, exponent)
    return np.asarray(short if peak > 0 else 1.0, np.float32)


def encode_whole(weights: Array, kind: WeightFormat, scale: Array) -> Array:
    """Return the codes (outputs, inputs) of a matrix, float32, for one scale of all its weights."""
    low, high = np.float32(_LOWEST.get(kind, -HIGHEST[kind])), np.float32(HIGHEST[kind])
    codes = _round(weights[None], scale.astype(np.float32).reshape(1, 1), low, high, kind)
    stored: Array = codes[0].astype(TYPES[kind].numpy())
    return stored


def encode(
    weights: Array, kind: WeightFormat, block: int, scale_type: ir.DataType, whole: Array | None = None
) -> tuple[Array, Array]:
    """Return codes and positive scales of a matrix, with the least squared error of the candidate scales.

    Args:
        weights: (outputs, inputs) float32; inputs are a multiple of `block`.
        scale_type: Type of the scales; NVFP4 scales are fp8.
        whole: NVFP4's scale for the whole tensor.

    Returns:
        Codes (outputs, inputs) in their own type and scales (outputs, inputs / block).
    """
    outputs, inputs = weights.shape
    blocks = weights.reshape(outputs, inputs // block, block)
    unit = np.float32(1) if whole is None else np.float32(whole)
    stored_as = scale_type if whole is None else ir.DataType.FLOAT8E4M3FN
    low, high = np.float32(_LOWEST.get(kind, -HIGHEST[kind])), np.float32(HIGHEST[kind])
    span = np.maximum(blocks.max(axis=2) / high, blocks.min(axis=2) / low) / unit
    best, least = _stored(span, stored_as), np.full(span.shape, np.inf, np.float32)
    if len(_PARTS[kind]) > 1 or kind is WeightFormat.INT8:
        for part in _PARTS[kind]:
            scale = _stored(span * np.float32(part), stored_as)
            codes = _round(blocks, _real(scale, unit), low, high, kind)
            # The scale of least squared error for these codes, rounded as it is stored.
            gain = (blocks * codes).sum(axis=2) / np.maximum((codes * codes).sum(axis=2), np.float32(1e-9))
            scale = np.where(gain > 0, _stored(gain / unit, stored_as), scale)
            codes = _round(blocks, _real(scale, unit), low, high, kind)
            error = np.square(blocks - codes * _real(scale, unit)[..., None]).sum(axis=2)
            better = error < least
            np.copyto(best, scale, where=better)
            np.copyto(least, error, where=better)
    codes = _round(blocks, _real(best, unit), low, high, kind)
    return codes.reshape(outputs, inputs).astype(TYPES[kind].numpy()), best


def _stored(scale: Array | np.float32, scale_type: ir.DataType) -> Array:
    """Return scales as they are stored; 1 for a block of zeros, whose codes are 0 whatever the scale."""
    if scale_type is ir.DataType.FLOAT8E4M3FN:  # the type has no infinity: beyond its largest number is NaN
        scale = np.minimum(scale, np.float32(HIGHEST[WeightFormat.FP8]))
    with np.errstate(over="ignore"):
        stored: Array = np.asarray(scale).astype(scale_type.numpy())
    nonzero: Array = np.where(stored == 0, stored.dtype.type(1), stored)
    return nonzero


def _real(scale: Array, unit: np.float32) -> Array:
    real: Array = scale.astype(np.float32) * unit
    return real


def _round(blocks: Array, scale: Array, low: np.float32, high: np.float32, kind: WeightFormat) -> Array:
    """Return codes as float32."""
    codes: Array = blocks / scale[..., None]
    np.clip(codes, low, high, out=codes)
    if kind is WeightFormat.FP8:
        codes = codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    elif kind is WeightFormat.NVFP4:
        codes = codes.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    else:
        np.rint(codes, out=codes)
    return codes


@dataclass(frozen=True)
class ActivationScale:
    """The quantization of an activation: one scale, which NVFP4 divides by block.

    Args:
        kind: int8, fp8 or nvfp4.
        peak: Largest magnitude on the calibration text.
    """

    kind: WeightFormat
    peak: float

    def stored(self, scale_type: ir.DataType) -> Array:
        """Return the scale, a scalar of `scale_type`."""
        if self.kind is WeightFormat.NVFP4:
            return whole_scale(self.peak, scale_type)
        return _stored(np.float32(self.peak / HIGHEST[self.kind]), scale_type)
