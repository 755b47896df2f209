"""What executes engines, as far as it comes without a GPU: every error is TensorRT's or CUDA's own."""

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt
from cuda.bindings import runtime as cuda

from llmc.artifact.engine import EngineRecord
from llmc.backends.tensorrt import loading, plan_file, session
from llmc.backends.tensorrt.choice import add_network_choice, engine_outputs
from llmc.backends.tensorrt.cuda import DeviceBuffer, Stream, call, load_runtime
from llmc.backends.tensorrt.device import require_device
from llmc.backends.tensorrt.engine import build_engine
from llmc.backends.tensorrt.loading import TYPES, load_engine, sized
from llmc.backends.tensorrt.log import BuildLog, make_logger
from llmc.backends.tensorrt.session import EngineSession
from llmc.backends.tensorrt.support import EnginePlan, Library
from llmc.config import Dtype, Engine, Span
from llmc.errors import ConfigError, ExitCode, ResourceError
from llmc.gpu import gpus
from llmc.graph.interface import Interface
from llmc.runtime.choice import CHOICE
from tests.cuda import stub_environment
from tests.lowering import CAPACITY, write_lowered

ENGINE = Engine(
    kv_capacity=CAPACITY, batch=Span(least=1, typical=1, most=4), prefill=Span(least=1, typical=16, most=32)
)
Built = tuple[Path, EngineRecord, Interface]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("engine")
    interface = write_lowered(folder, "llama", Dtype.FLOAT16, last="last-token-logits")
    record, _ = build_engine(folder, EnginePlan(Library.RTX, ("SM86", "SM89"), ("a10", "l4")), ENGINE)
    return folder, record, interface


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide a GPU, where there is one, from the driver: it looks when it is first used."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")


def test_a_session_needs_a_driver_and_a_gpu(built: Built) -> None:
    with pytest.raises(
        ResourceError, match=r"cudaGetDeviceProperties of CUDA fails: .*\(cudaError"
    ) as caught:
        EngineSession(*built)
    assert caught.value.hint in (
        "install NVIDIA's driver, or a newer one",
        "run it on a machine with an NVIDIA GPU",
    )
    assert caught.value.exit_code is ExitCode.RESOURCES


def test_tensorrt_says_why_it_cannot_load_an_engine(built: Built, tmp_path: Path) -> None:
    folder, record, _ = built
    log = BuildLog()
    runtime = trt.Runtime(make_logger(trt, log))
    if not gpus():
        with pytest.raises(ResourceError, match=r"TensorRT cannot read an engine: .*driver") as caught:
            load_engine(trt, runtime, folder / str(record.file), log)
        assert str(caught.value.hint).startswith("install NVIDIA's driver")
    plan = (folder / str(record.file)).read_bytes()
    for name, data in {"cut": plan[:40], "empty": b"", "other": b"not an engine" * 99}.items():
        (tmp_path / f"{name}.engine").write_bytes(data)
        message = rf"TensorRT does not accept {name}\.engine: the file is damaged"
        with pytest.raises(ResourceError, match=message) as caught:
            load_engine(trt, runtime, tmp_path / f"{name}.engine", log)
        assert caught.value.hint == "llmc verify tells which files are"
    with pytest.raises(ConfigError, match=r"the engine .*gone\.engine is missing"):
        load_engine(trt, runtime, tmp_path / "gone.engine", log)


def test_a_plan_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(200))
    (tmp_path / "a.engine").write_bytes(data)
    monkeypatch.setattr(plan_file, "PIECE", 64)
    with open(tmp_path / "a.engine", "rb", buffering=0) as opened:
        file = plan_file.PlanFile(opened)
        pieces = iter(lambda: file.read(len(data), 0), b"")
        assert [len(piece) for piece in pieces] == [64, 64, 64, 8]
        position = trt.SeekPosition
        for offset, where, expected in ((3, position.SET, 3), (4, position.CUR, 8), (-2, position.END, 198)):
            assert file.seek(offset, where)
            assert file.read(1, 0) == data[expected : expected + 1]
        assert not file.seek(-1, position.SET)
        assert isinstance(file.error, OSError)


