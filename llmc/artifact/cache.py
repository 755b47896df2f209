"""Stage cache: results of a stage by the digest of everything they depend on.

No build needs it. Where its folder cannot be read or written, what one run keeps for itself goes to a
temporary folder, and a warning of the logger `llmc` says so once.
"""

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmc.artifact.substitute import have_substitute, substitute, tell_once
from llmc.errors import ConfigError

_KEY = re.compile(r"[0-9a-f]{64}")
_DIGEST_BYTES = hashlib.sha256().digest_size
_PARTIAL = ".partial"
#: Age from which on a partial entry is what a killed process left.
_ABANDONED_SECONDS = 3600
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def content_key(stage: str, facts: Mapping[str, object]) -> str:
    """Key of a result: sha256 over the stage's name and all facts that shape it.

    Args:
        facts: What the result depends on, as JSON values; their order does not matter.
    """
    text = json.dumps([stage, facts], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def default_cache_folder() -> Path:
    """$LLMC_CACHE if set, else `llmc` in the user's cache directory."""
    stated = os.environ.get("LLMC_CACHE")
    return Path(os.path.expanduser(stated)) if stated else user_cache_folder() / "llmc"


def user_cache_folder() -> Path:
    """$XDG_CACHE_HOME or ~/.cache; for a user without a home, a folder among the temporary files."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"cache-{os.geteuid()}"


@dataclass(frozen=True)
class StageCache:
    """Bytes by key on disk, each entry led by a sha256 over it; the oldest go when it grows too big.

    Several processes may use one folder at a time. An entry counts only if it belongs to this user and nobody
    else may write to it: some are libraries that are loaded.

    Args:
        folder: Where the entries are; made when the first is put.
        max_bytes: Bound on the size of all entries together.
    """

    folder: Path
    max_bytes: int = 1 << 30

    def get(self, key: str) -> bytes | None:
        """The bytes put under `key`; None if there are none. A damaged entry is removed.

        Args:
            key: As `content_key` gives it.
        """
        for path in self._paths(key):
            try:
                with open(_open_own(path), "rb") as file:
                    entry = file.read()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                tell_once(self.folder, _words(error))
                continue
            digest, data = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
            if _seal(key, data) == digest:
                return data
            with suppress(OSError):  # it is not taken, whether it can be removed or not
                path.unlink(missing_ok=True)
        return None

    def holds(self, key: str) -> bool:
        """Whether there is an entry under `key`; only `get` finds out whether it is damaged."""
        for path in self._paths(key):
            with suppress(OSError):
                os.close(_open_own(path))
                return True
        return False

    def put(self, key: str, data: bytes) -> None:
        """Store `data` under `key` in one step, then remove the oldest entries beyond the bound.

        Where that is not possible, in a temporary folder of this process; where even that is not, nowhere.
        """
        path = self._path(key)
        if not have_substitute(self.folder):
            try:
                _store(path, key, data)
                self._evict(keep=path)
                return
            except OSError as error:
                tell_once(self.folder, _words(error))
        with suppress(OSError):  # `tell_once` has warned
            path = substitute(self.folder) / key
            _store(path, key, data)
            self._evict(keep=path)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ConfigError(f"cache key {key!r} is not a sha256 in hexadecimal")
        return self.folder / key

    def _paths(self, key: str) -> list[Path]:
        paths = [self._path(key)]
        if have_substitute(self.folder):
            with suppress(OSError):
                paths.append(substitute(self.folder) / key)
        return paths

    def _evict(self, keep: Path) -> None:
        """Remove the oldest entries, and what killed processes left. Entries of other users may stay."""
        entries = []
        for path in keep.parent.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # another process evicted it
                continue
            if not path.is_file():  # another cache, with a bound of its own
                continue
            if path.suffix == _PARTIAL and time.time() - status.st_mtime > _ABANDONED_SECONDS:
                _remove(path)
                continue
            entries.append((status.st_mtime_ns, path.name, path, status.st_size))
        excess = sum(size for *_, size in entries) - self.max_bytes
        for _, _, path, size in sorted(entries):
            if excess <= 0:
                break
            if path != keep and _remove(path):
                excess -= size


def _store(path: Path, key: str, data: bytes) -> None:
    """Write an entry in one step, and see that it counts.

    Raises:
        OSError: It cannot be written, or would not be taken when it is read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(suffix=_PARTIAL, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_seal(key, data))
            file.write(data)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    os.close(_open_own(path))


def _open_own(path: Path) -> int:
    """A descriptor to read a file of this user that nobody else may write to; no link is followed.

    Raises:
        OSError: There is none, or it is somebody else's.
    """
    if os.name != "posix":
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if (
        not stat.S_ISREG(status.st_mode)
        or status.st_uid != os.geteuid()
        or status.st_mode & _OTHERS_MAY_WRITE
    ):
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "an entry belongs to another user, or others may write to it")
    return descriptor


def _seal(key: str, data: bytes) -> bytes:
    """The digest of an entry; with its key, so that none stands for another."""
    digest = hashlib.sha256(key.encode())
    digest.update(data)
    return digest.digest()


def _remove(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _words(error: OSError) -> str:
    return error.strerror or type(error).__name__
