"""Provide one pool of threads for the process, with a thread per core."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache


def spread(work: Sequence[Callable[[], None]]) -> None:
    """Run all of `work` on the pool; the first error ends it."""
    tasks: list[Future[None]] = [_workers().submit(item) for item in work]
    try:
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


@cache
def _workers() -> ThreadPoolExecutor:
    """Return the pool: however many matrices are requested at once, no more threads run than cores."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="llmc")
