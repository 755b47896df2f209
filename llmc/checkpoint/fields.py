"""JSON objects of a checkpoint: config.json and the files beside it."""

import json
from pathlib import Path
from typing import Any

from llmc.errors import CheckpointError


def read_fields(file: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: It is not JSON, or another JSON value.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} holds a {type(fields).__name__}, not a JSON object")
    return fields
