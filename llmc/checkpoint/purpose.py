"""Refuse models whose files declare another purpose than generating text.

Their weights often fit a causal language model of the same type, which would then generate nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.architecture import generates_text, is_multimodal, stated_uses
from llmc.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Suffixes of class names in `architectures`, and what such a model does.
_OTHER_HEADS: tuple[tuple[str, str], ...] = (
    (r"(CrossEncoder|For\w*Ranking|Reranker)$", "ranks texts"),
    (r"(For\w*Reward\w*|RewardModel|For\w*Score)$", "scores answers (a reward model)"),
    (r"For(Sequence|Text)Classification$", "classifies texts or scores them"),
    (r"ForTokenClassification$", "classifies tokens"),
    (r"ForMultipleChoice$", "chooses between answers"),
    (r"ForQuestionAnswering$", "marks answers in a text"),
    (r"(For\w*Embedding\w*|ForRetrieval|EmbeddingModel)$", "embeds texts"),
    (r"(Bi|Bidirec\w*|Encoder)(Model|For\w+)?$", "reads a text in both directions"),
    (r"(MaskedLM|MNTP)$", "fills gaps in a text (an encoder-only model)"),
)
_SENTENCE_TRANSFORMERS = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


def refuse_other_purpose(folder: Path, fields: Mapping[str, Any]) -> None:
    """Check that the model generates text.

    Args:
        folder: Folder of config.json.
        fields: Fields of config.json.

    Raises:
        UnsupportedError: The model is an embedding model, a classifier, a reranker or a reward model.
    """
    hint = "llmc compiles causal language models, which predict the next token"
    stated = fields.get("architectures")
    for name in stated if isinstance(stated, list) else [stated or ""]:
        purpose = _purpose(str(name), str(fields.get("model_type")))
        if purpose is not None:
            raise UnsupportedError(f"{folder} holds a {name}, which {purpose}", hint=hint)
    beside = [name for name in _SENTENCE_TRANSFORMERS if (folder / name).is_file()]
    if beside or "sentence_transformers" in fields:
        reason = f"it has {beside[0]}" if beside else "its config.json says so"
        raise UnsupportedError(
            f"{folder} holds a model of sentence-transformers ({reason}), which embeds or ranks texts",
            hint=hint,
        )


def _purpose(name: str, model_type: str) -> str | None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    if name in generates_text(model_type):
        return None
    for pattern, purpose in _OTHER_HEADS:
        if re.search(pattern, name):
            return purpose
    if name == MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES.get(model_type):
        return "generates sound"
    bare = MODEL_MAPPING_NAMES.get(model_type)
    if name in ((bare,) if isinstance(bare, str) else bare or ()):
        embeds = generates_text(model_type) or "masked lm" in stated_uses(model_type)
        return "has no language model head" + (" (an embedding model)" if embeds else "")
    return None


def refuse_both_directions(config: PreTrainedConfig) -> None:
    """Check that a token attends only to itself and earlier tokens.

    Raises:
        UnsupportedError: A token also attends to later ones, as in models that embed texts.
    """
    if is_multimodal(config):  # tokens of an image see each other, tokens of a text do not
        return
    text: Any = config.get_text_config(decoder=True)
    stated = {"is_causal": False, "use_bidirectional_attention": True, "bidirectional": True}
    for key, value in stated.items():
        value_stated = getattr(text, key, None)
        if value_stated is value or (key == "use_bidirectional_attention" and value_stated == "all"):
            raise UnsupportedError(
                f"{config.model_type} with {key} = {str(value_stated).lower()} attends in both directions: it"
                " embeds texts and does not generate any",
                hint="llmc compiles causal language models, which predict the next token",
            )


def refuse_cross_attention(config: PreTrainedConfig) -> None:
    """Check that layers attend only to the text.

    Layers that a config lists as `cross_attention_layers` may be skipped where no image is given, which the
    trace finds out.

    Raises:
        UnsupportedError: Some layers attend to an image or to the states of another model.
    """
    text: Any = config.get_text_config(decoder=True)
    layers: range | None = None
    interval = getattr(text, "cross_layer_interval", None)
    if isinstance(interval, int) and interval > 0:
        layers = range(0, text.num_hidden_layers, interval)
    if layers or getattr(text, "add_cross_attention", False):
        which = f"layers {', '.join(map(str, layers))}" if layers else "every layer"
        raise UnsupportedError(
            f"{config.model_type} has cross-attention in {which}: besides the text, it reads an image or "
            "another model's states",
            hint="llmc compiles decoders that read only text; use the text-only model of the family",
        )
