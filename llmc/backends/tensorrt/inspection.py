"""Inspect an engine right after it is built: its layers, and the memory of its optimization profiles.

The log of the build says both, without a GPU. TensorRT builds on the GPU itself and words its log differently
from release to release; where its layers are not understood, the engine is loaded for TensorRT's inspector.
If that is not understood either, the engine is kept and in doubt: it may have taken an hour, `llmc verify`
measures its numbers and `llmc bench` its speed. TensorRT-RTX builds within minutes and without a GPU: there
it is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.backends.tensorrt.layers import Layer, UnreadableLayersError, read_inspection, read_listing
from llmc.backends.tensorrt.log import BuildLog, make_logger
from llmc.backends.tensorrt.support import Library


@dataclass(frozen=True)
class EngineFacts:
    """The facts that are known of a built engine.

    Args:
        layers: Its layers; None if they could not be read.
        scratch: Scratch memory of each optimization profile; None where nothing states it.
        obstacle: Why the layers could not be read.
    """

    layers: list[Layer] | None
    scratch: tuple[int | None, ...]
    obstacle: str | None = None


def inspect_build(trt: Any, library: Library, plan: Any, log: BuildLog, profiles: int) -> EngineFacts:
    """Inspect an engine that was just built.

    Args:
        plan: The serialized engine.
        log: Log of the build.
        profiles: Number of its optimization profiles.

    Raises:
        UnreadableLayersError: TensorRT-RTX lists its layers in an unknown form.
    """
    stated = tuple(log.scratch) if len(log.scratch) == profiles else (None,) * profiles
    try:
        return EngineFacts(read_listing(log.lines), stated)
    except UnreadableLayersError:
        if library is Library.RTX:
            raise
    runtime = trt.Runtime(make_logger(trt, log))
    engine = log.attempt(runtime.deserialize_cuda_engine, plan)
    if engine is None:
        return EngineFacts(None, stated, f"TensorRT cannot load the engine again: {log.reason()}")
    measured = tuple(engine.get_device_memory_size_for_profile_v2(index) for index in range(profiles))
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return EngineFacts(read_inspection(text), measured)
    except UnreadableLayersError as error:
        return EngineFacts(None, measured, error.fact)
