"""How a Hugging Face folder has its weights quantized, whoever wrote it down and wherever.

`recipes.py` reads the fields of each method, `declared.py` finds them in config.json and beside it.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from llmc.errors import CheckpointError


class Method(StrEnum):
    """Libraries whose layouts are read."""

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
    """How the tensors of one module hold its weight, as their names, types and shapes tell it."""

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
    """How the weight of some modules is stored.

    Args:
        bits: Bits of a code.
        group_size: Neighbouring inputs that share a scale; None where all inputs of an output do.
        tile: (outputs, inputs) that share a scale, of fp8; None where one scale spans all inputs.
    """

    bits: int
    group_size: int | None = None
    tile: tuple[int, int] | None = None


@dataclass(frozen=True)
class StoredQuantization:
    """What a checkpoint says about its own quantization.

    Args:
        targets: Names, `re:` patterns or classes of modules and their format; the first that fits counts.
        layouts: Layouts that modules may have.
        zero_offset: What is added to stored zero points: 1 in the first layout of AutoGPTQ, 0 in the second.
            None if the declaration does not say, which means 1.
        symmetric: Whether every zero point is said to be 2**(bits - 1).
        source: File that says it.
    """

    method: Method
    targets: tuple[tuple[tuple[str, ...], ModuleFormat], ...]
    layouts: frozenset[Layout]
    zero_offset: int | None = None
    symmetric: bool = False
    source: str = "config.json"

    def format_of(self, module: str) -> ModuleFormat:
        """The format of the module called `module` in the files.

        Raises:
            CheckpointError: No group has it.
        """
        for names, found in self.targets:
            if any(_is_named(name, module) for name in names):
                return found
        for names, found in self.targets:  # the class of a module is less precise than its name
            if "Linear" in names:
                return found
        raise CheckpointError(f"{module} is quantized, and no group of quantization_config has it")


def _is_named(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module
