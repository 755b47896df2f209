"""Find the files of a GGUF model: one, or several parts named `NAME-00001-of-00003.gguf`.

llama.cpp's gguf-split defines the names and the `split.*` keys. `split.no` counts from 0, the name from 1;
only the first part holds the model's metadata.
"""

import re
from pathlib import Path

from llmc.errors import CheckpointError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_LISTED = 3


def first_part(file: Path) -> Path:
    """Name the first part of a split model; a file that is not a part names itself."""
    match = _PART.fullmatch(file.name)
    return file if match is None else _part(file, match, 1)


def model_stem(file: Path) -> str:
    """Return the file's name without `.gguf` and without the part number."""
    match = _PART.fullmatch(file.name)
    return file.stem if match is None else match["stem"]


def all_parts(file: Path) -> tuple[Path, ...]:
    """Return every part of the split model that `file` belongs to, in order.

    Raises:
        CheckpointError: `file` is not named as a part, or another part is missing.
    """
    match = _PART.fullmatch(file.name)
    if match is None:
        raise CheckpointError(
            f"{file} is one part of a split model by its split.count, but its name is not the name of a part",
            hint="restore the published names of all parts, e.g. model-00001-of-00003.gguf",
        )
    parts = tuple(_part(file, match, number) for number in range(1, int(match["count"]) + 1))
    missing = [part.name for part in parts if not part.is_file()]
    if missing or file not in parts:
        names = ", ".join(missing[:_LISTED]) or "a part of that number"
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise CheckpointError(
            f"{match['stem']} is split into {int(match['count'])} files, and {names}{more} "
            f"{'is' if len(missing) < 2 else 'are'} missing from {file.parent}",
            hint="put all parts of the model into one folder",
        )
    return parts


def _part(file: Path, match: re.Match[str], number: int) -> Path:
    return file.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}{file.suffix}")
