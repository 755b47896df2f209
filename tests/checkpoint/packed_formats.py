"""Weights in small floats, tables and affine integers, packed after the published description of each format.

Sources: the OCP Microscaling specification (E2M1, E8M0), ModelOpt's unified Hugging Face checkpoints, the
nvfp4 and mxfp4 formats of compressed-tensors, bitsandbytes' `QuantState.as_dict`, mlx's `quantize`.
Each function takes a shape (N, K) and gives the tensors of a module by their last name, and float32 values.
"""

import json
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from llmc.arrays import Array
from tests.checkpoint.quantized_folders import pack_stream

Packed = tuple[Mapping[str, Array], Array]
Shape = tuple[int, int]


def e2m1(codes: Array) -> Array:
    """Sign, two bits of exponent with bias 1, one of mantissa."""
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    magnitude = np.where(exponent == 0, mantissa / 2, 2.0 ** (exponent - 1.0) * (1 + mantissa / 2))
    values: Array = np.where(codes & 8, -magnitude, magnitude).astype(np.float32)
    return values


def pairs(codes: Array) -> Array:
    """Two codes in a byte, the first in the low half."""
    packed: Array = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    return packed


def draw_fp4(shape: tuple[int, ...], block: int) -> tuple[Array, Array]:
    """Random codes (…, K), and powers of two (…, K / block) that make weights of about 0.1, as E8M0."""
    rng = np.random.default_rng(sum(shape))
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    exponents = rng.integers(120, 124, (*shape[:-1], shape[-1] // block)).astype(np.uint8)
    return codes, exponents


def pack_nvfp4(shape: Shape, *, divides: bool) -> Packed:
    """ModelOpt's tensors, or those of compressed-tensors, whose global scale divides."""
    codes, _ = draw_fp4(shape, 16)
    rng = np.random.default_rng(shape[0])
    scales = rng.uniform(8, 400, (shape[0], shape[1] // 16)).astype(ml_dtypes.float8_e4m3fn)
    factor = np.float32(2.0**-13 * 1.25)
    values = e2m1(codes) * np.repeat(scales.astype(np.float32) * factor, 16, 1)
    if divides:
        inverse = np.array([np.float32(1) / factor], np.float32)
        return {"weight_packed": pairs(codes), "weight_scale": scales, "weight_global_scale": inverse}, values
    return {"weight": pairs(codes), "weight_scale": scales, "weight_scale_2": np.array(factor)}, values


def pack_mxfp4(shape: Shape, part: str = "weight_packed") -> Packed:
    codes, exponents = draw_fp4(shape, 32)
    values = e2m1(codes) * np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, 1)
    return {part: pairs(codes), "weight_scale": exponents}, values.astype(np.float32)


def pack_mxfp8(shape: Shape) -> Packed:
    rng = np.random.default_rng(shape[0])
    codes = rng.normal(0, 30, shape).astype(ml_dtypes.float8_e4m3fn)
    exponents = rng.integers(117, 120, (shape[0], shape[1] // 32)).astype(np.uint8)
    scales = np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, 1)
    return {"weight": codes, "weight_scale": exponents}, codes.astype(np.float32) * scales.astype(np.float32)


def pack_int8_by_output(shape: Shape, part: str = "weight_scale") -> Packed:
    """ModelOpt's `weight_scale` (N,), or `SCB` of bitsandbytes, 127 times as large."""
    rng = np.random.default_rng(shape[0])
    codes = rng.integers(-127, 128, shape).astype(np.int8)
    scales = rng.uniform(0.001, 0.002, shape[0]).astype(np.float32)
    if part == "SCB":
        largest = scales * np.float32(127)
        values = codes * (largest / np.float32(127))[:, None]
        return {"weight": codes, "SCB": largest, "weight_format": np.array(0, np.uint8)}, values
    return {"weight": codes, part: scales}, codes * scales[:, None]


def pack_modelopt_int4(shape: Shape, *, scaled: bool) -> Packed:
    """Two outputs in a byte, the even one in the low half; with the factors of AWQ on the inputs."""
    rng = np.random.default_rng(shape[0])
    codes = rng.integers(-8, 8, shape)
    scales = rng.uniform(0.01, 0.03, (shape[0], shape[1] // 32)).astype(np.float32)
    values = codes.astype(np.float32) * np.repeat(scales, 32, 1)
    packed = ((codes[0::2] & 15) | (codes[1::2] & 15) << 4).astype(np.uint8)
    tensors = {"weight": packed, "weight_scale": scales}
    if scaled:
        tensors["pre_quant_scale"] = rng.uniform(0.5, 2, shape[1]).astype(np.float32)
        values = values * tensors["pre_quant_scale"]
    return tensors, values


def pack_bitsandbytes(shape: Shape, *, nested: bool, block: int = 64, storage: str = "u1") -> Packed:
    """Codes of a table of 16 values, the first in the high half, by block of the matrix as one row."""
    rng = np.random.default_rng(shape[0])
    count = shape[0] * shape[1]
    table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    codes = rng.integers(0, 16, count).astype(np.uint8)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": list(shape)}
    absmax = rng.uniform(0.1, 0.3, -(-count // block)).astype(np.float32)
    tensors = {"weight.absmax": absmax}
    if nested:
        levels = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        stored = rng.integers(0, 256, len(absmax)).astype(np.uint8)
        outer = rng.uniform(0.05, 0.1, -(-len(absmax) // 16)).astype(np.float32)
        absmax = levels[stored] * outer[np.arange(len(stored)) // 16] + np.float32(0.25)
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.25}
        tensors = {"weight.absmax": stored, "weight.nested_absmax": outer, "weight.nested_quant_map": levels}
    packed = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)
    tensors |= {
        "weight": packed.view(storage).reshape(-1, 1),
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    values = table[codes] * absmax[np.arange(count) // block]
    return tensors, values.reshape(shape)


def pack_mlx(shape: Shape, bits: int, group: int = 32) -> Packed:
    rng = np.random.default_rng(shape[0] + bits)
    codes = rng.integers(0, 1 << bits, shape)
    grid = (shape[0], shape[1] // group)
    scales = (rng.uniform(0.2, 0.4, grid) / (1 << bits)).astype(np.float16)
    biases = rng.uniform(-0.2, -0.1, grid).astype(np.float16)
    wide = [np.repeat(a.astype(np.float32), group, 1) for a in (scales, biases)]
    values = codes.astype(np.float32) * wide[0] + wide[1]
    return {"weight": pack_stream(codes, bits).view(np.uint32), "scales": scales, "biases": biases}, values
