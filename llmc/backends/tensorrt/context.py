"""Write an ONNX model around an engine, for ONNX Runtime's TensorRT-RTX provider. Experimental: not executed.

Its only node is EPContext of domain com.microsoft, which names the engine's file (ONNX Runtime's "EP context
design"). The provider of the package `onnxruntime-ep-nv-tensorrt-rtx-cu13` 0.5.0 takes the node by `source`,
and reads the file that `ep_cache_context` names beside the model if `embed_mode` is 0; docs/engines.md says
how that was seen. It loads only engines of the release that it brings, on compute capabilities 8.6, 8.9 and
from 12.0 on. ONNX Runtime's TensorRT provider reads the same node, but is linked to versions older than those
that build our engines. Callers must bind each past and its present to one buffer: the engine writes in place.
"""

from pathlib import Path

import onnx_ir as ir

from llmc.artifact.engine import EngineRecord
from llmc.artifact.manifest import MODEL
from llmc.artifact.store.disk import space_errors
from llmc.backends.tensorrt.choice import engine_outputs
from llmc.backends.tensorrt.support import Library
from llmc.graph.domains import MICROSOFT, OPSET, STANDARD, VERSION
from llmc.graph.interface import Interface, TensorSpec

PROVIDER = "NvTensorRTRTXExecutionProvider"

_SUPPORTED = frozenset({"SM86", "SM89", "SM120", "SM121"})
#: ONNX IR version of the file, old enough not to require a newer ONNX Runtime than necessary.
_IR_VERSION = 10


def context_name(engine: str) -> str:
    """Return the name of the model around an engine's file."""
    return f"{Path(engine).stem}.context.onnx"


def write_context(folder: Path, record: EngineRecord, interface: Interface) -> str | None:
    """Write the model beside the engine.

    Args:
        folder: Directory with the engine.
        record: The engine, already built.
        interface: Its inputs and outputs.

    Returns:
        The file's name; None if the provider does not support the engine.

    Raises:
        ResourceError: The disk is full.
    """
    if record.file is None or Library(record.library) is not Library.RTX or not _SUPPORTED & set(record.sms):
        return None
    inputs = [_value(spec) for spec in interface.inputs]
    outputs = [_value(spec) for spec in engine_outputs(interface)]
    attributes: dict[str, int | str] = {
        "main_context": 1,
        "embed_mode": 0,
        "ep_cache_context": record.file,
        "ep_sdk_version": str(record.version),
        "hardware_architecture": ",".join(sm.removeprefix("SM") for sm in record.sms),
        "onnx_model_filename": MODEL,
        "partition_name": Path(record.file).stem,
        "source": PROVIDER,
    }
    node = ir.node("EPContext", inputs, attributes, domain=MICROSOFT, outputs=outputs, name="engine")
    graph = ir.Graph(
        inputs, outputs, nodes=[node], name="engine", opset_imports={STANDARD: OPSET, MICROSOFT: VERSION}
    )
    name = context_name(record.file)
    with space_errors(folder / name):
        ir.save(ir.Model(graph, ir_version=_IR_VERSION, producer_name="llmc"), folder / name)
    return name


def _value(spec: TensorSpec) -> ir.Value:
    return ir.val(spec.name, ir.DataType[spec.dtype.upper()], spec.shape)
