"""Encode matrices of 4-bit integers in the gemm layout of AutoAWQ.

`qweight` int32 (K, N / 8) and `qzeros` int32 (groups, N / 8) are packed along the outputs: the i-th 4 bits of
a word, from the low end, are output (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight; `scales` (groups, N). Zero
points are always stored, since servers do not read a folder without them; symmetric codes have 8.
Source: AutoAWQ's `modules/linear/gemm.py`; vLLM 0.32, `auto_awq.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.backends.checkpoint.formats.base import (
    CodedMatrix,
    Codes,
    FolderTensor,
    checked,
    describe_scheme,
    dominant,
    group_of,
    indivisible,
    is_integer,
    pack_words,
    scale_shape,
    stored_scales,
    unsigned_codes,
)
from llmc.config import CheckpointFormat, EngineScheme, WeightScheme

#: Output of its eight that each 4 bits of a word hold, from the low end.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AwqLayout:
    """The gemm layout of AutoAWQ."""

    def refusal(self, scheme: WeightScheme | EngineScheme, shape: tuple[int, int]) -> str | None:
        """See `Format`."""
        is_float = isinstance(scheme, WeightScheme) or scheme.activations == "float"
        if not is_integer(scheme) or scheme.bits != 4 or not is_float:
            return f"this format has integers of 4 bits alone, not {describe_scheme(scheme)}"
        if shape[0] % 8:
            return f"words of 8 codes do not divide {shape[0]} outputs"
        return indivisible(scheme, shape)

    def mixed_refusal(self, schemes: Iterable[WeightScheme | EngineScheme]) -> str | None:
        """See `Format`."""
        sizes = sorted({group_of(scheme) or 0 for scheme in schemes})
        if len(sizes) > 1:
            return f"this format has one size of groups for all matrices, not {' and '.join(map(str, sizes))}"
        return None

    def specs(self, matrix: CodedMatrix) -> tuple[FolderTensor, ...]:
        """See `Format`."""
        module, (outputs, inputs), groups = matrix.module, matrix.shape, scale_shape(matrix)[1]
        return (
            FolderTensor(f"{module}.qweight", ir.DataType.INT32, (inputs, outputs // 8)),
            FolderTensor(f"{module}.qzeros", ir.DataType.INT32, (groups, outputs // 8)),
            FolderTensor(f"{module}.scales", matrix.scale_type, (groups, outputs)),
        )

    def encode(self, matrix: CodedMatrix, codes: Codes) -> dict[str, Array]:
        """See `Format`."""
        codes = checked(matrix, codes)
        module = matrix.module
        zeros = codes.zero_points
        if zeros is None:
            zeros = np.full(scale_shape(matrix), 8, np.uint8)
        return {
            f"{module}.qweight": _pack(unsigned_codes(matrix, codes)),
            f"{module}.qzeros": _pack(zeros),
            f"{module}.scales": np.ascontiguousarray(stored_scales(matrix, codes.scales).T),
        }

    def cache_tensors(self, attention: str, keys: float, values: float) -> dict[str, Array]:
        """Return nothing: readers of this format take no scales of a KV cache."""
        return {}

    def config(self, matrices: Sequence[CodedMatrix], ignored: Sequence[str]) -> dict[str, Any]:
        """See `Format`."""
        return {
            "bits": 4,
            "group_size": group_of(dominant(matrices)) or -1,
            "lm_head": any(matrix.module == "lm_head" for matrix in matrices),
            "modules_to_not_convert": list(ignored),
            "quant_method": CheckpointFormat.AWQ.value,
            "version": "gemm",
            "zero_point": True,
        }

    def side_files(self, matrices: Sequence[CodedMatrix], ignored: Sequence[str]) -> dict[str, Any]:
        """See `Format`."""
        return {}


def _pack(values: Array) -> Array:
    """Pack 4-bit values by output, uint8 (N, n), into words int32 (n, N / 8)."""
    turned = np.ascontiguousarray(values.T)
    eights = turned.reshape(len(turned), -1, 8)[:, :, _ORDER]
    return pack_words(eights.reshape(turned.shape), 4)
