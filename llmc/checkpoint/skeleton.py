"""Build the model that transformers would build, without its weights."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Literal

from llmc.architecture import auto_class, building, generates_text
from llmc.checkpoint.states import refuse_own_state
from llmc.errors import UnsupportedError, failing_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the causal language model of `config` on the meta device: names, shapes and ties, no memory.

    Raises:
        UnsupportedError: transformers cannot build the model.
    """
    import torch

    auto = auto_class(config)
    try:
        with torch.device("meta"), building():
            model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    except Exception as error:  # transformers' model code raises any type of error
        raise UnsupportedError(
            f"transformers cannot build a causal language model from this {config.model_type} config: "
            f"it fails{failing_line(error, 'transformers')}: {str(error).partition(chr(10))[0]}",
            hint="take the config.json that belongs to the weights, or correct the field at fault",
        ) from error
    _require_text_alone(model)
    refuse_own_state(model)
    return model


def _require_text_alone(model: PreTrainedModel) -> None:
    if "_forward_unimplemented" in type(model).forward.__name__:
        raise _not_one_model(model)
    parameters = inspect.signature(model.forward).parameters.values()
    plain = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in plain]
    if others := [name for name in needed if name != "input_ids"]:
        raise UnsupportedError(
            f"{type(model).__name__} does not run on text alone: it requires {' and '.join(others)}",
            hint="only multimodal models that insert images between the tokens can be built for text",
        )


def _not_one_model(model: PreTrainedModel) -> UnsupportedError:
    """Explain that a class only holds other models, and which of them generates text."""
    from transformers import PreTrainedModel

    parts = {n: part for n, part in model.named_children() if isinstance(part, PreTrainedModel)}
    writers = [n for n, p in parts.items() if type(p).__name__ in generates_text(p.config.model_type)]
    listed = ", ".join(f"{name}: {type(part).__name__}" for name, part in parts.items())
    part = " or ".join(writers) or "the part that generates text"
    return UnsupportedError(
        f"{type(model).__name__} holds several models ({listed}) and has no forward pass of its own",
        hint=f"load it with transformers, save {part} as a folder of its own, and build that",
    )


def build_hollow(config: PreTrainedConfig, attention: Literal["eager"] | None = "eager") -> PreTrainedModel:
    """Build the model of `config` in evaluation mode, float32: parameters on the meta device, buffers real.

    Args:
        attention: Implementation of attention; None for the one that transformers chooses.

    Raises:
        UnsupportedError: transformers cannot build the model.
    """
    import torch
    from accelerate import init_empty_weights

    auto = auto_class(config)
    try:
        with init_empty_weights(include_buffers=False), building():
            model: PreTrainedModel = auto.from_config(
                config, dtype=torch.float32, attn_implementation=attention
            )
    except (ValueError, KeyError) as error:
        raise UnsupportedError(
            f"transformers cannot run this {config.model_type} model layer by layer: {error}"
        ) from error
    model.requires_grad_(False)
    model.train(False)
    return model
