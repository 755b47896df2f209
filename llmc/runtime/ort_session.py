"""Open sessions of onnxruntime on the CPU or on CUDA, and convert their errors to typed ones."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.artifact.manifest import MODEL
from llmc.config import Provider
from llmc.errors import ConfigError, LlmcError, ResourceError
from llmc.runtime.failures import failed_call, is_out_of_memory, typed_error
from llmc.runtime.libraries import CUDA_ENTRIES, CUDA_PROVIDER, load_onnxruntime, require_cuda

_PROVIDERS = {Provider.CPU: "CPUExecutionProvider", Provider.CUDA: CUDA_PROVIDER}
#: Severity from which on onnxruntime writes its log to stderr.
_ERRORS = 3
#: Value of `gpu_graph_id` with which onnxruntime neither captures nor launches a graph.
_NO_GRAPH = -1


@dataclass(frozen=True)
class OpenSession:
    """A session of onnxruntime and the device that its tensors are on.

    Args:
        ort: The module onnxruntime.
        session: Its `InferenceSession`.
        where: Version, provider and device.
        device: Name of the device as `OrtValue` takes it; its number is 0.
        graphs: Whether a step can be recorded as a CUDA graph.
    """

    ort: Any
    session: Any
    where: str
    device: str
    graphs: bool

    def value(self, array: Array) -> Any:
        """Return an `OrtValue` of `array` on the device; on the CPU it has no copy of its own.

        Raises:
            ResourceError: The device has not enough memory.
        """
        try:
            return self.ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)
        except Exception as error:
            raise typed_error(error, f"onnxruntime cannot allocate {array.nbytes:,} bytes") from error

    def run(self, binding: Any, step: str, graph: int = _NO_GRAPH) -> None:
        """Run the session once.

        Args:
            binding: Its `IOBinding`.
            step: Words that describe the step in an error.
            graph: Number of the CUDA graph to record at its first run, and to launch at the next ones.

        Raises:
            ResourceError: The device has not enough memory.
            ParityError: The run failed.
        """
        options = None
        if self.graphs:
            options = self.ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(graph))
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:
            raise typed_error(error, f"onnxruntime failed at {step}") from error


def open_session(
    folder: Path,
    threads: int | None,
    entries: Mapping[str, str] | None = None,
    *,
    edit: Callable[[Any], None] | None = None,
    profile: Path | None = None,
    arena: bool = True,
    provider: Provider = Provider.CPU,
    cuda_graph: bool = False,
) -> OpenSession:
    """Open a session of model.onnx.

    Args:
        entries: Further session configuration entries.
        edit: Changes the graph, an `onnx_ir.Model`, before it is loaded.
        profile: Prefix of the file in which onnxruntime records the time of each kernel.
        arena: Whether to keep freed memory of the CPU for the next step, which is faster for short steps.
        provider: The execution provider; nodes that CUDA has no kernel for run on the CPU.
        cuda_graph: Whether steps can be recorded as CUDA graphs.

    Raises:
        ConfigError: model.onnx is missing in `folder`.
        ResourceError: onnxruntime is not installed, CUDA or its libraries are missing, or the device has not
            enough memory.
        ParityError: onnxruntime cannot load the graph.
    """
    cuda = provider is Provider.CUDA
    ort = load_onnxruntime()
    path = folder / MODEL
    if not path.is_file():
        raise ConfigError(f"{folder} has no model.onnx", hint="give the directory of a built artifact")
    device = f", {require_cuda().name}" if cuda else ""
    ort.set_default_logger_severity(_ERRORS)
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS
    options.enable_cpu_mem_arena = arena
    for key, value in ((CUDA_ENTRIES if cuda else {}) | dict(entries or {})).items():
        options.add_session_config_entry(key, value)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if threads is not None:
        options.intra_op_num_threads = threads
    library = custom_operators(folder)
    settings = {"device_id": "0", "enable_cuda_graph": str(int(cuda_graph))} if cuda else {}
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        source = str(path) if edit is None else _edited(path, edit, options)
        session = create_session(ort, source, options, provider, settings)
    except LlmcError:
        raise
    except Exception as error:
        fact = f"onnxruntime {ort.__version__} cannot load {path}"
        failed = failed_call(error)
        if failed is not None and not is_out_of_memory(error):
            hint = "llmc doctor tries what a GPU needs"
            raise ResourceError(f"{fact}: {failed}", hint=hint) from error
        raise typed_error(error, fact) from error
    where = f"onnxruntime {ort.__version__} {_PROVIDERS[provider]}{device}"
    return OpenSession(ort, session, where, "cuda" if cuda else "cpu", cuda and cuda_graph)


def create_session(
    ort: Any, source: str | bytes, options: Any, provider: Provider, settings: Mapping[str, str] | None = None
) -> Any:
    """Create an `InferenceSession` on a provider, never on the CPU instead.

    Args:
        ort: The module onnxruntime.
        source: Path of the graph, or the graph itself.
        options: Its `SessionOptions`.
        settings: Options of the provider.

    Raises:
        ResourceError: The provider does not load. Any other error is onnxruntime's own.
    """
    name = _PROVIDERS[provider]
    # Without `enable_fallback=0` a provider's failure is printed, and the session runs on the CPU.
    session = ort.InferenceSession(
        source, options, providers=[(name, dict(settings or {}))], enable_fallback=0
    )
    if name not in session.get_providers():  # a provider whose library does not load is left out, with a log
        raise ResourceError(
            f"onnxruntime {ort.__version__} did not load {name}: the session would run on "
            f"{', '.join(session.get_providers())}",
            hint="llmc doctor tells which library is missing",
        )
    return session


def _edited(path: Path, edit: Callable[[Any], None], options: Any) -> bytes:
    """Return the changed graph, whose weights are read from their original files."""
    import onnx_ir as ir

    model = ir.load(path)
    edit(model)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
    )
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def custom_operators(folder: Path) -> Path | None:
    """Return the library of custom operators that genai_config.json names, if it names one."""
    if not (folder / "genai_config.json").is_file():
        return None
    session = read_genai_config(folder).get("model", {}).get("decoder", {}).get("session_options", {})
    name = session.get("custom_ops_library")
    return None if name is None else folder / name


def read_genai_config(folder: Path) -> Mapping[str, Any]:
    """Read genai_config.json.

    Raises:
        ConfigError: The file is missing or is not JSON.
    """
    path = folder / "genai_config.json"
    try:
        config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="build the artifact again") from error
    return config
