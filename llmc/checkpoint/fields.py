"""Read JSON objects of a checkpoint: config.json and the files beside it."""

from pathlib import Path
from typing import Any

from llmc.checkpoint.pointer import refuse_pointer
from llmc.errors import CheckpointError
from llmc.strict_json import parse_json


def read_fields(file: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: The file cannot be read, is not JSON, or holds another JSON value.
    """
    refuse_pointer(file)
    try:
        fields = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(
            f"{file} is not JSON: {error}", hint="correct it, or download it again"
        ) from error
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{file} holds a {type(fields).__name__}, not a JSON object", hint="download it again"
        )
    return fields
