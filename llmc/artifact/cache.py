"""Stage cache: results of a stage by the digest of everything they depend on."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmc.artifact.disk import access_errors, space_errors
from llmc.errors import ConfigError

_KEY = re.compile(r"[0-9a-f]{64}")
_DIGEST_BYTES = hashlib.sha256().digest_size
_PARTIAL = ".partial"


def content_key(stage: str, facts: Mapping[str, object]) -> str:
    """Key of a result: sha256 over the stage's name and all facts that shape it.

    Args:
        facts: What the result depends on, as JSON values; their order does not matter.
    """
    text = json.dumps([stage, facts], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def default_cache_folder() -> Path:
    """$LLMC_CACHE if set, else `llmc` in the user's cache directory ($XDG_CACHE_HOME or ~/.cache)."""
    stated = os.environ.get("LLMC_CACHE")
    if stated:
        return Path(stated).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmc"


@dataclass(frozen=True)
class StageCache:
    """Bytes by key on disk, each entry led by its sha256; the oldest go when it grows too big.

    Several processes may use one folder at a time.

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
        path = self._path(key)
        try:
            entry = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, data = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            path.unlink(missing_ok=True)
            return None
        return data

    def holds(self, key: str) -> bool:
        """Whether there is an entry under `key`; only `get` finds out whether it is damaged."""
        return self._path(key).is_file()

    def put(self, key: str, data: bytes) -> None:
        """Store `data` under `key` in one step, then remove the oldest entries beyond the bound.

        Raises:
            ResourceError: No space left.
            ConfigError: The folder cannot be written to, or is a file.
        """
        path = self._path(key)
        with space_errors(path), access_errors(path):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise ConfigError(
                    f"cache folder {self.folder} is not a directory", hint="set LLMC_CACHE to a directory"
                ) from error
            descriptor, partial = tempfile.mkstemp(suffix=_PARTIAL, dir=self.folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(hashlib.sha256(data).digest())
                    file.write(data)
                os.replace(partial, path)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise
            self._evict(keep=path)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ConfigError(f"cache key {key!r} is not a sha256 in hexadecimal")
        return self.folder / key

    def _evict(self, keep: Path) -> None:
        entries = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # another process evicted it
                continue
            if not path.is_file():  # another cache, with a bound of its own
                continue
            entries.append((status.st_mtime_ns, path.name, path, status.st_size))
        excess = sum(size for *_, size in entries) - self.max_bytes
        for _, _, path, size in sorted(entries):
            if excess <= 0:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                excess -= size
