"""One build at a time for one output."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmc.errors import ConfigError


@contextmanager
def output_lock(lock: Path, output: Path) -> Iterator[None]:
    """Hold `lock` while `output` is being built.

    The operating system drops an `flock` when its process ends, so that the lock file of a killed
    build is no obstacle. The file is removed at the end; whoever opened it meanwhile notices that
    it is gone and takes a new one.

    Raises:
        ConfigError: Another process, named by its id, is building the same output.
    """
    descriptor = _acquire(lock, output)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(lock: Path, output: Path) -> int:
    import fcntl

    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ConfigError(
                f"output directory {output} is in use by another build (process {holder})",
                hint="wait until it is done, or choose another output",
            ) from error
        if _is_current(descriptor, lock):
            return descriptor
        os.close(descriptor)


def _is_current(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except FileNotFoundError:
        return False
