"""JSON in which no object states a name twice: readers differ in which of the two they take (RFC 8259, 4)."""

import json
from typing import Any


class RepeatedNameError(ValueError):
    """An object states a name twice."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r} is stated twice in one object")


def parse_json(text: str) -> Any:
    """Parse a text of JSON.

    Raises:
        json.JSONDecodeError: It is not JSON.
        RepeatedNameError: An object states a name twice.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise RepeatedNameError(name)
        made[name] = value
    return made
