"""Find where a Hugging Face folder declares quantization: keys of config.json, and files beside it.

config.json comes first. The side files belong to older releases (AutoGPTQ's quantize_config.json,
AutoAWQ's quant_config.json) and to ModelOpt (hf_quant_config.json), which for long wrote no key into
config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.checkpoint.fields import read_fields
from llmc.checkpoint.quantization import StoredQuantization
from llmc.checkpoint.recipes import method_name, parse_quantization
from llmc.errors import CheckpointError

#: Keys of a config that hold the config of its language model.
_NESTED = ("text_config", "llm_config", "language_config")

#: Side files, and the quantization method of files that name none.
SIDE_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": None,
}


@dataclass(frozen=True)
class Declaration:
    """Fields that describe a quantization, and the file of `folder` that holds them."""

    folder: Path
    source: str
    fields: Mapping[str, Any]

    @property
    def method(self) -> str:
        return method_name(self.fields)

    def parse(self) -> StoredQuantization:
        """Parse the fields.

        Raises:
            UnsupportedError: The method or layout is not supported.
            CheckpointError: A field is missing or has an invalid value.
        """
        return parse_quantization(self.fields, self.folder, self.source)


def find_declarations(folder: Path, config: Mapping[str, Any]) -> tuple[Declaration, ...]:
    """Find every declaration in `folder` that its weights are quantized, that of config.json first.

    Args:
        config: The fields of config.json.

    Raises:
        CheckpointError: A file or field does not have the required form.
    """
    declarations = []
    own = _of_config(config, folder)
    if own:
        declarations.append(Declaration(folder, "config.json", own))
    for name, method in SIDE_FILES.items():
        fields = _side_file(folder / name, method)
        if fields:
            declarations.append(Declaration(folder, name, fields))
    return tuple(declarations)


def _of_config(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Return the fields under the first non-empty key of config.json; an empty or null key means floats."""
    parts = [config, *(config[key] for key in _NESTED if isinstance(config.get(key), dict))]
    for part in parts:
        for key in ("quantization_config", "compression_config", "quantization"):
            fields = part.get(key)
            if not fields:
                continue
            if not isinstance(fields, dict):
                raise CheckpointError(f"{key} of {folder} is not a JSON object")
            return _of_key(key, fields)
    return {}


def _of_key(key: str, fields: dict[str, Any]) -> Mapping[str, Any]:
    if key == "compression_config":  # compressed-tensors before 0.6
        inner = fields.get("quantization_config") or {}
        sparsity = {"sparsity_config": fields.get("sparsity_config")}
        return {"quant_method": "compressed-tensors", **sparsity, **fields, **inner}
    return _named(fields)


def _named(fields: dict[str, Any]) -> Mapping[str, Any]:
    """Add the quantization method where only the other fields identify it."""
    if "quant_method" in fields:
        return fields
    if "quant_algo" in fields:
        return {"quant_method": "modelopt", **fields}
    if {"group_size", "bits"} <= fields.keys() and not fields.keys() & {"desc_act", "sym", "zero_point"}:
        return {"quant_method": "mlx", **fields}
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        return {"quant_method": "bitsandbytes", **fields}
    return fields


def _side_file(file: Path, method: str | None) -> Mapping[str, Any]:
    """Read the fields of a side file; empty if it is missing or says that nothing is quantized."""
    if not file.is_file():
        return {}
    fields = read_fields(file)
    if method == "modelopt":
        inner = fields.get("quantization") or fields
        fields = inner if inner.get("quant_algo") else {}
    if not fields:
        return {}
    return (
        fields
        if method is None or {"quant_method", "method"} & fields.keys()
        else {"quant_method": method, **fields}
    )
