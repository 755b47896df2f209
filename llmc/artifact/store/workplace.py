"""Manage the hidden folder beside an output in which an artifact is written, and recover after a crash.

While a process changes an output `NAME`, or after it was killed, there are beside it, with the digest `D` of
that name:

- `.llmc-D.lock`, the lock;
- `.llmc-D-RANDOM/`, a work folder, with `owner` (the output's name, which identifies it), `new/`
  (an artifact being written), `PLACE-DIGEST/` (a finished one on its way to a place, by the digest of its
  manifest) and `old-PLACE/` (what it replaces).
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from llmc.artifact.manifest import MANIFEST
from llmc.artifact.store.disk import sync_folder
from llmc.artifact.store.exchange import put_in_place
from llmc.artifact.store.lock import output_lock
from llmc.errors import ConfigError

_OWNER = "owner"
_PARTIAL = f".{MANIFEST}.new"
_FINISHED = re.compile(r"(output|unverified|failed)-([0-9a-f]{64})")


class Place(StrEnum):
    """The places of an artifact."""

    OUTPUT = "output"
    UNVERIFIED = "unverified"
    FAILED = "failed"

    def beside(self, output: Path) -> Path:
        """Return the folder of this place for an output."""
        return output if self is Place.OUTPUT else output.with_name(f"{output.name}.{self.value}")


def lock_path(output: Path) -> Path:
    """Return the lock file of an output."""
    return output.with_name(f"{_prefix(output)}.lock")


def make_work_folder(output: Path) -> Path:
    """Create a work folder of an output; requires its lock."""
    while True:
        work = output.with_name(f"{_prefix(output)}-{secrets.token_hex(4)}")
        try:
            work.mkdir()
        except FileExistsError:
            continue
        (work / _OWNER).write_text(output.name, encoding="utf-8", errors="surrogateescape")
        return work


def move(source: Path, work: Path, output: Path, place: Place, manifest: str) -> Path:
    """Give the folder `source` this manifest and move it to a place; requires the output's lock.

    After a kill at any moment, `recover` finishes or undoes it.

    Returns:
        The folder of the place.
    """
    destination = place.beside(output)
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    entry = work / f"{place.value}-{digest}"
    if source.parent == work:
        _sync_files(source)
    source.rename(entry)
    try:
        write_manifest(entry, manifest)
        put_in_place(entry, destination, work / f"old-{place.value}")
    except BaseException:
        if entry.exists() and not source.exists() and _digest(destination) != digest:
            entry.rename(source)
        raise
    sync_folder(output.parent)
    return destination


def _sync_files(folder: Path) -> None:
    """Flush every file to the disk, so that no manifest describes what a power failure can still undo."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        else:
            sync_folder(path)


def write_manifest(folder: Path, text: str) -> None:
    """Replace the manifest in `folder`, with everything flushed to the disk afterwards."""
    partial = folder / _PARTIAL
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / MANIFEST)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(folder)


def recover(output: Path) -> None:
    """Finish or undo what a killed process left of an output, and remove the rest; requires its lock."""
    for work in _work_folders(output):
        entries = [(entry, _FINISHED.fullmatch(entry.name)) for entry in work.iterdir()]
        for entry, finished in entries:
            if finished is not None:
                _bring_on(entry, Place(finished[1]), finished[2], work, output)
        for place in Place:
            old = work / f"old-{place.value}"
            if old.exists() and not place.beside(output).exists():
                old.rename(place.beside(output))
        shutil.rmtree(work)
    for place in Place:
        if place.beside(output).is_dir():
            (place.beside(output) / _PARTIAL).unlink(missing_ok=True)


def _bring_on(entry: Path, place: Place, digest: str, work: Path, output: Path) -> None:
    """Finish what a killed `move` left under the name that states its destination."""
    if _digest(place.beside(output)) == digest:  # `entry` is what was replaced
        return
    if _digest(entry) == digest:
        aside = work / f"older-{place.value}"
        put_in_place(entry, place.beside(output), aside)
    elif (entry / MANIFEST).is_file():  # its verdict was not written, so it stays unverified
        remaining = Place.UNVERIFIED if output.exists() else Place.OUTPUT
        put_in_place(entry, remaining.beside(output), work / f"older-{remaining.value}")


def tidy(path: Path) -> None:
    """Recover what was left of the output that a folder belongs to, if no process works on it.

    What cannot be tidied, because another process holds it or this one may not write there, is left.
    """
    path = path.resolve()
    beside = (Place.UNVERIFIED, Place.FAILED)
    outputs = [path, *(path.with_name(path.name.removesuffix(f".{place.value}")) for place in beside)]
    for output in dict.fromkeys(outputs):
        try:
            if _is_littered(output):
                with output_lock(lock_path(output), output):
                    recover(output)
        except (ConfigError, OSError):
            continue


@contextmanager
def holding(output: Path) -> Iterator[None]:
    """Hold an output's lock, after removing what a killed process left there.

    Raises:
        ConfigError: Another process holds it.
    """
    with output_lock(lock_path(output), output):
        recover(output)
        yield


def _is_littered(output: Path) -> bool:
    prefix = _prefix(output)
    with os.scandir(output.parent) as entries:
        return any(entry.name.startswith(prefix) for entry in entries)


def _work_folders(output: Path) -> list[Path]:
    """Return the work folders of an output, without those of other outputs."""
    prefix = f"{_prefix(output)}-"
    folders = [p for p in output.parent.iterdir() if p.name.startswith(prefix)]
    return [p for p in folders if p.is_dir() and not p.is_symlink() and _is_of(p, output)]


def _is_of(work: Path, output: Path) -> bool:
    """Return whether a folder states that it belongs to an output, or its process died before stating it."""
    owner = work / _OWNER
    named = owner.is_file() and not owner.is_symlink()
    text = owner.read_text(encoding="utf-8", errors="surrogateescape") if named else ""
    return text == output.name or (not text and all(entry == owner for entry in work.iterdir()))


def _prefix(output: Path) -> str:
    return f".llmc-{hashlib.sha256(os.fsencode(output.name)).hexdigest()[:16]}"


def _digest(folder: Path) -> str | None:
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None
