"""A document as YAML, each value with the file that states it if that is asked for."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

_UNFOLDED = 1 << 20  # characters of a line; prevents that a comment gets into a value


def render_document(document: BaseModel, origins: Mapping[tuple[str, ...], Path] | None = None) -> str:
    """Write a document as YAML, without the values that it leaves at their defaults.

    Args:
        origins: Files as from `find_origins`; a comment then names the file of each value.
    """
    data = json.loads(document.model_dump_json(exclude_defaults=True))
    if origins is None:
        return _dump(data)
    lines: list[str] = []
    for key, value in data.items():
        first, *rest = _dump({key: value}, width=_UNFOLDED).split("\n")
        parts = any(len(origin) > 1 and origin[0] == key for origin in origins)
        lines.append(first if parts else _noted(first, origins, key))
        lines += [_noted(line, origins, key, _name_of(line)) for line in rest]
    return "\n".join(lines)


def _dump(data: Any, width: int = 110) -> str:
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=width)
    return text.rstrip("\n")


def _noted(line: str, origins: Mapping[tuple[str, ...], Path], *keys: str) -> str:
    """Return a line with the file that states its value in a comment, if that is known."""
    file = origins.get(keys)
    return line if file is None else f"{line}  # {file.name}"


def _name_of(line: str) -> str:
    """Return the last key under which `find_origins` has a line's value: an inner key, or an entry's name."""
    entry = re.match(r"- \w+: (\S+)$", line)
    if entry is not None:
        return entry[1]
    key = re.match(r"  (\w+):", line)
    return "" if key is None else key[1]
