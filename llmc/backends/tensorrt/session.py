"""Execute an engine with TensorRT on its GPU: prefill and decode over one static KV cache.

Each optimization profile has its own execution context over the engine's single copy of the weights. A
layer's cache is in device memory once: past and present are bound to the same address, where the engine
writes the new slots. A decode step is one launch of a CUDA graph if possible: TensorRT-RTX captures it by
itself, for TensorRT the step is captured from the stream.

TensorRT-RTX compiles kernels for each new shape. By default it runs slower ones until those are ready, so
that `llmc run` answers at once; a session that is measured waits for them (`eager`). What it has compiled is
kept for the next session.

Written for the Python interface of TensorRT-RTX 1.7, which TensorRT shares. This module has not run on a GPU
yet.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.artifact.engine import EngineRecord
from llmc.backends.tensorrt.choice import engine_outputs
from llmc.backends.tensorrt.cuda import CapturedGraph, DeviceBuffer, Stream
from llmc.backends.tensorrt.device import require_device
from llmc.backends.tensorrt.engine import load_library
from llmc.backends.tensorrt.kernel_store import KernelStore
from llmc.backends.tensorrt.loading import load_engine, require_signature, sized
from llmc.backends.tensorrt.log import BuildLog, make_logger
from llmc.backends.tensorrt.support import Library
from llmc.errors import ConfigError, ParityError, ResourceError
from llmc.graph.interface import TOKEN_COUNTS, WRITE_INDICES, Interface, TensorSpec
from llmc.runtime.choice import CHOICE
from llmc.runtime.static_session import StaticSession


@dataclass(frozen=True)
class _Phase:
    """An optimization profile ready to run: its execution context, and what outlives it."""

    name: str
    context: Any
    stream: Stream
    kernels: Any


class EngineSession(StaticSession):
    """A TensorRT engine with the KV cache of one batch.

    Args:
        folder: The artifact.
        record: Record of the engine; its file exists, and the host has its GPU and version.
        interface: Inputs and outputs of the graph that the engine is built from.
        digest: sha256 of the engine, under which compiled kernels are kept; None to keep none.
        eager: Whether steps wait until TensorRT-RTX has compiled the best kernels for their shape.

    Afterwards `notes` has a sentence for everything that is slower than possible, and `where` mentions it.

    Raises:
        ConfigError: The record does not describe a built engine, or the file is missing.
        ResourceError: TensorRT, cuda-bindings, the driver, the GPU or memory is missing, or TensorRT cannot
            load the engine.
        ParityError: Its inputs and outputs differ from the interface.
    """

    def __init__(
        self,
        folder: Path,
        record: EngineRecord,
        interface: Interface,
        *,
        digest: str | None = None,
        eager: bool = False,
    ) -> None:
        self._library = Library(record.library)
        trt = load_library(self._library)
        if len(record.phases) != 2:
            raise ConfigError(
                f"{record.file} is recorded with {len(record.phases)} optimization profiles, not two",
                hint="build the artifact again",
            )
        prefill, decode = record.phases
        (fewest, self._least), _, (rows, most) = prefill.shapes["input_ids"]
        self._batches = range(fewest, rows + 1)
        self.notes: list[str] = []
        self._stream = Stream()
        require_device(self._stream.device, self._stream.capability, record.sms, str(record.file))
        where = f"{self._library.value} {trt.__version__} on {self._stream.device}"
        super().__init__(interface, where, most=most)
        self._log = BuildLog()
        self._runtime = trt.Runtime(make_logger(trt, self._log))
        self._engine = load_engine(trt, self._runtime, folder / str(record.file), self._log)
        require_signature(trt, self._engine, interface)
        self._kernels: Any = None
        self._store = None if digest is None else self._open_store(trt, digest)
        self._eager = eager
        self._prefill, self._decode = (
            _Phase(phase.name, self._open_context(trt, index), self._stream, self._kernels)
            for index, phase in enumerate((prefill, decode))
        )
        self._specs = {spec.name: spec for spec in (*interface.inputs, *engine_outputs(interface))}
        self._buffers: dict[str, DeviceBuffer] = {}
        self._batch = 0
        self._graph: CapturedGraph | None = None
        self._captures = self._library is Library.TENSORRT

    def _open_store(self, trt: Any, digest: str) -> KernelStore:
        return KernelStore(
            digest,
            device=self._stream.device,
            capability=self._stream.capability,
            driver=self._stream.driver,
            library=f"{self._library.value} {trt.__version__}",
        )

    def _open_context(self, trt: Any, index: int) -> Any:
        """Create an execution context for profile `index`, with memory for only that profile."""
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if self._library is Library.RTX:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            specialization = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = (
                specialization.EAGER if self._eager else specialization.LAZY
            )
            self._share_kernels(config)
            if index:
                capture = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                config.cuda_graph_strategy = capture
                if config.cuda_graph_strategy != capture:
                    self._without_graph("TensorRT-RTX does not accept that strategy")
            context = self._log.attempt(self._engine.create_execution_context, config)
        else:
            context = self._log.attempt(self._engine.create_execution_context, strategy)
        if context is not None:  # engines are built with detailed layers, which would be traced in every step
            context.nvtx_verbosity = trt.ProfilingVerbosity.NONE
        if context is None or not self._log.attempt(
            context.set_optimization_profile_async, index, self._stream.handle
        ):
            raise ResourceError(
                f"TensorRT cannot prepare the engine's optimization profile {index}: {self._log.reason()}",
                hint="if memory is short, free some on the GPU or build with a smaller batch or prefill",
            )
        self._stream.synchronize()
        return context

    def _share_kernels(self, config: Any) -> None:
        """Have a context use this session's compiled kernels, which begin with those that were kept."""
        if self._kernels is None:
            cache = self._kernels = config.create_runtime_cache()
            kept = None if self._store is None else self._store.load()
            if kept is not None and not self._log.attempt(cache.deserialize, kept):
                self.notes.append(
                    f"kernels that were compiled earlier are compiled again: {self._log.reason()}"
                )
            if self._store is not None:
                weakref.finalize(self, _save_kernels, self._store, cache)
        if not self._log.attempt(config.set_runtime_cache, self._kernels):
            self.notes.append(f"compiled kernels are not kept: {self._log.reason()}")

    def _clear(self, batch: int) -> None:
        if batch not in self._batches:
            raise ConfigError(
                f"the engine runs {self._batches[0]} to {self._batches[-1]} rows at once, not {batch}",
                hint="copy the target, set another range of batch, and build again",
            )
        if batch != self._batch:
            self._bind(batch)
        for slot in self.interface.cache:
            for name in slot.pasts:
                self._stream.clear(self._buffers[name])

    def _bind(self, batch: int) -> None:
        """Allocate all buffers for `batch` rows, and bind them in both contexts."""
        self._batch, self._graph = 0, None
        self._buffers.clear()  # frees the bound buffers before new ones are allocated
        shared = {present: past for slot in self.interface.cache for past, present in slot.pairs}
        for name, spec in self._specs.items():
            if name not in shared:
                shape = sized(spec, batch, self._most)
                self._buffers[name] = DeviceBuffer(int(np.prod(shape)) * _dtype(spec).itemsize)
        for present, past in shared.items():
            self._buffers[present] = self._buffers[past]
        for phase in (self._prefill, self._decode):
            for name, buffer in self._buffers.items():
                accepted = self._log.attempt(phase.context.set_tensor_address, name, buffer.address)
                _require(accepted, name, "address", self._log)
            for spec in self.interface.inputs:
                if spec.name != "input_ids":
                    self._shape(phase, spec.name, sized(spec, batch, 1))
        self._shape(self._decode, "input_ids", (batch, 1))
        self._batch = batch

    def next_tokens(self, tokens: Array) -> Array:
        """Do what `StaticSession.next_tokens` does, with the output that the engine chooses on the GPU."""
        batch = len(tokens)
        self._require_slots(int(self._written.max()) + 1)
        chosen = self._step(CHOICE, tokens[:, None], self._written, np.ones(batch, np.int64))
        self._written = self._written + 1
        return chosen[:, -1, 0].astype(np.int64)

    def _run(self, input_ids: Array, written: Array, real: Array) -> Array:
        return self._step("logits", input_ids, written, real).astype(np.float32, copy=False)

    def _step(self, output: str, input_ids: Array, written: Array, real: Array) -> Array:
        """Run the engine once, and return one of its outputs."""
        phase = self._launch(input_ids, written, real)
        values = self._read(phase, output, *input_ids.shape)
        if phase is self._decode and self._captures and self._graph is None:
            self._capture()
        return values

    def _launch(self, input_ids: Array, written: Array, real: Array) -> _Phase:
        """Queue a run of the engine; return the phase whose outputs it fills."""
        batch, sequence = input_ids.shape
        if batch != self._batch:
            raise ConfigError(f"the cache has {self._batch} rows, but {batch} were given")
        feeds = {"input_ids": input_ids, WRITE_INDICES: written, TOKEN_COUNTS: real}
        for name in feeds.keys() & self._specs.keys():
            self._stream.write(self._buffers[name], np.ascontiguousarray(feeds[name], np.int64))
        if sequence > 1:
            self._require_length(sequence)
            self._shape(self._prefill, "input_ids", (batch, sequence))
            self._enqueue(self._prefill, input_ids.shape)
            return self._prefill
        if self._graph is not None:
            self._stream.launch(self._graph)
            return self._decode
        self._enqueue(self._decode, input_ids.shape)
        return self._decode

    def _require_length(self, sequence: int) -> None:
        if sequence < self._least:
            raise ConfigError(
                f"the engine's prefill needs at least {self._least} tokens, but {sequence} are left to run",
                hint="copy the target, set prefill.least to 1, and build again",
            )

    def _enqueue(self, phase: _Phase, shape: tuple[int, ...]) -> None:
        if not self._log.attempt(phase.context.execute_async_v3, phase.stream.handle):
            raise ParityError(
                f"TensorRT failed in {phase.name} at batch and sequence {shape}: {self._log.reason()}"
            )

    def _capture(self) -> None:
        """Capture the decode step of this batch as a graph for the next steps, after a step without."""
        step = (self._batch, 1)
        try:
            self._graph = self._stream.capture(lambda: self._enqueue(self._decode, step))
        except (ParityError, ResourceError) as error:
            self._captures = False
            self._without_graph(error.fact)

    def _without_graph(self, reason: str) -> None:
        self.where += ", decode without a CUDA graph"
        self.notes.append(f"decode runs without a CUDA graph: {reason}")

    def _read(self, phase: _Phase, name: str, batch: int, sequence: int) -> Array:
        """Wait for the run, and return an output of it."""
        spec = self._specs[name]
        expected = sized(spec, batch, sequence)
        actual = tuple(phase.context.get_tensor_shape(name))
        if actual != expected:
            raise ParityError(f"output {name} has shape {list(actual)}, but it must be {list(expected)}")
        return self._stream.read(self._buffers[name], expected, _dtype(spec))

    def _shape(self, phase: _Phase, name: str, shape: tuple[int, ...]) -> None:
        accepted = self._log.attempt(phase.context.set_input_shape, name, shape)
        _require(accepted, name, f"shape {list(shape)} in {phase.name}", self._log)


def _save_kernels(store: KernelStore, cache: Any) -> None:
    """Keep the kernels that a session compiled, once it ends."""
    data = cache.serialize()
    if data is not None:
        store.save(bytes(memoryview(data)))


def _require(accepted: bool, name: str, what: str, log: BuildLog) -> None:
    if not accepted:
        raise ParityError(f"TensorRT does not accept the {what} of {name}: {log.reason()}")


def _dtype(spec: TensorSpec) -> np.dtype[Any]:
    return ir.DataType[spec.dtype.upper()].numpy()