_OPEN = """
import sys, tensorrt_rtx as trt
from pathlib import Path
from llmc.backends.tensorrt.loading import load_engine
from llmc.backends.tensorrt.log import BuildLog, make_logger
from llmc.errors import ResourceError
log = BuildLog()
try:
    load_engine(trt, trt.Runtime(make_logger(trt, log)), Path(sys.argv[1]), log)
except ResourceError as error:
    print(error.fact)
"""


def test_a_reader_opens_over_a_driver(cuda_stub: Path, built: Built) -> None:
    """TensorRT takes the reader over the stub's driver, and its runtime then refuses that driver."""
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, str(built[0] / str(built[1].file))],
        capture_output=True,
        text=True,
        env=stub_environment(cuda_stub, capability="8.9", driver=13040),
        timeout=120,
        check=True,
    )
    assert done.stdout.startswith("TensorRT cannot load sm86-sm89.engine: "), done.stdout + done.stderr
    assert "deserializeCudaEngineV2" in done.stdout


def test_every_call_of_cuda_tells_its_code() -> None:
    with pytest.raises(ResourceError, match=r"cudaMalloc of CUDA fails: .*\(cudaError\w+, \d+\)"):
        DeviceBuffer(64)
    with pytest.raises(ResourceError, match="of CUDA fails: "):
        Stream()
    # A stream without a device under it: what it calls takes the arguments that it is called with.
    stream = Stream.__new__(Stream)
    stream._runtime, stream.handle = cuda, 0
    buffer = DeviceBuffer.__new__(DeviceBuffer)
    buffer.address, buffer.size = 256, 8
    values = np.zeros(1, np.int64)
    calls = {
        "cudaMemcpyAsync": lambda: stream.write(buffer, values),
        "cudaMemsetAsync": lambda: stream.clear(buffer),
        "cudaStreamSynchronize": stream.synchronize,
        "cudaStreamBeginCapture": lambda: stream.capture(stream.synchronize),
    }
    for name, run in calls.items():
        with pytest.raises(ResourceError, match=f"^{name} of CUDA fails: "):
            run()
    with pytest.raises(ResourceError, match=r"cudaMemcpyAsync of CUDA fails: "):
        stream.read(buffer, (1,), np.dtype(np.int64))
    for function, arguments in {
        cuda.cudaGraphInstantiate: (0, 0),
        cuda.cudaGraphLaunch: (0, 0),
        cuda.cudaStreamEndCapture: (0,),
        cuda.cudaGraphDestroy: (0,),
    }.items():
        with pytest.raises(ResourceError, match=f"^{function.__name__} of CUDA fails: "):
            call(function, *arguments)
    assert call(cuda.cudaGetErrorName, cuda.cudaError_t.cudaErrorNoDevice) == b"cudaErrorNoDevice"


def test_cuda_bindings_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ResourceError, match="cuda-bindings, which executes engines, cannot be") as caught:
        load_runtime()
    assert caught.value.hint == "pip install 'llmc[gpu]'"


