"""Disk space: asked for before writing, and what the operating system says while writing."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmc.errors import ConfigError, ResourceError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
_HINT = "free some space, or choose another place for the output"


def require_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the file system of `folder` cannot hold.

    Args:
        folder: An existing directory.
        needed: Bytes about to be written.

    Raises:
        ResourceError: Less than `needed` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(f"{folder} has {free:,} bytes free; the build writes {needed:,}", hint=_HINT)


@contextmanager
def space_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a file size limit met while writing `path` into a typed error.

    Raises:
        ResourceError: No space left, quota exceeded or file too large.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise ResourceError(f"{path} cannot be written: {error.strerror}", hint=_HINT) from error


@contextmanager
def access_errors(path: Path) -> Iterator[None]:
    """Turn a place that may not be written to into a typed error.

    Raises:
        ConfigError: No permission, or a read-only file system.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ACCESS:
            raise
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", hint="choose an output that you may write to"
        ) from error
