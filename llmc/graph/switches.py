"""Find lengths beyond which a model's own code computes differently: switches of rotary embeddings.

LongRoPE (Ding et al. 2024) has two sets of frequencies. transformers uses the long set for every token of a
step whose largest position reaches the length of the original training; keys already in the KV cache keep
the rotation that they were given.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

#: Lengths beyond which onnxruntime-genai 0.18 recomputes the KV cache of one sequence, and the
#: `model.type` that makes it do so (its src/generators.cpp, InitializePhi3RopeThreshold).
RESTARTING_TYPES: Mapping[int, str] = {4096: "phimoe", 8192: "phi3small"}


def rope_switches(config: Any) -> tuple[int, ...]:
    """Return the largest total lengths of a step for which a rotary embedding uses its first frequencies."""
    return _lengths(g for g in _groups(config) if "longrope" in (g.get("rope_type"), g.get("type")))


def trained_lengths(config: Any) -> tuple[int, ...]:
    """Return the lengths of the original training that rotary embeddings state, with switches or without."""
    return _lengths(_groups(config))


def crosses(pieces: Sequence[int], total: int, switches: Sequence[int]) -> bool:
    """Return whether `total` tokens in steps pass a switch after the first step.

    Args:
        pieces: Numbers of tokens of the first steps; empty if all tokens form one step.
    """
    first = pieces[0] if pieces else total
    return any(first <= at < total for at in switches)


def _groups(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the parameters of every rotary embedding of a transformers configuration."""
    stated = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    yield stated
    yield from (v for v in stated.values() if isinstance(v, dict))


def _lengths(groups: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
    lengths = {g.get("original_max_position_embeddings") for g in groups}
    return tuple(sorted(int(n) for n in lengths if isinstance(n, int) and n > 1))
