"""The driver is asked for the GPUs, over a stub of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda import stub_environment

ASK = """
from llmc.backends.onnxruntime.devices import require_device_kernels
from llmc.errors import LlmcError
from llmc.gpu import driver_version, gpu_memory_in_use, gpus, require_gpu, selecting_hint
from llmc.machine import detect_profile
try:
    {statement}
except LlmcError as error:
    print(f"{{type(error).__name__}} {{int(error.exit_code)}}: {{error.fact}} | {{error.hint}}")
"""


def answer(statement: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", ASK.format(statement=statement)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_gpus_in_the_order_of_cuda(cuda_stub: Path) -> None:
    machine = stub_environment(
        cuda_stub, capability="8.9,9.0", name="NVIDIA L4,NVIDIA H200", memory=24 << 30, driver=13010
    )
    told = "print([(g.name, g.capability, g.memory_bytes >> 30) for g in gpus()], driver_version())"
    assert answer(told, machine) == "[('NVIDIA L4', '8.9', 24), ('NVIDIA H200', '9.0', 24)] (13, 1)"
    second = answer("print(gpus()[1].uuid)", machine)
    assert second.startswith("GPU-")
    assert len(second) == len("GPU-00000000-0000-0000-0000-000000000000")
    reordered = answer("print(gpus()[0].name)", {**machine, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert reordered == "NVIDIA H200"
    for visible in ("1", second):
        assert answer(told, {**machine, "CUDA_VISIBLE_DEVICES": visible}) == (
            "[('NVIDIA H200', '9.0', 24)] (13, 1)"
        )


def test_the_profile_is_of_the_gpu_that_is_used(cuda_stub: Path) -> None:
    machine = stub_environment(cuda_stub, capability="8.9,9.0", name="NVIDIA L4,NVIDIA H200")
    told = "p = detect_profile(); print(p.device, p.compute_capability, p.memory_gib, p.notes, sep=' | ')"
    assert answer(told, machine) == (
        "NVIDIA L4 | 8.9 | 16.0 | 2 GPUs are visible to CUDA; the first, NVIDIA L4, is used. "
        "The others are 1 NVIDIA H200: CUDA_VISIBLE_DEVICES selects one."
    )
    assert answer(told, {**machine, "CUDA_VISIBLE_DEVICES": "1"}) == "NVIDIA H200 | 9.0 | 16.0 |"


def test_another_gpu_that_fits_is_named_by_its_uuid(cuda_stub: Path) -> None:
    machine = stub_environment(cuda_stub, capability="8.9,9.0", name="NVIDIA L4,NVIDIA H200")
    told = "print(selecting_hint(lambda gpu: gpu.capability == {}))"
    hint = answer(told.format("'9.0'"), machine)
    assert hint.endswith(" selects the NVIDIA H200 of this machine")
    name, _, uuid = hint.split()[0].partition("=")
    assert name == "CUDA_VISIBLE_DEVICES"
    assert answer("print(gpus()[0].name)", {**machine, name: uuid}) == "NVIDIA H200"
    assert answer(told.format("'8.9'"), machine) == "None", "the first is in use already"


def test_a_build_for_a_gpu_without_code_names_another_one(cuda_stub: Path) -> None:
    machine = stub_environment(cuda_stub, capability="10.0,9.0", name="NVIDIA B200,NVIDIA H200")
    told = answer("require_device_kernels('cuda-int4', detect_profile())", machine)
    assert told.startswith("UnsupportedError 3: target cuda-int4 cannot run on profile local: ")
    assert told.endswith(" selects the NVIDIA H200 of this machine")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"CUDA_VISIBLE_DEVICES": ""},
            "CUDA_VISIBLE_DEVICES='' leaves no GPU visible to CUDA | unset it, or name a GPU in it by its UU",
        ),
        (
            {"CUDA_STUB_DEVICES": "0"},
            "NVIDIA's driver is installed, but finds no GPU | run it where nvidia-smi lists a GPU",
        ),
        (
            {"CUDA_STUB_INIT": "803"},
            "NVIDIA's driver does not work: cuInit fails with system has unsupported display driver / cuda "
            "driver combination (803) | the driver was updated and its kernel module was not",
        ),
        ({"CUDA_STUB_INIT": "804"}, "NVIDIA's driver does not work: cuInit fails with "),
        ({"CUDA_STUB_INIT": "999"}, "NVIDIA's driver does not work: cuInit fails with "),
    ],
)
def test_no_gpu_can_be_used(settings: dict[str, str], error: str, cuda_stub: Path) -> None:
    machine = stub_environment(cuda_stub) | settings
    assert answer("require_gpu()", machine).startswith(f"ResourceError 4: {error}")
    code = settings.get("CUDA_STUB_INIT")
    assert answer("print(gpus())", machine) == ("()" if code is None else answer("require_gpu()", machine))


def test_no_driver(cuda_stub: Path) -> None:
    machine = stub_environment(cuda_stub, without=("libcuda.so.1",))
    assert answer("print(gpus(), driver_version())", machine) == "() None"
    assert answer("require_gpu()", machine) == (
        "ResourceError 4: this machine has no NVIDIA GPU, or no driver for it | run it where nvidia-smi "
        "lists a GPU; CUDA looks for the driver as libcuda.so.1"
    )


def test_a_driver_that_does_not_load(cuda_stub: Path, tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.1"
    machine = {**stub_environment(cuda_stub), "LD_LIBRARY_PATH": f"{tmp_path}:{cuda_stub}"}
    library.touch()  # as in a container that was saved where a GPU was handed in
    assert answer("print(gpus(), driver_version())", machine) == "() None"
    library.write_text("not a library " * 100)
    told = f"ResourceError 4: the library of NVIDIA's driver does not load: {library}: invalid ELF header | "
    assert answer("print(gpus())", machine).startswith(told)
    assert answer("require_gpu()", machine).startswith(told)


def test_memory_in_use_is_that_of_the_first_gpu(cuda_stub: Path, tmp_path: Path) -> None:
    machine = stub_environment(cuda_stub, memory=1 << 30, count=tmp_path / "count")
    assert answer("print(gpu_memory_in_use())", machine) == "0"
    assert answer("gpu_memory_in_use()", stub_environment(cuda_stub, without=("libcuda.so.1",))).startswith(
        "ResourceError 4: this machine has no NVIDIA GPU"
    )
