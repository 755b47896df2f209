"""Build TensorRT engines from a lowered graph, for GPUs that this machine need not have.

`tensorrt_rtx` and `tensorrt` are one implementation under two names. The first builds for given compute
capabilities, on any machine; the second builds on the GPU and for it. Precision is part of the graph
(strongly typed). An engine has two optimization profiles: prefill, and decode with exactly one new token per
row, which gets its own kernels.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact.engine import EnginePhase, EngineRecord
from llmc.artifact.manifest import MODEL, FileDigest
from llmc.artifact.store.disk import require_space, space_errors
from llmc.backends.tensorrt.choice import add_network_choice
from llmc.backends.tensorrt.device import require_current_device
from llmc.backends.tensorrt.inspection import EngineFacts, inspect_build
from llmc.backends.tensorrt.layers import Layer, require_fused_attention, require_quantized_products
from llmc.backends.tensorrt.log import BuildLog, make_logger
from llmc.backends.tensorrt.support import NVIDIA_INDEX, EnginePlan, Library
from llmc.config import Engine
from llmc.errors import ResourceError, UnsupportedError

if TYPE_CHECKING:
    from llmc.backends.tensorrt.outline import Outline

#: Oldest versions with the operators of opset 24 that the graphs consist of.
OLDEST: dict[Library, tuple[int, ...]] = {Library.RTX: (1, 7), Library.TENSORRT: (11, 0)}
#: Distributions that contain each library.
_PACKAGES = {Library.RTX: "tensorrt-rtx-cu13", Library.TENSORRT: "tensorrt"}
_PHASES = ("prefill", "decode")

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def load_library(library: Library) -> Any:
    """Import the module of a library.

    Raises:
        ResourceError: It is not installed, does not load, or is too old.
    """
    try:
        trt = importlib.import_module(library.value)
    except (ImportError, OSError) as error:
        raise ResourceError(
            f"{library.value}, which builds the engine, cannot be imported: {error}",
            hint=pip_command(library),
        ) from error
    oldest = OLDEST[library]
    release = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[: len(oldest)])
    if release < oldest:
        required = ".".join(map(str, oldest))
        raise ResourceError(
            f"{library.value} {trt.__version__} is older than {required}",
            hint=pip_command(library, f">={required}"),
        )
    return trt


def pip_command(library: Library, release: str = "") -> str:
    """Return the command that installs a library.

    Args:
        release: The releases to choose from, such as ">=1.7"; empty for all.
    """
    requirement = f"'{_PACKAGES[library]}{release}'" if ">" in release else f"{_PACKAGES[library]}{release}"
    index = f" {NVIDIA_INDEX}" if library is Library.TENSORRT else ""
    return f"pip install {requirement}{index}"


def build_engine(
    folder: Path, plan: EnginePlan, engine: Engine, *, sparse: bool = False
) -> tuple[EngineRecord, FileDigest]:
    """Build the engine of `plan` from model.onnx in `folder`, and write it beside it.

    The bytes are the same for the same graph and version in processes with the same addresses
    (`tensorrt_worker`).

    Args:
        sparse: Whether weights have 2:4 sparsity, so that TensorRT may choose kernels for it.

    Returns:
        The engine's record and its digest.

    Raises:
        ResourceError: The library is missing or too old, TensorRT would build for another GPU than the
            plan's, or disk or memory ran out.
        UnsupportedError: TensorRT refuses the graph or ignores one of its inputs; or TensorRT-RTX leaves
            attention or a quantized product without the kernel that it needs, or lists its layers in an
            unknown form.
    """
    if plan.library is Library.TENSORRT:
        require_current_device(plan.sms, plan.name)
    trt = load_library(plan.library)
    log = BuildLog()
    logger = make_logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    _parse(parser, folder / MODEL)
    _require_consumers(network)
    add_network_choice(trt, network)
    config = _configure(trt, builder, plan)
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    shapes = [_add_profile(builder, config, network, engine, decode=phase == "decode") for phase in _PHASES]
    engine_bytes = log.attempt(builder.build_serialized_network, network, config)
    if engine_bytes is None:
        raise UnsupportedError(f"TensorRT cannot build the engine for {', '.join(plan.sms)}: {log.reason()}")
    from llmc.backends.tensorrt.outline import read_outline  # not before: modules shift addresses

    facts = inspect_build(trt, plan.library, engine_bytes, log, len(_PHASES))
    record = _record(plan, facts, shapes, read_outline(folder / MODEL))
    record = record.model_copy(
        update={"version": trt.__version__, "weight_bytes": log.weights, "sparse_weights": sparse}
    )
    return record, _write(memoryview(engine_bytes), folder, plan)


def pending(plan: EnginePlan) -> EngineRecord:
    """Create the record of an engine that only its GPU can build."""
    return EngineRecord(
        file=None, library=plan.library.value, version=None, sms=plan.sms, profiles=plan.profiles
    )


def _parse(parser: Any, model: Path) -> None:
    if parser.parse_from_file(str(model)):
        return
    error = parser.get_error(0)
    reason = " ".join(error.desc().split())
    raise UnsupportedError(
        f"TensorRT refuses node {error.node_name()} ({error.node_operator()}): {reason}",
        hint="llmc check lists every node that it would refuse",
    )


def _require_consumers(network: Any) -> None:
    """Refuse a network without all inputs: the parser drops some silently, and results would be wrong."""
    used = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        used |= {layer.get_input(i).name for i in range(layer.num_inputs) if layer.get_input(i) is not None}
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    dropped = [name for name in inputs if name not in used]
    if dropped:
        raise UnsupportedError(f"TensorRT's parser ignores the inputs {', '.join(dropped)} of the graph")


def _configure(trt: Any, builder: Any, plan: EnginePlan) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if plan.library is Library.RTX:
        config.num_compute_capabilities = len(plan.sms)
        for index, sm in enumerate(plan.sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, sm), index)
    return config


def _add_profile(builder: Any, config: Any, network: Any, engine: Engine, *, decode: bool) -> Shapes:
    profile = builder.create_optimization_profile()
    shapes: Shapes = {}
    batch, prefill = engine.batch, engine.prefill
    sizes = [
        {"batch": rows, "sequence": 1 if decode else tokens}
        for rows, tokens in (
            (batch.least, prefill.least),
            (batch.typical, prefill.typical),
            (batch.most, prefill.most),
        )
    ]
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 not in tensor.shape:
            continue
        least, typical, most = (
            tuple(
                size if size >= 0 else named[tensor.get_dimension_name(axis)]
                for axis, size in enumerate(tensor.shape)
            )
            for named in sizes
        )
        profile.set_shape(tensor.name, least, typical, most)
        shapes[tensor.name] = (least, typical, most)
    config.add_optimization_profile(profile)
    return shapes


def _record(plan: EnginePlan, facts: EngineFacts, shapes: list[Shapes], outline: Outline) -> EngineRecord:
    """Create the record of an engine, and require fused attention and quantized products of its layers.

    An engine of TensorRT that misses them is kept and in doubt: it may have taken an hour, and the form in
    which that library lists layers was never seen.
    """
    products: dict[str, int] = {}
    doubt = facts.obstacle
    phases = []
    for index, name in enumerate(_PHASES):
        fused = own = None
        if facts.layers is not None:
            own = [layer for layer in facts.layers if layer.phase == index]
            try:
                products = require_quantized_products(own, outline.products, index, name)
                fused = require_fused_attention(own, outline.attention, index, name)
            except UnsupportedError as error:
                if plan.library is Library.RTX:
                    raise
                doubt = doubt or error.fact
        phases.append(
            EnginePhase(
                name="decode" if name == "decode" else "prefill",
                shapes=shapes[index],
                layers=None if own is None else len(own),
                layers_per_decoder_layer=None if own is None else _count(own, outline.middle),
                fused_attention=fused,
                scratch_bytes=facts.scratch[index],
            )
        )
    return EngineRecord(
        file=plan.name,
        library=plan.library.value,
        version=None,
        sms=plan.sms,
        profiles=plan.profiles,
        quantized_products=products,
        phases=tuple(phases),
        doubt=doubt,
    )


def _count(layers: list[Layer], nodes: frozenset[str]) -> int:
    return sum(bool(layer.nodes & nodes) for layer in layers)


def _write(data: memoryview, folder: Path, plan: EnginePlan) -> FileDigest:
    """Write the engine atomically."""
    path, partial = folder / plan.name, folder / plan.partial
    try:
        with space_errors(path):
            require_space(path.parent, data.nbytes)
            partial.write_bytes(data)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return FileDigest(sha256=hashlib.sha256(data).hexdigest(), bytes=data.nbytes)
