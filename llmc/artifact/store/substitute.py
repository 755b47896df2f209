"""Provide temporary folders in place of unusable cache folders, and folders for work that can be resumed."""

import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from llmc.artifact.store.disk import space_errors
from llmc.errors import ResourceError

Result = TypeVar("Result")

_LOGGER = logging.getLogger("llmc")
#: Age from which a folder is not in use, where there are no locks.
_UNUSED_SECONDS = 86400
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
#: Temporary folders by the folder that each replaces; removed when the process ends.
_SUBSTITUTES: dict[Path, "tempfile.TemporaryDirectory[str]"] = {}
_TOLD: set[Path] = set()
#: Descriptors of folders in use: their locks keep others from evicting them until the process ends.
_IN_USE: dict[Path, int] = {}


def tell_once(folder: Path, reason: str) -> None:
    """Warn that a folder of the cache is not used; once for all folders of one cache."""
    warned = any(
        folder in (earlier, earlier.parent) or folder.parent in (earlier, earlier.parent) for earlier in _TOLD
    )
    _TOLD.add(folder)
    if not warned:
        _LOGGER.warning("continues without the cache in %s: %s", folder, reason)


def have_substitute(folder: Path) -> bool:
    """Return whether a temporary folder replaces `folder`."""
    return folder in _SUBSTITUTES


def substitute(folder: Path) -> Path:
    """Return the temporary folder that replaces `folder` as long as this process runs.

    Raises:
        OSError: Temporary files cannot be written either.
    """
    if folder not in _SUBSTITUTES:
        _SUBSTITUTES[folder] = tempfile.TemporaryDirectory(prefix="llmc-cache-", ignore_cleanup_errors=True)
    return Path(_SUBSTITUTES[folder].name)


def current_folder(folder: Path) -> Path:
    """Return the folder with the content of `folder`; a temporary one if others may have written to it."""
    if have_substitute(folder) or (folder.exists() and not _is_own(folder)):
        return substitute(folder)
    return folder


def usable_folder(folder: Path, *, own: bool = True) -> Path:
    """Return `folder`, created if it is missing, or a temporary one if it cannot be written to.

    Args:
        own: Whether it must be this user's, and writable by nobody else, as folders created here are.
    """
    if have_substitute(folder):
        return substitute(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if own and not _is_own(folder):
            raise PermissionError(0, "it belongs to another user, or others may write to it")
        with tempfile.TemporaryFile(dir=folder):
            os.utime(folder)
    except OSError as error:
        tell_once(folder, error.strerror or type(error).__name__)
        return substitute(folder)
    return folder


def _is_own(folder: Path) -> bool:
    """Return whether a folder is this user's, and nobody else may write to it."""
    if os.name != "posix":
        return True
    status = folder.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_MAY_WRITE


def working_folder(shelf: Path, key: str, kept: int) -> Path:
    """Return a folder for work that can be resumed after a kill, safe from eviction while this process runs.

    Args:
        shelf: Folder of such folders.
        key: Name of this one.
        kept: Number of folders on the shelf beyond which the least recently used ones are removed.

    Raises:
        ResourceError: No space.
    """
    home = usable_folder(shelf)
    folder = home / key
    with space_errors(folder):
        while folder not in _IN_USE or not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
            _hold(folder)
        os.utime(folder)
    _make_room(home, folder, kept)
    return folder


def with_working_folders(shelf: Path, work: Callable[[], Result]) -> Result:
    """Do work in folders of a shelf, and once more in temporary ones if the cache has no room for it.

    Args:
        work: Calls `working_folder`.

    Raises:
        ResourceError: The folder of temporary files has no room either.
    """
    try:
        return work()
    except (ResourceError, FileNotFoundError) as error:
        if have_substitute(shelf):
            raise
        tell_once(shelf, str(error).rpartition(": ")[2])
        substitute(shelf)
        return work()


def _hold(folder: Path) -> None:
    """Take a shared lock on a folder, if the file system has such locks."""
    if os.name != "posix":
        _IN_USE[folder] = -1
        return
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # evicted meanwhile
        return
    with suppress(OSError):  # no such locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not folder.is_dir() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
        os.close(descriptor)
        return
    earlier = _IN_USE.pop(folder, None)
    if earlier is not None:
        os.close(earlier)
    _IN_USE[folder] = descriptor


def _make_room(home: Path, folder: Path, kept: int) -> None:
    """Remove the least recently used folders beyond `kept`, except those that a process uses."""
    ages = []
    for other in home.iterdir():
        try:
            if other != folder:
                ages.append((other.stat().st_mtime_ns, other))
        except FileNotFoundError:  # another process evicted it
            continue
    for _, old in sorted(ages)[: max(0, len(ages) - kept + 1)]:
        _evict(old)


def _evict(folder: Path) -> None:
    if os.name != "posix":
        return
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # it does not exist, or is another user's
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        evict = True
    except BlockingIOError:  # in use
        evict = False
    except OSError:  # no such locks
        evict = time.time() - os.fstat(descriptor).st_mtime > _UNUSED_SECONDS
    try:
        if evict:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
