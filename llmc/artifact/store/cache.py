"""Cache results of stages by the digest of everything that they depend on.

No build needs the cache. If its folder cannot be read or written, what one run stores for itself goes to a
temporary folder, and the logger `llmc` warns of that once.
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

from llmc.artifact.store.substitute import have_substitute, substitute, tell_once
from llmc.errors import ConfigError

_KEY = re.compile(r"[0-9a-f]{64}")
_DIGEST_BYTES = hashlib.sha256().digest_size
_PARTIAL = ".partial"
#: Age from which a partial entry was left by a killed process.
_ABANDONED_SECONDS = 3600
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def content_key(stage: str, facts: Mapping[str, object]) -> str:
    """Return the key of a result: sha256 over the stage's name and all facts that shape it.

    Args:
        facts: Everything that the result depends on, as JSON values; their order does not matter.
    """
    text = json.dumps([stage, facts], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def default_cache_folder() -> Path:
    """Return $LLMC_CACHE if set, else `llmc` in the user's cache directory."""
    stated = os.environ.get("LLMC_CACHE")
    return Path(os.path.expanduser(stated)) if stated else user_cache_folder() / "llmc"


def user_cache_folder() -> Path:
    """Return $XDG_CACHE_HOME or ~/.cache; for a user without a home, a folder among the temporary files."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"cache-{os.geteuid()}"


@dataclass(frozen=True)
class StageCache:
    """The entries stored on disk by key, each with a sha256 over it; the oldest are removed at a size limit.

    Several processes may use one folder at a time. An entry is valid only if it belongs to this user and
    nobody else may write to it: some entries are libraries that are loaded.

    Args:
        folder: Folder of the entries; created when the first is put.
        max_bytes: Maximum size of all entries together.
    """

    folder: Path
    max_bytes: int = 1 << 30

    def get(self, key: str) -> bytes | None:
        """Return the bytes put under `key`; None if there are none. A damaged entry is removed.

        Args:
            key: Key from `content_key`.
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
            with suppress(OSError):  # it is not used, whether or not it can be removed
                path.unlink(missing_ok=True)
        return None

    def holds(self, key: str) -> bool:
        """Return whether there is an entry under `key`; only `get` detects whether it is damaged."""
        for path in self._paths(key):
            with suppress(OSError):
                os.close(_open_own(path))
                return True
        return False

    def put(self, key: str, data: bytes) -> None:
        """Store `data` under `key` atomically, then remove the oldest entries beyond the size limit.

        If that is not possible, store it in a temporary folder of this process; if that fails too, do
        nothing.
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
            if not path.is_file():  # another cache, with its own size limit
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
    """Write an entry atomically, and check that it is valid.

    Raises:
        OSError: It cannot be written, or would not be valid when it is read.
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
    """Open a file of this user that nobody else may write to, for reading; follow no link.

    Raises:
        OSError: The file does not exist, or belongs to another user.
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
    """Return the digest of an entry with its key, so that no entry can replace another."""
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
