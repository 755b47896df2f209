"""Compare the files of an artifact with the same files as a build writes them: bytes, and JSON key by key."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmc.strict_json import parse_json

#: Maximum number of differences of one file that are reported one by one.
_REPORTED = 5
#: Maximum number of characters of a value that are shown.
_SHOWN = 60


def compare_file(file: Path, derived: Path) -> list[str]:
    """Describe how a file of an artifact differs from the file that a build writes, a sentence each.

    Args:
        file: The artifact's file, which may be missing.
        derived: The same file as a build writes it.
    """
    if not file.is_file():
        return [f"{file.name} is missing"]
    data, expected = file.read_bytes(), derived.read_bytes()
    if data == expected:
        return []
    if file.suffix != ".json":
        return [f"{file.name} is not the file of the original"]
    try:
        stated = parse_json(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return [f"{file.name} is not JSON: {error}"]
    except ValueError as error:
        return [f"{file.name}: {error}"]
    differences = list(json_differences(stated, json.loads(expected), file.name))
    return differences or [f"the bytes of {file.name} differ from what a build writes"]


def json_differences(actual: Any, expected: Any, where: str) -> Iterator[str]:
    """Describe each place where two JSON values differ, the first few one by one.

    Args:
        where: The name of the values, which begins each sentence.
    """
    differences = list(_differences(actual, expected, ""))
    for place, ours, theirs in differences[:_REPORTED]:
        yield f"{where}: {place or 'it'} is {_short(theirs)}, but {_short(ours)} in a build"
    if len(differences) > _REPORTED:
        yield f"{where}: {len(differences) - _REPORTED} more places differ"


_ABSENT = object()


def _differences(actual: Any, expected: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(actual, dict) and isinstance(expected, dict):
        for key in {**expected, **actual}:
            inner = f"{place}.{key}" if place else str(key)
            yield from _differences(actual.get(key, _ABSENT), expected.get(key, _ABSENT), inner)
    elif isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected):
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            yield from _differences(one, other, f"{place}[{index}]")
    elif type(actual) is not type(expected) or actual != expected:
        yield place, expected, actual


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
