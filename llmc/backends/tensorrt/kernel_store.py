"""Keep the kernels that TensorRT-RTX compiles for an engine, so that the next session need not compile them.

An engine of TensorRT-RTX has kernels in an intermediate form, which its runtime compiles for the GPU and the
shapes at hand. Its runtime cache has the results. TensorRT-RTX itself refuses a cache that does not fit the
driver or the GPU; the key only keeps caches of several machines apart.
"""

from __future__ import annotations

import hashlib

from llmc.artifact.store.cache import StageCache, content_key, default_cache_folder

#: Size of all kept caches together.
_KEPT_BYTES = 512 << 20


class KernelStore:
    """The kept kernels of an engine on a GPU.

    Args:
        engine: sha256 of the engine.
        machine: What else the kernels depend on: GPU, driver, library.
    """

    def __init__(self, engine: str, **machine: str) -> None:
        self._cache = StageCache(default_cache_folder() / "engine-kernels", _KEPT_BYTES)
        self._key = content_key("engine-kernels", {"engine": engine, **machine})
        self._kept = ""

    def load(self) -> bytes | None:
        """Return what was saved last; None if nothing was, or if it is damaged."""
        data = self._cache.get(self._key)
        self._kept = "" if data is None else hashlib.sha256(data).hexdigest()
        return data

    def save(self, data: bytes) -> None:
        """Keep `data` for the next session, unless it is what was loaded."""
        if hashlib.sha256(data).hexdigest() != self._kept:
            self._cache.put(self._key, data)
