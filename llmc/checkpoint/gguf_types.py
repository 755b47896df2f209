"""Check the types of the metadata that llmc reads from a GGUF file, so that other code can rely on them.

Source: `gguf.constants.Keys` and the types that `gguf.GGUFWriter` writes for them.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc.errors import CheckpointError

_TEXT = re.compile(
    r"general\.(architecture|type)|tokenizer\.ggml\.(model|pre)|tokenizer\.chat_template|\*\.rope\.scaling\.type"
)
_FLAG = re.compile(
    r"tokenizer\.ggml\.(add_\w+|remove_extra_whitespaces)|\*\.attention\.causal|\*\.use_parallel_residual"
    r"|\*\.expert_weights_norm|\*\.rope\.scaling\.finetuned|\*\.ssm\.dt_b_c_rms"
)
_COUNT = re.compile(
    r"split\.\w+(\.count)?|tokenizer\.ggml\.\w+_token_id|\*\.(\w+\.)*\w*(count|length|layers|sliding_window)"
    r"|\*\.pooling_type|\*\.rope\.dimension_count\w*|\*\.expert_gating_func"
)
_NUMBER = re.compile(r"\*\.(\w+\.)*\w*(scale|epsilon|softcapping|factor|multiplier|alpha|scale_linear)")
_SIZE = re.compile(r"\*\.(block_count|context_length|embedding_length)")
_POSITIVE = re.compile(r"\*\.rope\.(freq_base\w*|scaling\.yarn_beta_(fast|slow))")
_BY_LAYER = re.compile(r"\*\.(attention\.head_count(_kv)?|feed_forward_length)")


def check_types(file: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
    """Check the type of every key that is read, and that numbers are finite.

    Args:
        metadata: Scalars, strings and short numeric arrays by key.

    Raises:
        CheckpointError: A key has a value of a wrong type.
    """
    for key, value in metadata.items():
        name = f"*.{key.removeprefix(f'{architecture}.')}" if key.startswith(f"{architecture}.") else key
        kind = _required_kind(name)
        values = value if isinstance(value, list) and _BY_LAYER.fullmatch(name) else [value]
        if kind is not None and not all(_has_type(item, kind) for item in values):
            shown = "an array" if isinstance(value, list) else repr(value)
            raise CheckpointError(
                f"{file} has {key} = {shown}, which must be {kind}", hint="convert the original model again"
            )


def _required_kind(name: str) -> str | None:
    kinds = {
        "a string": _TEXT,
        "true or false": _FLAG,
        "a whole number above 0": _SIZE,
        "a whole number": _COUNT,
        "a number above 0": _POSITIVE,
        "a number": _NUMBER,
    }
    return next((kind for kind, pattern in kinds.items() if pattern.fullmatch(name)), None)


def _has_type(value: Any, kind: str) -> bool:
    if kind == "a string":
        return isinstance(value, str)
    if kind == "true or false":
        return isinstance(value, bool)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind.startswith("a whole number"):
        return number and isinstance(value, int) and value >= kind.endswith("above 0")
    return number and (kind != "a number above 0" or value > 0)
