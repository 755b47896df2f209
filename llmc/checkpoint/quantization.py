"""How a Hugging Face folder says that its weights are quantized: `quantization_config` of config.json.

Its fields are those of AutoGPTQ and GPTQModel (`gptq`), AutoAWQ (`awq`), compressed-tensors and DeepSeek's
fp8 models (`fp8`), as https://huggingface.co/docs/transformers/main_classes/quantization lists them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from llmc.errors import CheckpointError, UnsupportedError

_HINT = "compile the original checkpoint in float instead"


class Method(StrEnum):
    """Layouts that are read."""

    GPTQ = "gptq"
    AWQ = "awq"
    COMPRESSED_TENSORS = "compressed-tensors"
    FP8 = "fp8"


@dataclass(frozen=True)
class ModuleFormat:
    """How the weight of some modules is stored.

    Args:
        bits: Of a code.
        group_size: Neighbouring inputs that share a scale; None where all of an output do.
        tile: (outputs, inputs) that share a scale, of fp8; None where one scale spans all inputs.
    """

    bits: int
    group_size: int | None = None
    tile: tuple[int, int] | None = None


@dataclass(frozen=True)
class StoredQuantization:
    """What `quantization_config` says.

    Args:
        zero_offset: What is added to stored zero points: 1 in the first layout of AutoGPTQ.
        targets: compressed-tensors' groups in their order: names, `re:` patterns or classes of modules, and
            their format. Of the other methods one for every module.
    """

    method: Method
    targets: tuple[tuple[tuple[str, ...], ModuleFormat], ...]
    zero_offset: int = 0

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


def parse_quantization(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    """`quantization_config` of the config.json in `folder`.

    Raises:
        UnsupportedError: A method or layout that is not read.
        CheckpointError: A field is missing or has a value that it cannot have.
    """
    name = fields.get("quant_method")
    if name not in tuple(Method):
        raise UnsupportedError(
            f"{folder} is quantized by {name or 'an unnamed method'}; read are {', '.join(Method)}",
            hint=_HINT,
        )
    method = Method(name)
    try:
        match method:
            case Method.GPTQ:
                return _parse_gptq(fields, folder)
            case Method.AWQ:
                return _parse_awq(fields, folder)
            case Method.COMPRESSED_TENSORS:
                return _parse_compressed(fields, folder)
            case Method.FP8:
                size = fields.get("weight_block_size")
                tile = None if size is None else (int(size[0]), int(size[1]))
                return StoredQuantization(method, ((("Linear",), ModuleFormat(8, tile=tile)),))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"quantization_config of {folder} is damaged: {type(error).__name__}: {error}"
        ) from error


def _parse_gptq(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    layout = fields.get("checkpoint_format", "gptq")
    if layout not in {"gptq", "gptq_v2"} or fields.get("is_marlin_format"):
        raise _unknown(folder, "gptq", f"layout {layout if layout != 'gptq' else 'marlin'}")
    bits = _bits(fields["bits"], (2, 3, 4, 8), folder, "gptq")
    form = ModuleFormat(bits, _group(fields["group_size"]))
    return StoredQuantization(Method.GPTQ, ((("Linear",), form),), 1 if layout == "gptq" else 0)


def _parse_awq(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    version = str(fields.get("version", "gemm")).lower()
    if version != "gemm":
        raise _unknown(folder, "awq", f"layout {version}")
    form = ModuleFormat(_bits(fields["bits"], (4,), folder, "awq"), _group(fields["group_size"]))
    return StoredQuantization(Method.AWQ, ((("Linear",), form),))


def _parse_compressed(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    known = {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized"}
    sparsity = (fields.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _unknown(folder, "compressed-tensors", f"sparse format {sparsity}")
    targets = []
    for group in fields["config_groups"].values():
        layout = group.get("format") or fields.get("format")
        if layout not in known:
            raise _unknown(folder, "compressed-tensors", f"format {layout}")
        weights = group["weights"]
        bits = _bits(weights["num_bits"], (2, 3, 4, 5, 6, 7, 8), folder, "compressed-tensors")
        group_size = _group(weights.get("group_size")) if weights["strategy"] == "group" else None
        tile = weights["block_structure"] if weights["strategy"] == "block" else None
        form = ModuleFormat(bits, group_size, None if tile is None else (int(tile[0]), int(tile[1])))
        targets.append((tuple(map(str, group["targets"])), form))
    return StoredQuantization(Method.COMPRESSED_TENSORS, tuple(targets))


def _bits(value: Any, known: tuple[int, ...], folder: Path, method: str) -> int:
    if int(value) not in known:
        raise _unknown(folder, method, f"{value} bits")
    return int(value)


def _group(value: Any) -> int | None:
    if value is None or int(value) == -1:
        return None
    if int(value) < 1:
        raise ValueError(f"group_size {value}")
    return int(value)


def _is_named(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _unknown(folder: Path, method: str, what: str) -> UnsupportedError:
    return UnsupportedError(f"{folder} is quantized by {method} in {what}, which is not read", hint=_HINT)
