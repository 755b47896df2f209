"""Allow one process at a time for one output.

The lock is an `flock` on a file beside the output: the operating system releases it when its process ends. If
the file system has no such locks (some kinds of NFS, Lustre and FUSE), the file itself is the lock: it is
created exclusively, and contains the name of the host and the id of the process, by which a stale lock is
recognized.
"""

import errno
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmc.errors import ConfigError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_MOST_BYTES = 512
_HOLDER = re.compile(rb"llmc process (\d+) on (\S+)\n")


@contextmanager
def output_lock(lock: Path, output: Path) -> Iterator[None]:
    """Hold `lock` while `output` is being changed, and remove the file at the end.

    A file that llmc did not write is left unchanged, and no link is followed.

    Raises:
        ConfigError: Another process, named by its id, uses the output; `lock` is not a lock file; or its
            folder takes no new files.
    """
    descriptor = _acquire(lock, output)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(lock: Path, output: Path) -> int:
    while True:
        descriptor, created = _open(lock)
        try:
            if _hold(descriptor, lock, output, created=created) and _is_current(descriptor, lock):
                _sign(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(lock: Path) -> tuple[int, bool]:
    """Return a descriptor of the lock file, and whether this process created it."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    while True:
        try:
            return os.open(lock, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            pass
        except FileNotFoundError as error:  # the kernel's own file systems, such as /proc
            raise ConfigError(
                f"{lock.parent} takes no new files", hint="choose a folder on another file system"
            ) from error
        try:
            descriptor = os.open(lock, flags)
        except FileNotFoundError:  # its holder removed it meanwhile
            continue
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
                raise
            raise _foreign(lock) from error
        status = os.fstat(descriptor)
        text = os.pread(descriptor, _MOST_BYTES, 0) if stat.S_ISREG(status.st_mode) else b"?"
        if status.st_nlink > 1 or (text and not _HOLDER.fullmatch(text)):
            os.close(descriptor)
            raise _foreign(lock)
        return descriptor, False


def _foreign(lock: Path) -> ConfigError:
    return ConfigError(
        f"{lock} is in the place of a lock file, but llmc did not write it", hint="move it elsewhere"
    )


def _hold(descriptor: int, lock: Path, output: Path, *, created: bool) -> bool:
    """Take the lock; return False if it was stale and is now removed, so that another attempt can succeed.

    Raises:
        ConfigError: Another process holds it.
    """
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_use(output, _holder(descriptor)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return created or _take_over(descriptor, lock, output)
    return True


def _take_over(descriptor: int, lock: Path, output: Path) -> bool:
    """Remove the lock file of a process of this host that has ended.

    Raises:
        ConfigError: Its process runs, or cannot be checked because it is on another host.
    """
    holder = _holder(descriptor)
    if holder is None or holder[1] != _host() or _runs(holder[0]):
        raise _in_use(output, holder, f"; if that process has ended, remove {lock}")
    if _is_current(descriptor, lock):
        lock.unlink(missing_ok=True)
    return False


def _in_use(output: Path, holder: tuple[int, str] | None, more: str = "") -> ConfigError:
    who = "unknown" if holder is None else str(holder[0])
    if holder is not None and holder[1] != _host():
        who += f" on {holder[1]}"
    return ConfigError(
        f"output {output} is in use by another run of llmc (process {who})",
        hint=f"wait until it is done, or choose another output{more}",
    )


def _holder(descriptor: int) -> tuple[int, str] | None:
    """Return process and host that the file names; None if it was not signed yet."""
    match = _HOLDER.fullmatch(os.pread(descriptor, _MOST_BYTES, 0))
    return None if match is None else (int(match[1]), match[2].decode(errors="replace"))


def _sign(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"llmc process {os.getpid()} on {_host()}\n".encode(), 0)


def _host() -> str:
    return re.sub(r"\s", "_", socket.gethostname()) or "unnamed"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's
        return True
    return True


def _is_current(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock, follow_symlinks=False))
    except FileNotFoundError:
        return False
