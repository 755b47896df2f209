"""Read an engine's file in pieces while TensorRT loads it, so that host memory never holds it whole."""

from __future__ import annotations

import os
from io import FileIO
from typing import Any

from llmc.errors import ResourceError

#: Largest number of bytes that are read at a time.
PIECE = 64 << 20


class PlanFile:
    """A file with the methods that TensorRT calls of a stream reader.

    Args:
        file: The file, opened without a buffer.

    `error` is the error of a read that failed, since TensorRT is only told that the file ends there.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def read(self, num_bytes: int, stream: int) -> bytes:
        """Return the next bytes, at most `num_bytes`; fewer are asked for again, none is the end."""
        try:
            return self._file.read(min(num_bytes, PIECE))
        except OSError as error:
            self.error = error
            return b""

    def seek(self, offset: int, where: Any) -> bool:
        """Move to `offset` from the start, the current place or the end, by TensorRT's `SeekPosition`."""
        whence = {"SET": os.SEEK_SET, "CUR": os.SEEK_CUR, "END": os.SEEK_END}[where.name]
        try:
            self._file.seek(offset, whence)
        except OSError as error:
            self.error = error
            return False
        return True


def open_reader(trt: Any, file: PlanFile) -> Any:
    """Create a stream reader of TensorRT over a file.

    Raises:
        ResourceError: NVIDIA's driver is missing, which a reader asks where bytes are to go.
    """

    class Reader(trt.IStreamReaderV2):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def read(self, num_bytes: int, stream: int) -> bytes:
            return file.read(num_bytes, stream)

        def seek(self, offset: int, where: Any) -> bool:
            return file.seek(offset, where)

    try:
        return Reader()
    except RuntimeError as error:
        raise ResourceError(
            f"TensorRT cannot read an engine: {error}",
            hint="install NVIDIA's driver: llmc doctor looks for it",
        ) from error
