"""Provide a folder for the temporary files of one process; the next process removes it after a kill."""

import atexit
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

#: A file in the folder of a process: the outputs that it began to change, one per line.
_OUTPUTS = "llmc-outputs"


def own_scratch(tidy: Callable[[Path], None]) -> None:
    """Put all temporary files of this process into one folder, and remove those of killed processes.

    Each process holds an `flock` on its folder, which ends with the process. Without a folder for temporary
    files or such locks, nothing changes.

    Args:
        tidy: Removes what was left beside an output that a killed process had begun to change.
    """
    if os.name != "posix":
        return
    import fcntl

    with suppress(OSError):
        prefix = f"llmc-{os.geteuid()}-"
        home = Path(tempfile.gettempdir())
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
        fcntl.flock(os.open(folder, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / _OUTPUTS).touch()
        tempfile.tempdir = str(folder)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for other in home.iterdir():
            if other.name.startswith(prefix) and other != folder:
                _sweep(other, tidy)


def record_output(output: Path) -> None:
    """Record that this process begins to change an output, for the process that cleans up after it."""
    listed = Path(tempfile.gettempdir()) / _OUTPUTS
    with suppress(OSError):
        status = listed.stat(follow_symlinks=False)
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
            with listed.open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{output.resolve()}\n")


def _sweep(folder: Path, tidy: Callable[[Path], None]) -> None:
    """Remove the folder of a process of this user, if no process holds it."""
    import fcntl

    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            if os.fstat(descriptor).st_uid == os.geteuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for output in _outputs(folder):
                    tidy(output)
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _outputs(folder: Path) -> list[Path]:
    listed = folder / _OUTPUTS
    if not listed.is_file():
        return []
    return [Path(line) for line in listed.read_text("utf-8", "surrogateescape").splitlines()]
