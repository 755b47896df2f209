"""Refuse sizes in a config that the files contradict, before transformers builds modules of these sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Keys of configs that count modules, which transformers creates one by one.
_COUNT = re.compile(r"(^|_)(layers?|blocks?|experts|heads?|depth)$")
#: Sizes that every model has, by their names in configs.
_POSITIVE = frozenset(
    {"vocab_size", "hidden_size", "n_embd", "d_model", "max_position_embeddings", "n_positions"}
    | {"num_hidden_layers", "n_layer", "n_layers", "num_attention_heads", "n_head", "n_heads"}
)
_EXPERTS_USED, _EXPERTS = "num_experts_per_tok", ("num_experts", "num_local_experts", "n_routed_experts")
#: Most modules of a kind; published models have 16,384 experts at most, and fewer layers.
_MOST_MODULES = 100_000
_LARGEST = 2**63 - 1  # of an axis, in PyTorch
_HINT = "take the config.json that belongs to the weights"


def refuse_impossible(file: str, fields: Mapping[str, Any]) -> None:
    """Check the integers of a config.json by themselves.

    Raises:
        CheckpointError: An integer counts more modules than any model has, or does not fit into 64 bits.
    """
    text = fields.get("text_config")
    for part in (fields, text if isinstance(text, dict) else {}):
        for key in sorted(_POSITIVE.intersection(part)):
            if isinstance(part[key], int) and part[key] < 1:
                raise CheckpointError(f"{file} says {key} {part[key]}, but it must be at least 1", hint=_HINT)
        used, total = part.get(_EXPERTS_USED), next((part[key] for key in _EXPERTS if key in part), None)
        if isinstance(used, int) and isinstance(total, int) and used > total > 0:
            raise CheckpointError(
                f"{file} says {_EXPERTS_USED} {used}, but there are only {total} experts", hint=_HINT
            )
    for key, value in _integers(fields):
        if abs(value) > _LARGEST:
            raise CheckpointError(f"{file} has a {key} of {len(str(abs(value)))} digits", hint=_HINT)
        if _COUNT.search(key.rpartition(".")[2]) and value > _MOST_MODULES:
            raise CheckpointError(
                f"{file} says {key} {value:,}, but no model has more than {_MOST_MODULES:,}", hint=_HINT
            )


def require_stored(source: Path, config: PreTrainedConfig, shapes: Sequence[tuple[int, ...]]) -> None:
    """Check a config against the headers of its files: there is a tensor per layer, and the width is an axis.

    Args:
        shapes: Shapes of all stored tensors.

    Raises:
        CheckpointError: There are fewer tensors than layers, or no tensor has the hidden size.
    """
    text: Any = config.get_text_config(decoder=True)
    layers, width = (getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if isinstance(layers, int) and layers > len(shapes):
        raise CheckpointError(
            f"num_hidden_layers is {layers:,} in the config of {source}, whose files hold {len(shapes):,} "
            "tensors",
            hint=_HINT,
        )
    if isinstance(width, int) and not any(width in shape for shape in shapes):
        raise CheckpointError(
            f"hidden_size is {width:,} in the config of {source}, but no tensor of its files has such "
            "an axis",
            hint=_HINT,
        )


def _integers(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield every integer with its key, including those of nested objects."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _integers(value, f"{prefix}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
