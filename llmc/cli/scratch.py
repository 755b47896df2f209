"""A folder for the temporary files of one process, which the next one removes where a process was killed."""

import atexit
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path


def own_scratch() -> None:
    """Have all temporary files of this process in one folder, and remove those of processes that were killed.

    Each process holds an `flock` on its folder, which ends with it. Where there are no temporary files or no
    such locks, nothing changes.
    """
    import fcntl

    with suppress(OSError):
        prefix = f"llmc-{os.geteuid()}-"
        home = Path(tempfile.gettempdir())
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
        fcntl.flock(os.open(folder, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_EX | fcntl.LOCK_NB)
        tempfile.tempdir = str(folder)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for other in home.iterdir():
            if other.name.startswith(prefix) and other != folder:
                _sweep(other)


def _sweep(folder: Path) -> None:
    """Remove a folder of this user if no process holds it."""
    import fcntl

    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            if os.fstat(descriptor).st_uid == os.geteuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
