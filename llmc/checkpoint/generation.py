"""Check the settings of generation_config.json, and name those that artifacts do not support."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmc.errors import CheckpointError

#: Settings that an artifact supports, and settings that do not affect the generated text.
_KNOWN = {
    "cache_implementation",
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "repetition_penalty",
    "return_dict_in_generate",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
}


def describe_unserved(generation_config: Any) -> str | None:
    """Describe in one sentence the settings left out of an artifact; None if there are none.

    Args:
        generation_config: transformers `GenerationConfig`.
    """
    stated = generation_config.to_diff_dict()
    names = sorted(
        name for name, value in stated.items() if name not in _KNOWN and name[0] != "_" and value is not None
    )
    if not names:
        return None
    settings = ", ".join(f"{name} = {stated[name]}"[:60] for name in names)
    return f"settings of generation_config.json that an artifact does not support: {settings}"


def require_types(file: Path, generation_config: Any) -> None:
    """Check the settings of `file` that an artifact supports; transformers may accept wrong ones.

    Args:
        generation_config: transformers `GenerationConfig`.

    Raises:
        CheckpointError: A setting has a wrong type or is out of range.
    """
    for names, required, is_valid in _REQUIREMENTS:
        for name in names:
            value = getattr(generation_config, name, None)
            if value is not None and not is_valid(value):
                raise CheckpointError(
                    f"{file} states {name} = {str(value)[:60]}, which must be {required}",
                    hint="correct it, or remove the file to take the settings of config.json",
                )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and all(map(_is_id, value)))


def _is_above_0(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


#: Settings, what they must be, and the check of a value.
_REQUIREMENTS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("bos_token_id", "eos_token_id", "pad_token_id"), "a token id or a list of them", _are_ids),
    (("temperature", "repetition_penalty"), "a number of 0 or above", lambda v: v == 0 or _is_above_0(v)),
    (("top_p",), "a number between 0 and 1", lambda v: v == 0 or (_is_above_0(v) and v <= 1)),
    (("top_k",), "a whole number", _is_id),
    (("do_sample",), "true or false", lambda v: isinstance(v, bool)),
)
