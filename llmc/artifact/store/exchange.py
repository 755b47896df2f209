"""Replace a folder by a finished one atomically, if the file system supports that."""

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
#: Errors of file systems and kernels that cannot exchange names.
_NOT_THERE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def put_in_place(new: Path, place: Path, aside: Path) -> None:
    """Rename the folder `new` to `place`.

    What was at `place` is at `new` or `aside` afterwards. On Linux one call exchanges both names, so that
    there is always a complete folder at `place`; where that is not possible two calls do, and a failure
    between them undoes the first.

    Args:
        aside: An unused name on the same file system.
    """
    if not place.exists():
        new.rename(place)
    elif not _exchange(new, place):
        place.rename(aside)
        try:
            new.rename(place)
        except BaseException:
            aside.rename(place)
            raise


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names by renameat2(2); return False if the system lacks the call."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_THERE:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))