def test_what_is_asked_of_tensorrt_is_there() -> None:
    """Every name that the session uses of the module and its classes, in the library that is installed."""
    owners = {
        "trt": trt,
        "engine": trt.ICudaEngine,
        "context": trt.IExecutionContext,
        "config": trt.IRuntimeConfig,
        "runtime": trt.Runtime,
        "cache": trt.IRuntimeCache,
    }
    used: dict[str, set[str]] = {name: set() for name in owners}
    modules = (session, loading, plan_file)
    for node in (node for module in modules for node in ast.walk(ast.parse(inspect.getsource(module)))):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = (
                owner.id
                if isinstance(owner, ast.Name)
                else owner.attr
                if isinstance(owner, ast.Attribute)
                else ""
            )
            if name.lstrip("_") in used:
                used[name.lstrip("_")].add(node.attr)
    assert {
        name: sorted(n for n in used[name] if not hasattr(owner, n)) for name, owner in owners.items()
    } == {name: [] for name in owners}
    assert used["context"] >= {"execute_async_v3", "set_tensor_address", "set_input_shape"}
    assert used["context"] >= {"nvtx_verbosity", "execute_async_v3"}
    assert used["config"] >= {"dynamic_shapes_kernel_specialization_strategy", "set_runtime_cache"}
    assert used["cache"] == {"deserialize", "serialize"}
    assert used["runtime"] >= {"deserialize_cuda_engine", "get_engine_validity", "engine_header_size"}
    assert loading._INVALID.keys() | {"CUDA_ERROR"} == trt.EngineInvalidityDiagnostics.__members__.keys()
    assert {"LAZY", "EAGER"} <= trt.DynamicShapesKernelSpecializationStrategy.__members__.keys()
    assert trt.SeekPosition.__members__.keys() == {"SET", "CUR", "END"}
    assert set(TYPES.values()) <= trt.DataType.__members__.keys()
    assert {"ON_PROFILE_CHANGE"} <= trt.ExecutionContextAllocationStrategy.__members__.keys()
    assert {"WHOLE_GRAPH_CAPTURE"} <= trt.CudaGraphStrategy.__members__.keys()


def test_the_first_device_may_be_another_one(built: Built) -> None:
    sms, file = built[1].sms, str(built[1].file)
    message = r"first device is NVIDIA T4 \(SM75\), but sm86-sm89\.engine is for SM86, SM89"
    with pytest.raises(ResourceError, match=message) as caught:
        require_device("NVIDIA T4", "7.5", sms, file)
    assert str(caught.value.hint).startswith("CUDA_VISIBLE_DEVICES names the GPU to use")
    require_device("NVIDIA L4", "8.9", sms, file)


_START = """
import sys
from pathlib import Path
from llmc.artifact.engine import EngineRecord
from llmc.backends.tensorrt.engines import require_engine
from llmc.backends.tensorrt.session import EngineSession
from llmc.errors import ResourceError
from llmc.graph.interface import Interface
from llmc.machine import detect_profile
folder, record, interface = sys.argv[1:]
try:
    fitting = require_engine([EngineRecord.model_validate_json(record)], detect_profile())
    EngineSession(Path(folder), fitting, Interface.model_validate_json(interface))
except ResourceError as error:
    print(error.fact)
    print(error.hint)
"""


@pytest.mark.parametrize(
    ("capability", "changes", "fact", "hint"),
    [
        ("8.0", {}, "engines for SM86, SM89, but this machine is CUDA stub 8.0 (SM80)", "llmc verify"),
        ("9.0,8.9", {}, "but this machine is CUDA stub 9.0 (SM90)", "CUDA_VISIBLE_DEVICES=GPU-"),
        (
            "8.9",
            {"version": "1.6.0"},
            "was built by tensorrt_rtx 1.6.0, the only version that",
            "pip install",
        ),
        ("8.9", {}, "(cudaErrorCallRequiresNewerDriver, 36)", "install a newer driver"),
    ],
)
def test_an_engine_of_another_gpu_or_release(
    capability: str, changes: dict[str, str], fact: str, hint: str, cuda_stub: Path, built: Built
) -> None:
    """The last case is the error with which CUDA's runtime refuses the stub's driver."""
    folder, record, interface = built
    texts = (record.model_copy(update=changes).model_dump_json(), interface.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", _START, str(folder), *texts],
        capture_output=True,
        text=True,
        env=stub_environment(cuda_stub, capability=capability, driver=13040),
        timeout=120,
        check=True,
    )
    told = done.stdout.splitlines()
    assert fact in told[0]
    assert told[1].startswith(hint)


