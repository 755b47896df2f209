"""Compute a content digest over files that is fast for large files.

Format: each file is cut into parts of 64 MiB; the digest is sha256 over one line per file,
`name size part part …`, with each part's sha256 in hex. Parts are hashed on two threads (hashlib
releases the GIL), 4 MiB at a time.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_PART = 64 << 20
_READ = 4 << 20


def digest_files(files: Sequence[Path]) -> str:
    """Compute the sha256 (hex) of the files' names and bytes, independent of their folder and order."""
    ordered = sorted(set(files), key=lambda file: file.name)
    with ThreadPoolExecutor(2) as pool:
        parts = [
            (file, size, [pool.submit(_digest_part, file, at) for at in range(0, size, _PART)])
            for file in ordered
            for size in (os.path.getsize(file),)
        ]
        lines = [
            " ".join([file.name, str(size), *(part.result() for part in hashes)])
            for file, size, hashes in parts
        ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest_part(file: Path, offset: int) -> str:
    state = hashlib.sha256()
    buffer = memoryview(bytearray(_READ))
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        left = _PART
        while left and (count := stream.readinto(buffer[: min(left, _READ)])):
            state.update(buffer[:count])
            left -= count
    return state.hexdigest()
