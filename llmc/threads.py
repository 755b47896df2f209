"""One pool of threads for the process, as wide as the machine."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache


def spread(work: Sequence[Callable[[], None]]) -> None:
    """Do all of `work` on the pool; the first error ends it."""
    tasks: list[Future[None]] = [_workers().submit(item) for item in work]
    try:
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


@cache
def _workers() -> ThreadPoolExecutor:
    """The pool: however many matrices are asked for at once, no more threads than cores."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="llmc")
