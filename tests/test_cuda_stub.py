"""The stub of CUDA answers as CUDA does; what runs over it is tested elsewhere."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import read_counters, stub_environment

_SOME_MEMORY = 64 << 20

# Asks the driver and the runtime, and prints what they answer.
_ASK = """
import ctypes, json
answers = {}
try:
    driver = ctypes.CDLL("libcuda.so.1")
except OSError as error:
    answers["driver"] = str(error)
else:
    number, value = ctypes.c_int(), ctypes.c_int()
    name, uuid = ctypes.create_string_buffer(64), (ctypes.c_ubyte * 16)()
    answers["init"] = driver.cuInit(0)
    driver.cuDeviceGetCount(ctypes.byref(number))
    answers["devices"] = []
    for device in range(number.value):
        capability = []
        for attribute in (75, 76):
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            capability.append(value.value)
        driver.cuDeviceGetName(name, 64, device)
        driver.cuDeviceGetUuid(uuid, device)
        answers["devices"].append([*capability, name.value.decode(), uuid[15]])
runtime = ctypes.CDLL("libcudart.so.13")
runtime.cudaGetErrorString.restype = ctypes.c_char_p
runtime.cudaMalloc.argtypes = runtime.cudaMallocAsync.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
version, number, pointer = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
runtime.cudaDriverGetVersion(ctypes.byref(version))
answers["version"] = version.value
code = runtime.cudaGetDeviceCount(ctypes.byref(number))
answers["count"] = [number.value, runtime.cudaGetErrorString(code).decode()]
answers["allocations"] = [
    runtime.cudaGetErrorString(allocate(ctypes.addressof(pointer), size)).decode()
    for size in (40 << 20, 40 << 20, 4 << 20) for allocate in (runtime.cudaMalloc, runtime.cudaMallocAsync)
]
print(json.dumps(answers))
"""

# Records a copy on a stream and starts it; with an argument, also waits for the stream. Prints all codes.
_CAPTURE = """
import ctypes, sys
runtime = ctypes.CDLL("libcudart.so.13")
stream, graph, runnable, memory = (ctypes.c_void_p() for _ in range(4))
codes = [
    runtime.cudaStreamCreate(ctypes.byref(stream)),
    runtime.cudaMalloc(ctypes.byref(memory), ctypes.c_size_t(64)),
    runtime.cudaStreamBeginCapture(stream, 0),
    runtime.cudaMemcpyAsync(memory, memory, ctypes.c_size_t(64), 3, stream),
    runtime.cudaStreamSynchronize(stream) if len(sys.argv) > 1 else 0,
    runtime.cudaStreamEndCapture(stream, ctypes.byref(graph)),
]
if graph:
    codes.append(runtime.cudaGraphInstantiate(ctypes.byref(runnable), graph, ctypes.c_ulonglong(0)))
    codes.append(runtime.cudaGraphLaunch(runnable, stream))
print(codes)
"""


def ask(environment: dict[str, str]) -> dict[str, Any]:
    answers: dict[str, Any] = json.loads(printed(_ASK, environment))
    return answers


def printed(script: str, environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return ended.stdout


def test_devices_are_those_that_were_asked_for(cuda_stub: Path) -> None:
    answers = ask(stub_environment(cuda_stub, devices=3, capability="9.0,8.6", name="NVIDIA H200,NVIDIA A10"))
    assert answers["init"] == 0
    assert answers["devices"] == [
        [9, 0, "NVIDIA H200", 1],
        [8, 6, "NVIDIA A10", 2],
        [8, 6, "NVIDIA A10", 3],
    ]
    assert answers["count"] == [3, "no error"]
    assert answers["version"] == 13000


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("1", [2]),
        ("2,0", [3, 1]),
        ("0,7,1", [1]),
        ("GPU-00000000-0000-0000-0000-000000000002,0", [2, 1]),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(cuda_stub: Path, visible: str, uuids: list[int]) -> None:
    environment = stub_environment(cuda_stub, capability="9.0,8.9,8.6") | {"CUDA_VISIBLE_DEVICES": visible}
    assert [device[-1] for device in ask(environment)["devices"]] == uuids


def test_order_by_bus_is_the_default_order_reversed(cuda_stub: Path) -> None:
    environment = stub_environment(cuda_stub, capability="9.0,8.9,8.6") | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert [device[-1] for device in ask(environment)["devices"]] == [3, 2, 1]


@pytest.mark.parametrize("visible", ["", "-1"])
def test_no_visible_device(cuda_stub: Path, visible: str) -> None:
    answers = ask(stub_environment(cuda_stub) | {"CUDA_VISIBLE_DEVICES": visible})
    assert answers["init"] == 100
    assert answers["count"] == [0, "no CUDA-capable device is detected"]
    assert answers["allocations"] == ["no CUDA-capable device is detected"] * 6


def test_a_driver_that_is_too_old(cuda_stub: Path) -> None:
    answers = ask(stub_environment(cuda_stub, driver=12040))
    assert answers["init"] == 0
    assert answers["version"] == 12040
    assert answers["count"] == [0, "CUDA driver version is insufficient for CUDA runtime version"]


def test_no_driver(cuda_stub: Path) -> None:
    answers = ask(stub_environment(cuda_stub, without=("libcuda.so.1",)))
    assert "libcuda.so.1" in answers["driver"]
    assert answers["version"] == 0
    assert answers["count"] == [0, "CUDA driver version is insufficient for CUDA runtime version"]


def test_memory_ends(cuda_stub: Path, tmp_path: Path) -> None:
    answers = ask(stub_environment(cuda_stub, memory=_SOME_MEMORY, count=tmp_path / "count"))
    fits, fails = "no error", "out of memory"
    assert answers["allocations"] == [fits, fails, fails, fails, fits, fits]
    counted = read_counters(tmp_path / "count")
    assert counted.allocated == counted.allocated_peak == 48 << 20


def test_a_library_that_is_left_out_cannot_be_loaded(cuda_stub: Path) -> None:
    environment = stub_environment(cuda_stub, without=("libcudart.so.13", "libcufft.so.12"))
    for name, found in (("libcufft.so.12", 1), ("libcudart.so.13", 1), ("libcublas.so.13", 0)):
        command = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({name!r})"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == found
        assert found == 0 or name in ended.stderr


def test_work_that_is_captured_is_started_once(cuda_stub: Path, tmp_path: Path) -> None:
    environment = stub_environment(cuda_stub, count=tmp_path / "count")
    assert printed(_CAPTURE, environment) == "[0, 0, 0, 0, 0, 0, 0, 0]\n"
    counted = read_counters(tmp_path / "count")
    assert (counted.captured_copies, counted.on_device, counted.graphs, counted.syncs) == (1, 0, 1, 0)


def test_a_stream_that_is_captured_cannot_be_waited_for(cuda_stub: Path) -> None:
    unsupported, invalidated = 900, 901
    codes = printed(_CAPTURE, stub_environment(cuda_stub), "wait")
    assert codes == f"[0, 0, 0, 0, {unsupported}, {invalidated}]\n"
