"""Describe how the weights of a Hugging Face folder are quantized, whichever library and file declare it.

`recipes.py` reads the fields of each method, `declared.py` finds them in config.json and beside it.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from llmc.errors import CheckpointError


class QuantMethod(StrEnum):
    """The quantization libraries whose layouts are supported."""

    GPTQ = "gptq"
    AWQ = "awq"
    AUTO_ROUND = "auto-round"
    COMPRESSED_TENSORS = "compressed-tensors"
    FP8 = "fp8"
    FBGEMM_FP8 = "fbgemm_fp8"
    MXFP4 = "mxfp4"
    MXFP8 = "mxfp8"
    MODELOPT = "modelopt"
    BITSANDBYTES = "bitsandbytes"
    MLX = "mlx"


class Layout(StrEnum):
    """The layout of the tensors that hold a module's weight, identified by their names, types and shapes."""

    GPTQ = "gptq"
    AWQ = "awq"
    PACKED_INTEGERS = "packed integers"
    INT8 = "int8"
    INT4_BY_OUTPUT = "int4 packed along the outputs"
    AFFINE = "integers with scales and biases"
    FP8 = "fp8"
    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"
    MXFP4_EXPERTS = "mxfp4 by expert"
    BNB_4BIT = "bitsandbytes' 4 bits"
    BNB_INT8 = "bitsandbytes' int8"


@dataclass(frozen=True)
class ModuleFormat:
    """The storage format of the weights of some modules.

    Args:
        bits: Bits per code.
        group_size: Number of adjacent inputs that share a scale; None if all inputs of an output share one.
        tile: (outputs, inputs) that share a scale, for fp8; None if one scale spans all inputs.
    """

    bits: int
    group_size: int | None = None
    tile: tuple[int, int] | None = None


@dataclass(frozen=True)
class StoredQuantization:
    """The quantization that a checkpoint declares.

    Args:
        targets: Names, `re:` patterns or classes of modules and their format; the first match counts.
        layouts: Layouts that its modules may have.
        zero_offset: Number to add to stored zero points: 1 in the first layout of AutoGPTQ, 0 in the second.
            None if the declaration does not say, which means 1.
        symmetric: Whether every zero point is declared to be 2**(bits - 1).
        source: File that contains the declaration.
    """

    method: QuantMethod
    targets: tuple[tuple[tuple[str, ...], ModuleFormat], ...]
    layouts: frozenset[Layout]
    zero_offset: int | None = None
    symmetric: bool = False
    source: str = "config.json"

    def format_of(self, module: str) -> ModuleFormat:
        """Return the format of the module called `module` in the files.

        Raises:
            CheckpointError: No group includes the module.
        """
        for names, form in self.targets:
            if any(_is_named(name, module) for name in names):
                return form
        for names, form in self.targets:  # the class of a module is less specific than its name
            if "Linear" in names:
                return form
        raise CheckpointError(f"{module} is quantized, but no group of quantization_config includes it")


def _is_named(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module
