"""Files of an artifact against the same files as a build writes them: bytes, and JSON key by key."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmc.strict_json import parse_json

#: Differences of one file that are told one by one.
_TOLD = 5
#: Characters of a value that are shown.
_SHOWN = 60


def compare_file(file: Path, derived: Path) -> list[str]:
    """How a file of an artifact differs from the one that a build writes, a sentence each.

    Args:
        file: May be missing.
        derived: As a build writes it.
    """
    if not file.is_file():
        return [f"{file.name} is missing"]
    data, wanted = file.read_bytes(), derived.read_bytes()
    if data == wanted:
        return []
    if file.suffix != ".json":
        return [f"{file.name} is not that of the original"]
    try:
        stated = parse_json(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return [f"{file.name} is not JSON: {error}"]
    except ValueError as error:
        return [f"{file.name}: {error}"]
    found = list(json_differences(stated, json.loads(wanted), file.name))
    return found or [f"{file.name} has other bytes than a build writes"]


def json_differences(actual: Any, wanted: Any, where: str) -> Iterator[str]:
    """Each place where two JSON values differ, the first few one by one.

    Args:
        where: What the values are, at the beginning of each sentence.
    """
    found = list(_differences(actual, wanted, ""))
    for place, ours, theirs in found[:_TOLD]:
        yield f"{where}: {place or 'it'} is {_short(theirs)}, by a build {_short(ours)}"
    if len(found) > _TOLD:
        yield f"{where}: {len(found) - _TOLD} more places differ"


_ABSENT = object()


def _differences(actual: Any, wanted: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(actual, dict) and isinstance(wanted, dict):
        for key in {**wanted, **actual}:
            inner = f"{place}.{key}" if place else str(key)
            yield from _differences(actual.get(key, _ABSENT), wanted.get(key, _ABSENT), inner)
    elif isinstance(actual, list) and isinstance(wanted, list) and len(actual) == len(wanted):
        for index, (one, other) in enumerate(zip(actual, wanted, strict=True)):
            yield from _differences(one, other, f"{place}[{index}]")
    elif type(actual) is not type(wanted) or actual != wanted:
        yield place, wanted, actual


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
