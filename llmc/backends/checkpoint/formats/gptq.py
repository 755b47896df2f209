"""Encode matrices in the format of AutoGPTQ and GPTQModel.

`qweight` int32 (K * bits / 32, N) is packed along the inputs, low bits first; `qzeros` int32 (groups,
N * bits / 32) along the outputs; `scales` (groups, N); `g_idx` int32 (K,) is the group of each input.

Symmetric codes have `checkpoint_format: gptq`, in which zero points are stored less one: all servers read it.
Codes with zero points have `gptq_v2`, which stores them unchanged: GPTQModel adds one to all zero points of a
word of the other layout at once, so that a zero point of 0, stored as 2**bits - 1, would change the next one.
Source: GPTQModel's `utils/model.py` (convert_gptq_v1_to_v2_format); vLLM 0.32, `auto_gptq.py`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
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
    code_words,
    describe_scheme,
    dominant,
    group_of,
    indivisible,
    is_integer,
    open_name,
    pack_words,
    scale_shape,
    stored_scales,
)
from llmc.config import CheckpointFormat, EngineScheme, WeightScheme

#: Products that servers fuse, by the name of the product that they make of them.
_FUSED = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("qkv_proj", ("query", "key", "value")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("gate_up_proj", ("c_fc_0", "c_fc_1")),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
)
#: Stands for the fields of a module that stays in float.
_FLOAT: dict[str, Any] = {"bits": None}


@dataclass(frozen=True)
class GptqLayout:
    """The format of AutoGPTQ and GPTQModel."""

    def refusal(self, scheme: WeightScheme | EngineScheme, shape: tuple[int, int]) -> str | None:
        """See `Format`."""
        if not is_integer(scheme) or (isinstance(scheme, EngineScheme) and scheme.activations != "float"):
            return f"this format has integers of 4 or 8 bits alone, not {describe_scheme(scheme)}"
        per_word = 32 // scheme.bits
        if shape[0] % per_word or shape[1] % per_word:
            return f"words of {per_word} codes do not divide {shape[0]} outputs and {shape[1]} inputs"
        return indivisible(scheme, shape)

    def mixed_refusal(self, schemes: Iterable[WeightScheme | EngineScheme]) -> str | None:
        """See `Format`."""
        if len({scheme.symmetric for scheme in schemes}) > 1:
            return "this format has zero points for all matrices or for none"
        return None

    def specs(self, matrix: CodedMatrix) -> tuple[FolderTensor, ...]:
        """See `Format`."""
        module, (outputs, inputs) = matrix.module, matrix.shape
        per_word, groups = 32 // matrix.scheme.bits, scale_shape(matrix)[1]
        return (
            FolderTensor(f"{module}.g_idx", ir.DataType.INT32, (inputs,)),
            FolderTensor(f"{module}.qweight", ir.DataType.INT32, (inputs // per_word, outputs)),
            FolderTensor(f"{module}.qzeros", ir.DataType.INT32, (groups, outputs // per_word)),
            FolderTensor(f"{module}.scales", matrix.scale_type, (groups, outputs)),
        )

    def encode(self, matrix: CodedMatrix, codes: Codes) -> dict[str, Array]:
        """See `Format`."""
        codes = checked(matrix, codes)
        module, bits, groups = matrix.module, matrix.scheme.bits, scale_shape(matrix)
        offset = 1 if matrix.scheme.symmetric else 0
        zeros = codes.zero_points
        if zeros is None:
            zeros = np.full(groups, 1 << (bits - 1), np.uint8)
        words = code_words(matrix, codes)
        inputs = np.arange(matrix.shape[1], dtype=np.int32)
        return {
            f"{module}.g_idx": inputs // np.int32(matrix.shape[1] // groups[1]),
            f"{module}.qweight": np.ascontiguousarray(words.T),
            f"{module}.qzeros": pack_words(np.ascontiguousarray(zeros.T) - np.uint8(offset), bits),
            f"{module}.scales": np.ascontiguousarray(stored_scales(matrix, codes.scales).T),
        }

    def cache_tensors(self, attention: str, keys: float, values: float) -> dict[str, Array]:
        """Return nothing: readers of this format take no scales of a KV cache."""
        return {}

    def config(self, matrices: Sequence[CodedMatrix], ignored: Sequence[str]) -> dict[str, Any]:
        """See `Format`."""
        first = dominant(matrices)
        symmetric, name = first.symmetric, CheckpointFormat.GPTQ.value
        names = {name: _fields(matrix.scheme) for matrix in matrices for name in matrix.names}
        kept = {module: _FLOAT for module in ignored if module != "lm_head"}
        other = {
            f"{'-' if fields is _FLOAT else '+'}:{pattern}": {} if fields is _FLOAT else fields
            for pattern, fields in _patterns({**names, **kept}).items()
            if fields != _fields(first)
        }
        return {
            **_fields(first),
            "checkpoint_format": name if symmetric else f"{name}_v2",
            "desc_act": False,
            "dynamic": other,
            "lm_head": "lm_head" in names,
            "quant_method": name,
            "static_groups": False,
            "sym": symmetric,
            "true_sequential": True,
        }

    def side_files(self, matrices: Sequence[CodedMatrix], ignored: Sequence[str]) -> dict[str, Any]:
        """See `Format`."""
        return {}


def _fields(scheme: WeightScheme | EngineScheme) -> dict[str, Any]:
    group = group_of(scheme)
    return {"bits": scheme.bits, "group_size": -1 if group is None else group}


def _patterns(names: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a pattern for the name of each module; modules that servers fuse have one pattern for all.

    vLLM matches the name of the fused product alone. What is before the list of layers is left open, unless
    the pattern would match a module with other fields.
    """
    ends: dict[str, set[str]] = {}
    for name, fields in names.items():
        words = name.split(".")
        for first in range(len(words)):
            ends.setdefault(".".join(words[first:]), set()).add(repr(fields))
    patterns = {}
    for name, fields in names.items():
        parent, _, last = name.rpartition(".")
        alternatives = [last]
        for fused, parts in _FUSED:
            if last in parts and all(names.get(f"{parent}.{part}") == fields for part in parts):
                alternatives = [*parts, fused]
        ending = alternatives[0] if len(alternatives) == 1 else f"({'|'.join(alternatives)})"
        start, tail = "", name
        if (opened := open_name(name)) is not None and all(
            ends.get(f"{opened.rpartition('.')[0]}.{each}", set()) <= {repr(fields)} for each in alternatives
        ):
            start, tail = r"(.*\.)?", opened
        parent = tail.rpartition(".")[0]
        patterns[f"{start}{re.escape(parent)}\\.{ending}$" if parent else f"{re.escape(last)}$"] = fields
    return patterns