_BUILD = """
from pathlib import Path
from llmc.backends.tensorrt.support import EnginePlan, Library
from llmc.backends.tensorrt.worker import build_apart
from llmc.config import Engine, Span
from llmc.errors import ResourceError
span = Span(least=1, typical=1, most=1)
engine = Engine(kv_capacity=8, batch=span, prefill=span)
try:
    build_apart(Path(), EnginePlan(Library.TENSORRT, ("SM90",), ("h100-sxm",)), engine)
except ResourceError as error:
    print(error.fact)
    print(error.hint)
"""


def test_tensorrt_builds_only_for_the_first_device(cuda_stub: Path, tmp_path: Path) -> None:
    """The process that builds sees the devices that this one sees, in the same order."""

    def build(capability: str, **order: str) -> list[str]:
        environment = stub_environment(
            cuda_stub, capability=capability, name="NVIDIA L4,NVIDIA H100 80GB HBM3"
        )
        done = subprocess.run(
            [sys.executable, "-c", _BUILD],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **order},
            timeout=120,
            check=True,
        )
        return done.stdout.splitlines()

    fact, hint = build("8.9,9.0")
    assert fact == "CUDA's first device is NVIDIA L4 (SM89), but sm90.engine is for SM90"
    assert hint.startswith("CUDA_VISIBLE_DEVICES=GPU-")
    assert hint.endswith(" selects the NVIDIA H100 80GB HBM3 of this machine")
    assert build("8.9")[1].startswith("CUDA_VISIBLE_DEVICES names the GPU to use")
    for order in ({"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}):
        assert build("8.9,9.0", **order)[0].startswith(
            "tensorrt, which builds the engine, cannot be imported"
        )
    assert build("9.0", CUDA_VISIBLE_DEVICES="")[0] == "CUDA_VISIBLE_DEVICES='' leaves no GPU visible to CUDA"


def test_a_record_without_profiles_is_refused(built: Built) -> None:
    folder, record, interface = built
    with pytest.raises(ConfigError, match="is recorded with 0 optimization profiles"):
        EngineSession(folder, record.model_copy(update={"phases": ()}), interface)


@pytest.fixture
def network(built: Built) -> Iterator[Any]:
    """Parse the network of the graph that the engine is built from."""
    logger = make_logger(trt, BuildLog())
    builder = trt.Builder(logger)
    parsed = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(parsed, logger)
    assert parser.parse_from_file(str(built[0] / "model.onnx"))
    yield parsed
    del parser  # it owns the weights


def test_the_cache_is_one_that_tensorrt_updates_in_place(built: Built, network: Any) -> None:
    """A KVCacheUpdate layer's output shares the address of its cache by TensorRT's documentation."""
    interface = built[2]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    updates = [layer for layer in layers if layer.type == trt.LayerType.KV_CACHE_UPDATE]
    expected = {slot.present_key: slot.past_key for slot in interface.cache}
    expected |= {slot.present_value: slot.past_value for slot in interface.cache}
    assert {layer.get_output(0).name: layer.get_input(0).name for layer in updates} == expected


def test_the_chosen_token_is_the_largest_of_the_last_axis(network: Any) -> None:
    add_network_choice(trt, network)
    layer = network.get_layer(network.num_layers - 1)
    layer.__class__ = trt.ITopKLayer
    assert (layer.op, layer.k, layer.axes) == (trt.TopKOperation.MAX, 1, 1 << 2)
    assert layer.get_input(0).name == "logits"
    assert layer.get_output(1).name == network.get_output(network.num_outputs - 1).name == CHOICE


def test_every_input_and_output_has_a_size(built: Built) -> None:
    _, record, interface = built
    shapes = {spec.name: sized(spec, 4, 32) for spec in (*interface.inputs, *engine_outputs(interface))}
    prefill, decode = record.phases
    for name, (_, _, most) in prefill.shapes.items():
        assert shapes[name] == most
    assert prefill.shapes.keys() == decode.shapes.keys() == {spec.name for spec in interface.inputs}
    assert shapes["logits"] == (4, 1, interface.vocabulary)
    assert shapes[CHOICE] == (4, 1, 1)
    assert all(shapes[slot.present_key] == shapes[slot.past_key] for slot in interface.cache)
