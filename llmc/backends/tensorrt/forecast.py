"""Forecast the performance of an engine on a profile's hardware with the roofline model."""

import numpy as np

from llmc.artifact.forecast import Forecast
from llmc.artifact.manifest import WeightRecord
from llmc.config import Engine, WeightFormat, WeightRole
from llmc.graph.interface import Interface
from llmc.profile import Profile


def forecast(
    interface: Interface,
    weights: tuple[WeightRecord, ...],
    engine: Engine,
    profile: Profile,
    scratch_bytes: int,
) -> Forecast:
    """Compute bounds for one row at the engine's full KV cache, and the largest batch and context that fit.

    A step does not read an embedding table that is only looked up; the table counts only for memory. The
    scratch memory is the engine's own for its largest batch.
    """
    stored = sum(w.bytes for w in weights)
    streamed = [w for w in weights if w.role is not WeightRole.EMBEDDING]
    weight_bytes = sum(w.bytes for w in streamed)
    operations = 2 * sum(int(np.prod(w.shape, dtype=np.int64)) for w in streamed)
    kv = _kv_bytes(interface)
    batch = context = rate = first = None
    if profile.memory_gib is not None:
        room = max(0, int(profile.memory_gib * 1e9) - stored - scratch_bytes)  # printed in GB
        batch, context = room // (kv * engine.kv_capacity), room // kv
    if profile.bandwidth_gbs is not None:
        bandwidth = profile.bandwidth_gbs * 1e9
        rate = bandwidth / (weight_bytes + kv * engine.kv_capacity)
        peak = _peak_rate(engine, profile)
        if peak is not None:
            compute = operations * engine.prefill.typical / (peak * 1e12)
            first = 1e3 * max(weight_bytes / bandwidth, compute)
    return Forecast(
        profile=profile.name,
        weight_bytes=weight_bytes,
        kv_bytes=kv,
        largest_batch=batch,
        largest_context=context,
        tokens_per_s=rate,
        prompt_tokens=engine.prefill.typical,
        ttft_ms=first,
    )


def _peak_rate(engine: Engine, profile: Profile) -> float | None:
    """Return dense TFLOP/s of the fastest type used by products; None if one of them is not stated."""
    dense = profile.dense
    by_type = {WeightFormat.INT8: dense.int8, WeightFormat.FP8: dense.fp8, WeightFormat.NVFP4: dense.fp4}
    schemes = [rule.scheme for rule in engine.weights if rule.scheme is not None]
    rates = [dense.fp16, *(by_type[s.format] for s in schemes if s.activations != "float")]
    stated = [rate for rate in rates if rate is not None]
    return max(stated) if len(stated) == len(rates) else None


def _kv_bytes(interface: Interface) -> int:
    """Return the bytes of one token's keys and values in all layers; windows do not shrink a static cache."""
    sizes = {spec.name: np.dtype(spec.dtype).itemsize for spec in interface.inputs}
    return sum(
        slot.kv_heads * (slot.key_width * sizes[slot.past_key] + slot.value_width * sizes[slot.past_value])
        for slot in interface.cache
    )
