"""Check whether the original is the model that transformers loads: compare its loader with llmc's reader.

Everything else in the gate starts from what llmc reads, on both sides; a reading error would cancel out.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

from llmc.artifact.provenance import code_digest
from llmc.artifact.store.cache import StageCache, content_key, default_cache_folder
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Metric
from llmc.machine import release_memory
from llmc.memory import available_memory
from llmc.progress import Progress
from llmc.validate.measure import measured, unmeasured

if TYPE_CHECKING:
    from llmc.checkpoint import Checkpoint
    from llmc.checkpoint.agreement import Agreement

_CACHE_BYTES = 1 << 24
_WHERE = "transformers' from_pretrained, from the files"


def measure_loaders(checkpoint: Checkpoint, model_digest: str, progress: Progress) -> Measurement:
    """Count the parameters to which transformers' own loader gives another value than llmc's reader.

    The metric is not applicable if transformers cannot load the checkpoint, or if its model does not fit in
    half of the free memory. A comparison is cached by everything that it depends on.

    Args:
        model_digest: Digest of the checkpoint.
    """
    free, needed = available_memory(), checkpoint.reference_bytes()
    with progress.stage("original by transformers' loader"):
        agreement = _recall(checkpoint, model_digest, fits=free is None or needed <= free // 2)
    release_memory()
    if agreement is None:
        why = f"{2 * needed / 1e9:.1f} GB needed, {(free or 0) / 1e9:.1f} GB free"
    elif not agreement.compared and not agreement.mismatches:
        why = agreement.left_out
    else:
        detail = "; ".join(agreement.mismatches) or f"{agreement.compared} parameters are equal"
        if agreement.left_out:
            detail += f"; {agreement.left_out}, which are not compared"
        return measured(Metric.ORIGINAL, float(len(agreement.mismatches)), detail, _WHERE)
    detail = f"not compared with transformers' own loader: {why}"
    return unmeasured(Metric.ORIGINAL, MeasurementStatus.NOT_APPLICABLE, detail, _WHERE)


def _recall(checkpoint: Checkpoint, model_digest: str, *, fits: bool) -> Agreement | None:
    """Return the comparison from the cache, or compare now if it `fits`."""
    from llmc.checkpoint.agreement import Agreement

    facts = {
        "model": model_digest,
        "reader": code_digest("llmc.checkpoint"),
        **{name: version(name) for name in ("torch", "transformers", "safetensors", "gguf")},
    }
    cache = StageCache(default_cache_folder() / "loaders", _CACHE_BYTES)
    key = content_key("loaders", facts)
    cached = cache.get(key)
    if cached is not None:
        stored = json.loads(cached)
        return Agreement(tuple(stored["mismatches"]), stored["compared"], stored["left_out"])
    if not fits:
        return None
    agreement = checkpoint.compare_loaders()
    if agreement.compared:
        cache.put(key, json.dumps(asdict(agreement)).encode())
    return agreement
