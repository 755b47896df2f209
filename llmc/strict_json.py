"""JSON of a file that anyone may have written: every defect is a ValueError that says what it is."""

import json
import math
from collections.abc import Iterator
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Parse one JSON value.

    Infinity is taken within a list alone, where configs state an open range (`time_step_limit`).

    Raises:
        ValueError: It is not JSON in UTF-8, is nested too deeply, has a key twice with different values, or
            has a number that is none.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        for key, item in _members(value):
            if isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"{key} is {item}, which is no number")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made and made[key] != value:
            raise ValueError(f"{key} is there twice, as {_short(made[key])} and {_short(value)}")
        made[key] = value
    return made


def _members(value: Any, key: str = "the document") -> Iterator[tuple[str, Any]]:
    """Every number, string and null with its key; of lists only what is not a number."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _members(item, name)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, float) and math.isnan(item):
                yield key, item
            elif not isinstance(item, float):
                yield from _members(item, key)
    else:
        yield key, value


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
