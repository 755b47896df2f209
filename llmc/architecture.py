"""Find the transformers class of a configuration, and the language model inside of a multimodal one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


#: transformers' tables of other models that generate text than causal language models, and who builds them.
_OTHER_WRITERS = (
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
    ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "AutoModelForMultimodalLM"),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq"),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
)
#: Tables that also list models which generate sound.
_SPEECH = tuple(table for table, _ in _OTHER_WRITERS[2:])


def auto_class(config: Any) -> Any:
    """Return the `AutoModelFor…` class of transformers that builds the model of `config`.

    A multimodal model is built as a whole, as transformers runs it: with text alone, it is a causal language
    model, and the parts for other modalities are not called.
    """
    import transformers

    name = _multimodal_class(config)
    return transformers.AutoModelForCausalLM if name is None else getattr(transformers, name)


def values_by_layer(config: Any, name: str) -> tuple[Any, ...]:
    """Return the different values that the layers of a language model have for a field of its config.

    There is one unless the config states values by layer, and it is None where the config has no such field.
    """
    text = config.get_text_config(decoder=True)
    layers = text.per_layer_config if text.is_heterogeneous else (text,)
    return tuple(dict.fromkeys(getattr(layer, name, None) for layer in layers))


def is_multimodal(config: Any) -> bool:
    """Return whether transformers lists the model of `config` as one that reads more than text.

    Some configurations belong both to a multimodal model and to its language model alone: `architectures`
    states which of the two it is.
    """
    return _multimodal_class(config) is not None


def generates_text(model_type: str) -> frozenset[str]:
    """Return the names of the classes with which transformers generates text for a `model_type`."""
    tables = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", *(table for table, _ in _OTHER_WRITERS))
    return frozenset(name for table in tables for name in _classes_of(table, model_type))


def stated_uses(model_type: str) -> tuple[str, ...]:
    """Return what transformers has models of a `model_type` for, such as `masked lm`, by its own tables."""
    from transformers.models.auto import modeling_auto

    pattern = re.compile(r"MODEL_FOR_(\w+)_MAPPING_NAMES")
    tables = ((name, pattern.fullmatch(name)) for name in dir(modeling_auto))
    return tuple(
        found[1].lower().replace("_", " ")
        for name, found in tables
        if found and found[1] != "PRETRAINING" and model_type in getattr(modeling_auto, name)
    )


@contextmanager
def building() -> Iterator[None]:
    """Build models within this context, with empty modules for towers whose package is not installed.

    A tower for images may need a package such as timm, which the language model does not use.
    """
    import torch
    from transformers import AutoModel

    original: Any = AutoModel.from_config

    def from_config(config: Any, *args: Any, **options: Any) -> Any:
        try:
            return original(config, *args, **options)
        except ImportError:
            empty: Any = torch.nn.Module()
            empty.config = config
            return empty

    AutoModel.from_config = from_config  # type: ignore[method-assign]
    try:
        yield
    finally:
        AutoModel.from_config = original  # type: ignore[method-assign]


def _multimodal_class(config: Any) -> str | None:
    causal = _classes_of("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", config.model_type)
    for table, auto in _OTHER_WRITERS:
        names = _classes_of(table, config.model_type)
        written = {name for name in config.architectures or () if isinstance(name, str)}
        stated = not causal or (names != causal and not names.isdisjoint(written))
        if names and stated:
            return auto
    return None


def _classes_of(table: str, model_type: str) -> frozenset[str]:
    from transformers.models.auto import modeling_auto

    def listed(table: str) -> frozenset[str]:
        names = getattr(modeling_auto, table).get(model_type, ())
        return frozenset((names,) if isinstance(names, str) else names)

    sound = listed("MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES") if table in _SPEECH else frozenset()
    return listed(table) - sound


def language_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the part of a model that computes hidden states of tokens.

    It contains the embedding and the decoder layers. Beside it are the head and, in a multimodal model, the
    towers and projectors of other modalities.
    """
    import torch
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return model
    decoder: torch.nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    if not any(isinstance(module, torch.nn.ModuleList) for module in decoder.modules()):
        return model.base_model  # a head has the name that transformers looks for
    return decoder


def padding_without_position(model: torch.nn.Module) -> int | None:
    """Return the token to which a model gives no position of its own; None if every token has one.

    Models derived from fairseq count positions by the ids of tokens: a padding token stays where it is, and
    the first other token has the position after the id of the padding token.
    """
    for module in language_model(model).modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and hasattr(module, "create_position_ids_from_input_ids"):
            return padding
    return None


def beside_language_model(model: torch.nn.Module, names: list[str]) -> dict[str, list[str]]:
    """Group the `names` that belong to neither the language model nor its head, by the module they are in.

    Args:
        names: Parameters and buffers of `model`.

    Returns:
        The names by the outermost module that contains nothing of the language model, such as
        `model.vision_tower`, and those of towers within it, such as `model.embed_tokens_extend`.
    """
    modules = {id(module): name for name, module in model.named_modules()}
    inner = language_model(model)
    own = [part for part in modules[id(inner)].split(".") if part]
    head = f"{modules.get(id(model.get_output_embeddings()))}."  # type: ignore[operator]
    towers = [".".join([*own, child]) for child in _towers_within(model, inner)]
    by_module: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(parts, own, strict=False)) if a != b), len(own))
        if shared == len(own):
            place = next((tower for tower in towers if name.startswith(f"{tower}.")), None)
        else:
            place = None if name.startswith(head) else ".".join(parts[: shared + 1])
        if place is not None:
            by_module.setdefault(place, []).append(name)
    return by_module


def _towers_within(model: torch.nn.Module, inner: torch.nn.Module) -> Iterator[str]:
    """Yield the parts of the language model that hold whole models of their own, for other inputs."""
    from transformers import PreTrainedModel

    tokens = model.get_input_embeddings()  # type: ignore[operator]
    for name, child in inner.named_children():
        parts = list(child.modules())
        if any(isinstance(part, PreTrainedModel) for part in parts) and tokens not in parts:
            yield name


def watch_cache(cache: Any, change: Callable[[int, Any, Any], tuple[Any, Any]]) -> Any:
    """Let `change` see and replace what a transformers cache is given to store; return the cache.

    Keys are seen as layers store them: after their norm and rotary embedding.

    Args:
        cache: A transformers `Cache`.
        change: Called with the number of a layer, its new keys and its new values, (batch, heads, sequence,
            width) each; returns the keys and values that are stored and attended to.
    """
    store = cache.update

    def update(keys: Any, values: Any, layer_idx: int, *rest: Any, **named: Any) -> Any:
        return store(*change(int(layer_idx), keys, values), layer_idx, *rest, **named)

    cache.update = update
    return cache
