"""Load the config of a checkpoint, refuse what it alone rules out, and load the model that it describes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.architecture import auto_class, building, generates_text, stated_uses
from llmc.checkpoint.declared import Declaration, find_declarations
from llmc.checkpoint.fields import read_fields
from llmc.checkpoint.generation import require_types
from llmc.checkpoint.gguf_config import load_gguf_config, stop_tokens
from llmc.checkpoint.gguf_header import GgufHeader
from llmc.checkpoint.location import whole_models
from llmc.checkpoint.purpose import refuse_both_directions, refuse_cross_attention, refuse_other_purpose
from llmc.checkpoint.rotary import refuse_contradiction, refuse_unknown_type, refuse_wrong_numbers
from llmc.checkpoint.sizes import refuse_impossible
from llmc.errors import CheckpointError, UnsupportedError, did_you_mean, first_lines

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

CONFIG_FILES = ("config.json", "generation_config.json")
_LISTED = 5  # file names listed in a message


def load_config(path: Path) -> PreTrainedConfig:
    """Load the config of a Hugging Face folder or of a GGUF file, and check that the model can be compiled.

    Raises:
        CheckpointError: There is no config, or it cannot be read.
        UnsupportedError: The architecture is unknown, an encoder or an encoder-decoder.
    """
    config = load_gguf_config(GgufHeader.parse(path)) if path.is_file() else _folder_config(path)
    config.name_or_path = ""  # its location is not a property of the model
    _refuse_other_than_causal(config)
    return config


def load_declarations(path: Path) -> tuple[Declaration, ...]:
    """Return the declarations of weight quantization in a Hugging Face folder; empty for floats and GGUF.

    The declaration in config.json is parsed here, so that an unsupported method is refused before any weights
    are downloaded.

    Raises:
        CheckpointError: config.json is missing, or a declaration is damaged.
        UnsupportedError: The quantization method is not supported.
    """
    if path.is_file():
        return ()
    declared = find_declarations(path, _read_json(path / "config.json"))
    if declared and declared[0].source == "config.json":
        declared[0].parse()
    return declared


def load_generation_config(path: Path, config: PreTrainedConfig) -> GenerationConfig:
    """Read generation_config.json of the folder, or derive the settings from the config where it is missing.

    A GGUF model also stops at its end-of-turn and end-of-message tokens, as in llama.cpp.
    """
    from transformers import GenerationConfig

    if path.is_dir() and (path / "generation_config.json").is_file():
        try:
            read_fields(path / "generation_config.json")
            settings = GenerationConfig.from_pretrained(path)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path / 'generation_config.json'} cannot be read: {first_lines(error)}",
                hint="correct it, or remove it to take the settings of config.json",
            ) from error
        require_types(path / "generation_config.json", settings)
        return settings
    settings = GenerationConfig.from_model_config(config)
    ends = stop_tokens(GgufHeader.parse(path)) if path.is_file() else []
    if len(ends) > 1:
        settings.eos_token_id = ends
    return settings


def load_reference(path: Path, config: PreTrainedConfig, attention: str | None) -> PreTrainedModel:
    """Load the model with transformers: float32, eval mode, CPU.

    Args:
        attention: Implementation of attention; None for the one that transformers chooses.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    model: Any = from_pretrained(path, auto_class(config), config=config, attn_implementation=attention)
    reference: PreTrainedModel = model.eval()
    return reference


def from_pretrained(path: Path, kind: Any, **options: Any) -> Any:
    """Call `kind.from_pretrained` on a folder or GGUF file in float32, without output on the terminal.

    Args:
        kind: An `AutoModelFor…` class.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    import torch
    from transformers import GgufConfig

    if path.is_file():
        options |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    with loading(path), building():
        return kind.from_pretrained(
            path.parent if path.is_file() else path,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Let transformers load `path` without output on the terminal.

    Raises:
        CheckpointError: transformers raised an error; its quantizers raise any type where a package is
            missing.
    """
    try:
        with _quiet():
            yield
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:
        raise CheckpointError(f"transformers cannot load {path}: {first_lines(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and reports off the terminal, where llmc shows its own progress.

    Some of its bars ignore every setting, so standard error is discarded meanwhile.
    """
    from transformers.utils import logging as untyped

    logging: Any = untyped
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _folder_config(folder: Path) -> PreTrainedConfig:
    file = folder / "config.json"
    fields = _read_json(file)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"{file} has no model_type", hint="it must be the config of a transformers model"
        )
    refuse_impossible(str(file), fields)

    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, CONFIG_MAPPING) + "; an architecture newer than the installed"
        raise UnsupportedError(
            f"{file} has model_type {model_type}, which the installed transformers does not have",
            hint=hint + " transformers requires an upgrade, and code shipped with a model is not run",
        )
    refuse_other_purpose(folder, fields)
    refuse_contradiction(str(file), fields)
    refuse_wrong_numbers(str(file), fields)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers' config classes raise any type of error
        raise CheckpointError(
            f"{file} is not a valid config of {model_type}: {first_lines(error)}",
            hint="correct the field that the message names; transformers rejects the config",
        ) from error
    _require_text_config(file, config)
    refuse_cross_attention(config)
    refuse_both_directions(config)
    refuse_unknown_type(config)
    for part in (config, config.get_text_config(decoder=True)):
        _leave_out_settings(part)
    return config


def _require_text_config(file: Path, config: PreTrainedConfig) -> None:
    """Check that the part which transformers uses as config of the language model is a config."""
    from transformers import PreTrainedConfig

    if not isinstance(config.get_text_config(decoder=True), PreTrainedConfig):
        raise CheckpointError(
            f"{file} has a text_config, but a model of type {config.model_type} has no part of that name",
            hint="take the config.json that belongs to the weights",
        )


def _leave_out_settings(config: Any) -> None:
    """Remove the settings that say how a model is run or stored, not what it computes.

    transformers would load the packages and repositories that name implementations; the model it builds here
    holds dequantized weights.
    """
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = None
    config._experts_implementation = None
    config.return_dict = True
    config.output_attentions = config.output_hidden_states = False


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        models = whole_models(file.parent)
        inside = sorted(config_file.parent for config_file in file.parent.glob(f"*/{file.name}"))
        listed = ", ".join(models[1:_LISTED]) + (" …" if len(models) > _LISTED else "")
        raise CheckpointError(
            f"{file.parent} has no config.json" + (f"; its GGUF models: {len(models)}" if models else ""),
            hint=f"give the file: {file.parent / models[0]}" + (f" (or {listed})" if listed else "")
            if models
            else f"give the folder that holds config.json{f': {inside[0]}' if inside else ''}",
        )
    return read_fields(file)


def _refuse_other_than_causal(config: PreTrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.model_type
    hint = "llmc compiles decoder-only language models"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{kind} is an encoder-decoder model", hint=hint)
    if not generates_text(kind):
        uses = stated_uses(kind)
        what = f"; it has {kind} for {', '.join(uses)}" if uses else ", which is a part of other models"
        raise UnsupportedError(f"transformers has no causal language model for {kind}{what}", hint=hint)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", True) is False:
        raise UnsupportedError(f"{kind} with is_decoder = false is an encoder-only model", hint=hint)
