"""Check what config.json declares about rotary embeddings before transformers' model fails on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llmc.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Older names of rope types, as transformers' config classes read them.
_OLD_NAMES = {"su": "longrope", "mrope": "default", "xdrope": "dynamic"}


def refuse_contradiction(file: str, fields: Mapping[str, Any]) -> None:
    """Check that `type`, the older key, and `rope_type` of a config.json agree if both are present.

    Raises:
        CheckpointError: They differ.
    """
    for place, group in _groups(fields):
        old, new = (str(group.get(key, "")) for key in ("type", "rope_type"))
        if old and new and _OLD_NAMES.get(old, old) != _OLD_NAMES.get(new, new):
            raise CheckpointError(
                f"{place} of {file} says type {old} and rope_type {new}",
                hint="keep only the settings that the model was trained with",
            )


def refuse_wrong_numbers(file: str, fields: Mapping[str, Any]) -> None:
    """Check that theta and factor are above 0, since frequencies are divided by them.

    Raises:
        CheckpointError: A value is not above 0.
    """
    text = fields.get("text_config")
    places: list[tuple[str, Mapping[str, Any]]] = [(f"{place}.", group) for place, group in _groups(fields)]
    places += [("", fields), ("text_config.", text if isinstance(text, dict) else {})]
    for place, group in places:
        for key in ("rope_theta", "factor"):
            value = group.get(key)
            if (key == "rope_theta" or place) and isinstance(value, int | float) and value <= 0:
                raise CheckpointError(
                    f"{place}{key} of {file} is {value}, but frequencies are divided by it",
                    hint="take the config.json that belongs to the weights",
                )


def refuse_unknown_type(config: PreTrainedConfig) -> None:
    """Check that transformers supports the rope type of a config.

    Raises:
        UnsupportedError: transformers does not support it.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text: Any = config.get_text_config(decoder=True)
    stated = getattr(text, "rope_parameters", None) or {}
    supported = {"default", "axial", *ROPE_INIT_FUNCTIONS}
    for group in (stated, *(value for value in stated.values() if isinstance(value, dict))):
        kind = str(group.get("rope_type", "default"))
        if kind not in supported:
            raise UnsupportedError(
                f"the rotary embedding of this {config.model_type} config has rope_type {kind}, which "
                f"transformers does not have; it has {', '.join(sorted(supported))}",
                hint="set the rope_type in config.json that the model was trained with",
            )


def _groups(fields: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every object that describes a rotary embedding, with its place in the config."""
    text = fields.get("text_config")
    for prefix, stated in (("", fields), ("text_config.", text if isinstance(text, dict) else {})):
        for key in ("rope_scaling", "rope_parameters"):
            group = stated.get(key)
            if isinstance(group, dict):
                yield f"{prefix}{key}", group
                yield from (
                    (f"{prefix}{key}.{name}", own) for name, own in group.items() if isinstance(own, dict)
                )
