"""Find the transformers class of a configuration, and the language model inside of a multimodal one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def auto_class(config: Any) -> Any:
    """Return the `AutoModelFor…` class of transformers that builds the model of `config`.

    A multimodal model is built as a whole, as transformers runs it: with text alone, it is a causal language
    model, and the parts for other modalities are not called.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if is_multimodal(config) else AutoModelForCausalLM


def is_multimodal(config: Any) -> bool:
    """Return whether transformers lists the model of `config` as image-text-to-text.

    Some configurations belong both to a multimodal model and to its language model alone: `architectures`
    states which of the two it is.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    multimodal = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if causal is None or multimodal is None:
        return multimodal is not None
    return multimodal != causal and multimodal in (config.architectures or ())


def language_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the part of a model that computes hidden states of tokens.

    It contains the embedding and the decoder layers. Beside it are the head and, in a multimodal model, the
    towers and projectors of other modalities.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return model
    decoder: torch.nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    return decoder


def beside_language_model(model: torch.nn.Module, names: list[str]) -> dict[str, list[str]]:
    """Group the `names` that belong to neither the language model nor its head, by the module they are in.

    Args:
        names: Parameters and buffers of `model`.

    Returns:
        The names by the outermost module that contains nothing of the language model, such as
        `model.vision_tower`; empty if the language model is the whole model.
    """
    modules = {id(module): name for name, module in model.named_modules()}
    own = modules[id(language_model(model))].split(".")
    head = model.get_output_embeddings()  # type: ignore[operator]
    if own == [""]:
        return {}
    by_module: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(parts, own, strict=False)) if a != b), len(own))
        if shared < len(own) and not name.startswith(f"{modules.get(id(head))}."):
            by_module.setdefault(".".join(parts[: shared + 1]), []).append(name)
    return by_module
