"""The evaluation text, read once where a command begins and handed on as a value."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llmc.data import eval_text
from llmc.errors import ConfigError
from llmc.records import Record


class EvaluationText(Record):
    """The text that quality is measured on.

    Args:
        text: The whole text.
        names: The files that it was read from, `-` for standard input; none for the text that ships.
    """

    text: str
    names: tuple[str, ...] = ()


def shipped_text() -> EvaluationText:
    """Return the text that ships with the package."""
    return EvaluationText(text=eval_text())


def read_text(names: Sequence[str]) -> EvaluationText:
    """Read the files one after the other, `-` for standard input; without files, the text that ships.

    Raises:
        ConfigError: A file is not text in UTF-8, or cannot be read.
    """
    if not names:
        return shipped_text()
    return EvaluationText(text="\n\n".join(map(_read, names)), names=tuple(names))


def _read(name: str) -> str:
    told = "from standard input" if name == "-" else name
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"evaluation text {told} is not UTF-8 at byte {error.start}",
            hint="convert it first: iconv -f WINDOWS-1252 -t UTF-8",
        ) from error
    except OSError as error:
        raise ConfigError(f"evaluation text {told} cannot be read: {error.strerror}") from error
