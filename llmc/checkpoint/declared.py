"""Where a Hugging Face folder says that it is quantized: keys of config.json, and files beside it.

config.json comes first. The side files are those of older releases (AutoGPTQ's quantize_config.json,
AutoAWQ's quant_config.json) and of ModelOpt (hf_quant_config.json), which long wrote no key into config.json.
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

#: Side files, and the method of those that name none.
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
        """What the fields say.

        Raises:
            UnsupportedError: A method or layout that is not read.
            CheckpointError: A field is missing or has a value that it cannot have.
        """
        return parse_quantization(self.fields, self.folder, self.source)


def find_declarations(folder: Path, config: Mapping[str, Any]) -> tuple[Declaration, ...]:
    """Everything in `folder` that says that its weights are quantized, config.json's word first.

    Args:
        config: The fields of config.json.

    Raises:
        CheckpointError: A file or field is not of the form that it must have.
    """
    found = []
    own = _of_config(config, folder)
    if own:
        found.append(Declaration(folder, "config.json", own))
    for name, method in SIDE_FILES.items():
        fields = _side_file(folder / name, method)
        if fields:
            found.append(Declaration(folder, name, fields))
    return tuple(found)


def _of_config(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The fields under the first key of config.json that has any; an empty or null one means floats."""
    parts = [config, *(config[key] for key in _NESTED if isinstance(config.get(key), dict))]
    for part in parts:
        for key in ("quantization_config", "compression_config", "quantization"):
            fields = part.get(key)
            if not fields:
                continue
            if not isinstance(fields, dict):
                raise CheckpointError(f"{key} of {folder} is no JSON object")
            return _of_key(key, fields)
    return {}


def _of_key(key: str, fields: dict[str, Any]) -> Mapping[str, Any]:
    if key == "compression_config":  # compressed-tensors before 0.6
        inner = fields.get("quantization_config") or {}
        sparsity = {"sparsity_config": fields.get("sparsity_config")}
        return {"quant_method": "compressed-tensors", **sparsity, **fields, **inner}
    return _named(fields)


def _named(fields: dict[str, Any]) -> Mapping[str, Any]:
    """The fields with their method, where only its other fields tell it."""
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
    """The fields of a side file; nothing if it is missing or says that nothing is quantized."""
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
