"""Load an engine onto its GPU, and require that it is the engine that was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.backends.tensorrt.choice import engine_outputs
from llmc.backends.tensorrt.log import BuildLog
from llmc.backends.tensorrt.plan_file import PlanFile, open_reader
from llmc.errors import ConfigError, ParityError, ResourceError
from llmc.graph.interface import Interface, TensorSpec

#: TensorRT's names of the types of inputs and outputs.
TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int32": "INT32",
    "int64": "INT64",
}
#: What TensorRT says of an engine that it refuses, and the way out.
_INVALID = {
    "VERSION_MISMATCH": ("another release built it", "install that release, or build the artifact again"),
    "UNSUPPORTED_CC": ("it has no kernels for this GPU", "CUDA_VISIBLE_DEVICES names the GPU to use"),
    "OLD_CUDA_DRIVER": ("NVIDIA's driver is too old for it", "install a newer driver"),
    "OLD_CUDA_RUNTIME": ("the CUDA runtime is too old for it", "install a newer release of the library"),
    "INSUFFICIENT_GPU_MEMORY": ("this GPU has too little memory for it", "build it for fewer rows or slots"),
    "MALFORMED_ENGINE": ("the file is damaged", "llmc verify tells which files are"),
}


def load_engine(trt: Any, runtime: Any, path: Path, log: BuildLog) -> Any:
    """Load the engine in a file onto the device.

    Raises:
        ConfigError: The file does not exist.
        ResourceError: It cannot be read, or TensorRT cannot load it; the error quotes the reason.
    """
    if not path.is_file():
        raise ConfigError(f"the engine {path} is missing", hint="build the artifact again")
    try:
        with open(path, "rb", buffering=0) as opened:
            file = PlanFile(opened)
            _require_valid(trt, runtime, path, file)
            engine = log.attempt(runtime.deserialize_cuda_engine, open_reader(trt, file))
    except OSError as error:
        raise ResourceError(f"{path.name} cannot be read: {error.strerror}") from error
    if engine is None:
        reason = log.reason() if file.error is None else str(file.error.strerror)
        raise ResourceError(
            f"TensorRT cannot load {path.name}: {reason}",
            hint="llmc verify checks whether the file is the engine that was built",
        )
    return engine


def _require_valid(trt: Any, runtime: Any, path: Path, file: PlanFile) -> None:
    """Refuse an engine that TensorRT would, by the header of its file, if the library can tell from it."""
    if not hasattr(runtime, "get_engine_validity"):
        return
    _, found = runtime.get_engine_validity(file.read(runtime.engine_header_size, 0))
    file.seek(0, trt.SeekPosition.SET)
    for name, (fact, hint) in _INVALID.items():
        if int(found) & int(getattr(trt.EngineInvalidityDiagnostics, name)):
            raise ResourceError(f"TensorRT does not accept {path.name}: {fact}", hint=hint)


def require_signature(trt: Any, engine: Any, interface: Interface) -> None:
    """Require the interface's inputs and outputs of an engine, and one place for its cache.

    Raises:
        ParityError: A name, type or shape differs, or a present is not written to its past's place.
    """
    modes = (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for mode, specs in zip(modes, (interface.inputs, engine_outputs(interface)), strict=True):
        names_of_mode = {name for name in names if engine.get_tensor_mode(name) == mode}
        if strange := names_of_mode ^ {spec.name for spec in specs}:
            kind = mode.name.lower()
            raise ParityError(
                f"the {kind}s of engine and interface differ in {', '.join(sorted(strange))}",
                hint="build the artifact again",
            )
        for spec in specs:
            dtype, shape = engine.get_tensor_dtype(spec.name), tuple(engine.get_tensor_shape(spec.name))
            stated = tuple(size if isinstance(size, int) else -1 for size in spec.shape)
            if dtype.name != TYPES[spec.dtype] or shape != stated:
                raise ParityError(
                    f"{spec.name} of the engine is {dtype.name} {list(shape)}, but the interface says "
                    f"{TYPES[spec.dtype]} {list(stated)}"
                )
    for slot in interface.cache:
        for past, present in slot.pairs:
            if (place := engine.get_aliased_input_tensor(present)) != past:
                raise ParityError(
                    f"the engine writes {present} to {place or 'a place of its own'}, not {past}"
                )


def sized(spec: TensorSpec, batch: int, sequence: int) -> tuple[int, ...]:
    """Return the shape of an input or output in numbers."""
    named = {"batch": batch, "sequence": sequence}
    return tuple(size if isinstance(size, int) else named[size] for size in spec.shape)
