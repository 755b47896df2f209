"""What CUDA needs is loaded, or the error names it; over a stub of the driver and of the libraries."""

import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnxruntime_genai
import pytest

from llmc.runtime.libraries import LIBRARIES, provider_library
from tests.cuda import stub_environment

REQUIRE = """
from llmc.errors import LlmcError
from llmc.runtime.libraries import require_cuda
try:
    print(require_cuda().name)
except LlmcError as error:
    print(f"{type(error).__name__} {int(error.exit_code)}: {error.fact} | {error.hint}")
"""
SESSION = """
import numpy as np, onnx_ir as ir, onnxruntime as ort, sys
from llmc.runtime.libraries import require_cuda
require_cuda()
x, y = (ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2])) for n in "xy")
graph = ir.Graph([x], [y], nodes=[ir.Node("", "Neg", [x], outputs=[y])], opset_imports={"": 21}, name="g")
model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
print(ort.InferenceSession(model, providers=["CUDAExecutionProvider"]).get_providers()[0])
"""


def answer(code: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_a_session_opens_after_it(cuda_stub: Path) -> None:
    assert answer(REQUIRE, stub_environment(cuda_stub, name="NVIDIA H200")) == "NVIDIA H200"
    assert answer(SESSION, stub_environment(cuda_stub)) == "CUDAExecutionProvider"


@pytest.mark.parametrize(("library", "_dll", "distribution"), LIBRARIES)
def test_a_missing_library_is_named(library: str, _dll: str, distribution: str, cuda_stub: Path) -> None:
    said = answer(REQUIRE, stub_environment(cuda_stub, without=(library,)))
    assert f"Error 4: {library}, which onnxruntime needs for CUDA, " in said
    assert said.endswith(f"| pip install '{distribution}', or 'llmc[gpu]', which brings all of them")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"driver": 12040},
            "NVIDIA's driver supports CUDA 12.4, but onnxruntime-gpu needs CUDA 13 | install driver 580 or "
            "newer",
        ),
        (
            {"capability": "10.0", "name": "NVIDIA B200"},
            "the installed onnxruntime-gpu has no code for NVIDIA B200 (compute capability 10.0), only for "
            "7.5, 8.0, 8.6, 8.9, 9.0, 12.0 | build with a target tensorrt-* for this GPU: llmc targets",
        ),
        (
            {"capability": "10.0,9.0", "name": "NVIDIA B200,NVIDIA H200"},
            r"the installed .* \| CUDA_VISIBLE_DEVICES=GPU-[0-9a-f-]{36} selects the NVIDIA H200 of ",
        ),
        ({"without": ("libcuda.so.1",)}, "this machine has no NVIDIA GPU, or no driver for it | "),
    ],
)
def test_what_cannot_run_is_told(settings: dict[str, object], error: str, cuda_stub: Path) -> None:
    said = answer(REQUIRE, stub_environment(cuda_stub, **settings))  # type: ignore[arg-type]
    pattern = error if error.startswith("the installed .*") else re.escape(error)
    assert re.match(f"ResourceError 4: {pattern}", said), said


def needed(library: Path) -> Iterator[str]:
    """Read the libraries that an ELF file of 64 bits needs: its entries DT_NEEDED."""
    data = library.read_bytes()
    start, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQ", data, start + size * i) for i in range(count)]
    loaded = [(address, offset) for kind, _, offset, address, *_ in headers if kind == 1]
    (dynamic,) = (header for header in headers if header[0] == 2)
    entries = [struct.unpack_from("<qQ", data, dynamic[2] + 16 * i) for i in range(dynamic[5] // 16)]
    (strings,) = (value for tag, value in entries if tag == 5)
    address, offset = max((a, o) for a, o in loaded if a <= strings)
    for tag, value in entries:
        if tag == 1:
            at = strings - address + offset + value
            yield data[at : data.index(0, at)].decode()


def test_the_libraries_are_those_that_the_runtimes_need() -> None:
    """cuDNN is not among them: neither library needs it."""
    genai = Path(onnxruntime_genai.__file__).parent / "libonnxruntime-genai-cuda.so"
    if provider_library().is_file() and genai.is_file():
        names = {name for file in (provider_library(), genai) for name in needed(file)}
        cuda = {name for name in names if re.match(r"lib(cu|nv)", name)}
        assert cuda == {"libcuda.so.1", *(library for library, _, _ in LIBRARIES)}
