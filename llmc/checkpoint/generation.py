"""Settings of generation_config.json that no runtime of an artifact takes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmc.errors import CheckpointError

#: Settings that become part of an artifact, and those that say nothing about the text.
_TAKEN = {
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
    """One sentence on the settings that are left out of an artifact; None where there are none.

    Args:
        generation_config: transformers `GenerationConfig`.
    """
    stated = generation_config.to_diff_dict()
    names = sorted(
        name for name, value in stated.items() if name not in _TAKEN and name[0] != "_" and value is not None
    )
    if not names:
        return None
    settings = ", ".join(f"{name} = {stated[name]}"[:60] for name in names)
    return f"settings of generation_config.json that an artifact does not take: {settings}"


def require_types(file: Path, generation_config: Any) -> None:
    """Check the settings of `file` that an artifact takes; transformers takes others for ever, or fails late.

    Args:
        generation_config: transformers `GenerationConfig`.

    Raises:
        CheckpointError: One is of another type, or out of its range.
    """
    for names, wanted, holds in _WANTED:
        for name in names:
            value = getattr(generation_config, name, None)
            if value is not None and not holds(value):
                raise CheckpointError(
                    f"{file} states {name} = {str(value)[:60]}, which must be {wanted}",
                    hint="correct it, or remove the file to take the settings of config.json",
                )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and all(map(_is_id, value)))


def _is_above_0(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


#: Settings, what they must be, and whether a value is.
_WANTED: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("bos_token_id", "eos_token_id", "pad_token_id"), "a token id or a list of them", _are_ids),
    (("temperature", "repetition_penalty"), "a number of 0 or above", lambda v: v == 0 or _is_above_0(v)),
    (("top_p",), "a number between 0 and 1", lambda v: v == 0 or (_is_above_0(v) and v <= 1)),
    (("top_k",), "a whole number", _is_id),
    (("do_sample",), "true or false", lambda v: isinstance(v, bool)),
)
