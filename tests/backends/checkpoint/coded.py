"""Random matrices of codes in every scheme, and the folder that a format makes of them."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.backends.checkpoint.formats.base import (
    CodedMatrix,
    Codes,
    Format,
    is_integer,
    scale_shape,
    unsigned_codes,
)
from llmc.checkpoint.declared import Declaration
from llmc.checkpoint.quantized import QuantizedFolder, read_quantized
from llmc.config import EngineScheme, WeightFormat, WeightScheme
from llmc.graph.weights import TensorInfo
from llmc.quantize.blocks import pack

MODULE = "model.layers.0.mlp.up_proj"


def blocks(bits: int = 4, size: int = 32, *, symmetric: bool = True) -> WeightScheme:
    """Integers by group."""
    return WeightScheme.model_validate(
        {"bits": bits, "block_size": size, "symmetric": symmetric, "method": "rtn"}
    )


def typed(kind: str, activations: str = "float", scale_per: str = "output") -> EngineScheme:
    """Codes of a type by output or tensor, or nvfp4."""
    return EngineScheme.model_validate(
        {"format": WeightFormat(kind), "activations": activations, "scale_per": scale_per}
    )


def draw(scheme: WeightScheme | EngineScheme, shape: tuple[int, int], seed: int = 0) -> Codes:
    """Codes with every bit pattern that the scheme has, and scales that float16 and bfloat16 represent."""
    rng = np.random.default_rng(seed)
    groups = (shape[0], shape[1] // scheme.block_size) if scheme.block_size else (shape[0], 1)
    scales = rng.uniform(0.01, 0.03, groups).astype(ml_dtypes.bfloat16).astype(np.float32)
    if isinstance(scheme, WeightScheme):
        codes = rng.integers(0, 1 << scheme.bits, shape).astype(np.uint8)
        zeros = None if scheme.symmetric else rng.integers(0, 1 << scheme.bits, groups).astype(np.uint8)
        return Codes(pack(codes, scheme.bits), scales.astype(np.float16), zeros)
    if scheme.format is WeightFormat.INT8:
        return Codes(rng.integers(-127, 128, shape).astype(np.int8), scales)
    if scheme.format is WeightFormat.FP8:
        scales = scales[:1] if scheme.scale_per == "tensor" else scales
        return Codes(rng.normal(0, 100, shape).astype(ml_dtypes.float8_e4m3fn), scales)
    fine = rng.uniform(0.1, 448, (shape[0], shape[1] // 16)).astype(ml_dtypes.float8_e4m3fn)
    halves = rng.integers(0, 16, shape).astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
    return Codes(halves, fine, whole=np.float32(2.0**-9))


def matrix(
    scheme: WeightScheme | EngineScheme,
    shape: tuple[int, int] = (64, 256),
    module: str = MODULE,
    input_scale: float | None = None,
    scale_type: ir.DataType = ir.DataType.FLOAT16,
) -> CodedMatrix:
    """A matrix of drawn codes."""
    return CodedMatrix(module, shape, scheme, lambda: draw(scheme, shape), input_scale, scale_type)


def values(coded: CodedMatrix) -> Array:
    """The matrix as floats, computed from its codes, float32 (N, K)."""
    codes = coded.read()
    is_packed = codes.codes.dtype == np.uint8
    numbers = unsigned_codes(coded, codes) if is_packed else codes.codes
    numbers = numbers.astype(np.float32)
    spread = coded.shape[1] // scale_shape(coded)[1]
    scales = np.repeat(codes.scales.astype(np.float32), spread, axis=1)
    if codes.whole is not None:
        scales = scales * np.float32(codes.whole)
    if is_packed:
        zero = np.float32(1 << (coded.scheme.bits - 1))
        zeros = zero if codes.zero_points is None else np.repeat(codes.zero_points, spread, axis=1)
        numbers -= zeros
    assert is_integer(coded.scheme) == (numbers == np.rint(numbers)).all() or codes.whole is not None
    product: Array = numbers * scales
    return product


class Tensors:
    """A `WeightStore` over arrays."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays = arrays

    def infos(self) -> Mapping[str, TensorInfo]:
        kinds = {name: ir.DataType.from_numpy(array.dtype) for name, array in self.arrays.items()}
        return MappingProxyType(
            {name: TensorInfo(name, self.arrays[name].shape, kind) for name, kind in kinds.items()}
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        array = self.arrays[name]
        return array if array.ndim == 0 else array[start:stop]


def write(form: Format, *coded: CodedMatrix) -> dict[str, Array]:
    """The tensors of matrices, each as the format has announced it."""
    tensors: dict[str, Array] = {}
    for each in coded:
        assert form.refusal(each.scheme, each.shape) is None
        written = form.encode(each, each.read())
        announced = {spec.name: (spec.dtype, spec.shape) for spec in form.specs(each)}
        assert {n: (ir.DataType.from_numpy(a.dtype), a.shape) for n, a in written.items()} == announced
        tensors |= written
    return tensors


def read_back(form: Format, *coded: CodedMatrix) -> QuantizedFolder:
    """The matrices as llmc's own reader of quantized checkpoints sees them."""
    declared = [Declaration(Path(), "config.json", form.config(coded, ["lm_head"]))]
    declared += [Declaration(Path(), n, f) for n, f in form.side_files(coded, ["lm_head"]).items()]
    return read_quantized(Tensors(write(form, *coded)), declared, Path())
