"""Execute an engine with TensorRT on its GPU: prefill and decode over one static KV cache.

Each optimization profile has its own execution context over the engine's single copy of the weights. A
layer's cache is in device memory once: past and present are bound to the same address, where the engine
writes the new slots. A decode step is one launch of a CUDA graph if possible: TensorRT-RTX captures it by
itself, for TensorRT the step is captured from the stream.

Written for the Python interface of TensorRT-RTX 1.7, which TensorRT shares. This module has not run on a GPU
yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.artifact.engine import EngineRecord
from llmc.backends.tensorrt.cuda import CapturedGraph, DeviceBuffer, Stream
from llmc.backends.tensorrt.engine import load_library
from llmc.backends.tensorrt.log import BuildLog, make_logger
from llmc.backends.tensorrt.support import Library, sm_of
from llmc.errors import ConfigError, ParityError, ResourceError
from llmc.gpu import selecting_hint
from llmc.graph.interface import TOKEN_COUNTS, WRITE_INDICES, Interface, TensorSpec
from llmc.runtime.static_session import StaticSession

#: TensorRT's names of the types of inputs and outputs.
_TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
}


@dataclass(frozen=True)
class _Phase:
    """An optimization profile ready to run: its execution context, on a stream that outlives it."""

    name: str
    context: Any
    stream: Stream


class EngineSession(StaticSession):
    """A TensorRT engine with the KV cache of one batch.

    Args:
        folder: The artifact.
        record: Record of the engine; its file exists, and the host has its GPU and version.
        interface: Inputs and outputs of the graph that the engine is built from.

    Afterwards `notes` has a sentence for everything that is slower than possible, and `where` mentions it.

    Raises:
        ConfigError: The record or the file is not that of a built engine.
        ResourceError: TensorRT, cuda-bindings, the driver, the GPU or memory is missing, or TensorRT cannot
            load the engine.
        ParityError: Its inputs and outputs differ from the interface.
    """

    def __init__(self, folder: Path, record: EngineRecord, interface: Interface) -> None:
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
        require_device(self._stream, record)
        where = f"{self._library.value} {trt.__version__} on {self._stream.device}"
        super().__init__(interface, where, most=most)
        self._log = BuildLog()
        self._runtime = trt.Runtime(make_logger(trt, self._log))
        self._engine = load_engine(self._runtime, folder / str(record.file), self._log)
        require_signature(trt, self._engine, interface)
        self._prefill, self._decode = (
            _Phase(phase.name, self._open_context(trt, index), self._stream)
            for index, phase in enumerate((prefill, decode))
        )
        self._specs = {spec.name: spec for spec in (*interface.inputs, *interface.outputs)}
        self._buffers: dict[str, DeviceBuffer] = {}
        self._batch = 0
        self._graph: CapturedGraph | None = None
        self._captures = self._library is Library.TENSORRT

    def _open_context(self, trt: Any, index: int) -> Any:
        """Create an execution context for profile `index`, with memory for only that profile."""
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if self._library is Library.RTX:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if index:
                capture = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                config.cuda_graph_strategy = capture
                if config.cuda_graph_strategy != capture:
                    self._without_graph("TensorRT-RTX does not accept that strategy")
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(index, self._stream.handle):
            raise ResourceError(
                f"TensorRT cannot prepare the engine's optimization profile {index}: {self._log.reason()}",
                hint="if memory is short, free some on the GPU or build with a smaller batch or prefill",
            )
        self._stream.synchronize()
        return context

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
                _require(phase.context.set_tensor_address(name, buffer.address), name, "address", self._log)
            for spec in self.interface.inputs:
                if spec.name != "input_ids":
                    self._shape(phase, spec.name, sized(spec, batch, 1))
        self._shape(self._decode, "input_ids", (batch, 1))
        self._batch = batch

    def _run(self, input_ids: Array, written: Array, real: Array) -> Array:
        batch, sequence = input_ids.shape
        if batch != self._batch:
            raise ConfigError(f"the cache has {self._batch} rows, but {batch} were given")
        feeds = {"input_ids": input_ids, WRITE_INDICES: written, TOKEN_COUNTS: real}
        for name in feeds.keys() & self._specs.keys():
            self._stream.write(self._buffers[name], np.ascontiguousarray(feeds[name], np.int64))
        phase = self._decode if sequence == 1 else self._prefill
        if phase is self._prefill:
            self._require_length(sequence)
            self._shape(phase, "input_ids", (batch, sequence))
        if phase is self._decode and self._graph is not None:
            self._stream.launch(self._graph)
        else:
            self._enqueue(phase, input_ids.shape)
        logits = self._read_logits(phase, batch, sequence)
        if phase is self._decode and self._captures and self._graph is None:
            self._capture()
        return logits

    def _require_length(self, sequence: int) -> None:
        if sequence < self._least:
            raise ConfigError(
                f"the engine's prefill needs at least {self._least} tokens, but {sequence} are left to run",
                hint="copy the target, set prefill.least to 1, and build again",
            )

    def _enqueue(self, phase: _Phase, shape: tuple[int, ...]) -> None:
        if not phase.context.execute_async_v3(phase.stream.handle):
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

    def _read_logits(self, phase: _Phase, batch: int, sequence: int) -> Array:
        spec = self._specs["logits"]
        expected = sized(spec, batch, sequence)
        actual = tuple(phase.context.get_tensor_shape("logits"))
        if actual != expected:
            raise ParityError(f"output logits has shape {list(actual)}, but it must be {list(expected)}")
        values = self._stream.read(self._buffers["logits"], expected, _dtype(spec))
        return values.astype(np.float32, copy=False)

    def _shape(self, phase: _Phase, name: str, shape: tuple[int, ...]) -> None:
        accepted = phase.context.set_input_shape(name, shape)
        _require(accepted, name, f"shape {list(shape)} in {phase.name}", self._log)


def sized(spec: TensorSpec, batch: int, sequence: int) -> tuple[int, ...]:
    """Return the shape of an input or output in numbers."""
    named = {"batch": batch, "sequence": sequence}
    return tuple(size if isinstance(size, int) else named[size] for size in spec.shape)


def require_device(stream: Stream, record: EngineRecord) -> None:
    """Require that the first CUDA device is one that the engine is for.

    Raises:
        ResourceError: It is not.
    """
    own = sm_of(stream.capability)
    if own not in record.sms:
        raise ResourceError(
            f"CUDA's first device is {stream.device} ({own}), but {record.file} is for "
            f"{', '.join(record.sms)}",
            hint=selecting_hint(lambda gpu: sm_of(gpu.capability) in record.sms)
            or "CUDA_VISIBLE_DEVICES names the GPU to use, by its UUID from nvidia-smi -L",
        )


def load_engine(runtime: Any, path: Path, log: BuildLog) -> Any:
    """Load the engine in a file onto the device.

    Raises:
        ConfigError: There is no such file.
        ResourceError: TensorRT cannot load it; the error quotes the reason.
    """
    if not path.is_file():
        raise ConfigError(f"there is no engine {path}", hint="build the artifact again")
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ResourceError(
            f"TensorRT cannot load {path.name}: {log.reason()}",
            hint="llmc verify checks whether the file is the one that was built",
        )
    return engine


def require_signature(trt: Any, engine: Any, interface: Interface) -> None:
    """Require the interface's inputs and outputs of an engine, and one place for its cache.

    Raises:
        ParityError: A name, type or shape differs, or a present is not written to its past's place.
    """
    modes = (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for mode, specs in zip(modes, (interface.inputs, interface.outputs), strict=True):
        names_of_mode = {name for name in names if engine.get_tensor_mode(name) == mode}
        if strange := names_of_mode ^ {spec.name for spec in specs}:
            kind = mode.name.lower()
            raise ParityError(f"the {kind}s of engine and interface differ in {', '.join(sorted(strange))}")
        for spec in specs:
            dtype, shape = engine.get_tensor_dtype(spec.name), tuple(engine.get_tensor_shape(spec.name))
            stated = tuple(size if isinstance(size, int) else -1 for size in spec.shape)
            if dtype.name != _TYPES[spec.dtype] or shape != stated:
                raise ParityError(
                    f"{spec.name} of the engine is {dtype.name} {list(shape)}, but the interface says "
                    f"{_TYPES[spec.dtype]} {list(stated)}"
                )
    for slot in interface.cache:
        for past, present in slot.pairs:
            if (place := engine.get_aliased_input_tensor(present)) != past:
                raise ParityError(
                    f"the engine writes {present} to {place or 'a place of its own'}, not {past}"
                )


def _require(accepted: bool, name: str, what: str, log: BuildLog) -> None:
    if not accepted:
        raise ParityError(f"TensorRT does not accept the {what} of {name}: {log.reason()}")


def _dtype(spec: TensorSpec) -> np.dtype[Any]:
    return ir.DataType[spec.dtype.upper()].numpy()
