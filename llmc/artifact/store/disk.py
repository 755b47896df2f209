"""Write to disk: check free space first, replace files atomically, and convert errors of the system."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmc.errors import ConfigError, ResourceError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: EXDEV: a folder from a container's image cannot be renamed.
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV, errno.ENAMETOOLONG}
_HINT = "free some space, or choose another place for the output"
#: The form in which libraries written in Rust (safetensors, tokenizers) quote the operating system.
_QUOTED = re.compile(r"\(os error (\d+)\)")


def require_space(folder: Path, needed: int) -> None:
    """Refuse to begin what does not fit on the file system of `folder`.

    Args:
        folder: An existing directory.
        needed: Bytes that are about to be written.

    Raises:
        ResourceError: Less than `needed` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(f"{folder} has {free:,} bytes free, but the build writes {needed:,}", hint=_HINT)


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
    """Return the operating system's number of an error, even if a library quotes it; 0 if there is none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    quoted = _QUOTED.search(str(error))
    return int(quoted[1]) if quoted else 0


@contextmanager
def access_errors(path: Path) -> Iterator[None]:
    """Convert a lack of write permission, or a name that is too long, into a typed error.

    Raises:
        ConfigError: No permission, a read-only file system, or a name that is too long for it.
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
    """Replace a file by `text` atomically: readers see either the old or the new content.

    Raises:
        ResourceError: No space for it; the existing file is untouched.
        ConfigError: The folder is not writable.
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
    """Flush the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # the file system has no fsync
            raise
    finally:
        os.close(descriptor)
