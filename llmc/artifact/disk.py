"""Writing to disk: space asked for before, files replaced whole, and what the operating system says."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmc.errors import ConfigError, ResourceError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: EXDEV: a folder that a container's image brought cannot be renamed.
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV}
_HINT = "free some space, or choose another place for the output"
#: How libraries written in Rust (safetensors, tokenizers) quote the operating system.
_QUOTED = re.compile(r"\(os error (\d+)\)")


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
    except Exception as error:
        number = _error_number(error)
        if number not in _NO_SPACE:
            raise
        raise ResourceError(f"{path} cannot be written: {os.strerror(number)}", hint=_HINT) from error


def _error_number(error: Exception) -> int:
    """The operating system's number for an error, also where a library only quotes it; 0 if there is none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    quoted = _QUOTED.search(str(error))
    return int(quoted[1]) if quoted else 0


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


def replace_text(path: Path, text: str) -> None:
    """Replace a file by `text` in one step: readers see the old one or the new one, whole.

    Raises:
        ResourceError: No space for it; the file that was there is untouched.
        ConfigError: The folder may not be written to.
    """
    partial = path.with_name(f".partial-{path.name}")
    with space_errors(path), access_errors(path):
        try:
            partial.unlink(missing_ok=True)
            with partial.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # a file system without it
            raise
    finally:
        os.close(descriptor)
