"""Parse untrusted JSON: every defect is a ValueError that describes it."""

import json
import math
from collections.abc import Iterator
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Parse one JSON value.

    Infinity is accepted only within a list, where configs state an open range (`time_step_limit`).

    Raises:
        ValueError: It is not JSON in UTF-8, is nested too deeply, has a key twice with different values, or
            has NaN, or infinity outside of a list.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        for key, item in _members(value):
            if isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"{key} is {item}, which is not a number")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members and members[key] != value:
            raise ValueError(f"{key} is given twice, as {_short(members[key])} and {_short(value)}")
        members[key] = value
    return members


def _members(value: Any, key: str = "the document") -> Iterator[tuple[str, Any]]:
    """Yield every number, string and null with its key; numbers in lists only if they are NaN."""
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
