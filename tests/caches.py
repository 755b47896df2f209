"""A cache of each test's own, which shares entries that depend on nothing but their key with all tests.

A trace is keyed by the model's configuration and the code that traced it, the answers of a tokenizer by its
files and the question, a compiled library by its sources and the compiler. Each costs seconds, and the tests
of one run share them. Answers of models stay with a test.
"""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.artifact.store.cache import StageCache
from llmc.config import Dtype

if TYPE_CHECKING:
    from llmc.graph.model import Graph

#: The variable that names the folder that the tests of one run share, in every process of it.
SHARED = "LLMC_SHARED_TESTS"
_PARTS = ("traces", "tokenizers", "libraries")


def share() -> tempfile.TemporaryDirectory[str] | None:
    """Make the folder that the tests of a run share, and tell later processes its name; None if told.

    Tests that name no cache of their own use one in it, and never the user's.
    """
    if SHARED in os.environ:
        return None
    folder = tempfile.TemporaryDirectory(prefix="llmc-tests-")
    os.environ[SHARED] = folder.name
    for part in _PARTS:
        (Path(folder.name) / part).mkdir()
    os.environ["LLMC_CACHE"] = own_cache(Path(folder.name) / "cache")
    return folder


def own_cache(folder: Path) -> str:
    """Make `folder`, to be named by LLMC_CACHE, with the shared parts linked into it; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in _PARTS:
        if not (folder / part).exists():
            (folder / part).symlink_to(Path(os.environ[SHARED]) / part)
    return str(folder)


def shared_trace(config: object, dtype: Dtype) -> bytes:
    """Return the serialized trace of a configuration, traced once in a run."""
    from llmc.graph.serial import dump_graph
    from llmc.pipeline.steps.compile import trace_key
    from llmc.trace import trace_model

    cache, key = StageCache(Path(os.environ[SHARED]) / "traces"), trace_key(config, dtype)
    data = cache.get(key)
    if data is None:
        data = dump_graph(trace_model(config, dtype))
        cache.put(key, data)
    return data


def traced_graph(config: object, dtype: Dtype) -> "Graph":
    """Return the graph of a configuration from `shared_trace`."""
    from llmc.graph.serial import load_graph

    return load_graph(shared_trace(config, dtype))
