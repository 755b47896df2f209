"""The GPUs that the pinned release of ONNX Runtime has kernels for are read from its own library."""

import struct
import sys
from pathlib import Path

import onnxruntime
import pytest

from llmc.doctor import runs_gpu_wheels
from llmc.runtime import device_code
from llmc.runtime.device_code import published_for, read_device_code, runs_on
from llmc.runtime.libraries import provider_library

ON_LINUX_X86 = sys.platform == "linux" and runs_gpu_wheels()


def test_the_table_states_what_the_installed_library_holds() -> None:
    """On another platform the library differs or is missing, so that the table does not describe it."""
    if ON_LINUX_X86 and onnxruntime.__version__ == device_code.RELEASE:
        assert read_device_code(provider_library()) == device_code.PUBLISHED["Linux on x86-64"]


def test_the_table_is_of_the_pinned_release() -> None:
    constraints = Path(__file__).parents[2] / "constraints.txt"
    assert f"onnxruntime-gpu=={device_code.RELEASE}\n" in constraints.read_text(encoding="utf-8")


def test_genai_has_code_for_what_onnxruntime_has_code_for() -> None:
    import onnxruntime_genai

    library = Path(onnxruntime_genai.__file__).parent / "libonnxruntime-genai-cuda.so"
    if ON_LINUX_X86:
        code = read_device_code(library)
        assert code == tuple(each.removesuffix("a") for each in device_code.PUBLISHED["Linux on x86-64"])


@pytest.mark.parametrize(
    ("code", "capability", "runs"),
    [
        ("8.0", "8.0", True),
        ("8.0", "8.6", True),
        ("8.6", "8.7", True),
        ("8.9", "8.6", False),
        ("8.9", "9.0", False),
        ("9.0a", "9.0", True),
        ("12.0", "12.1", True),
        ("12.0a", "12.1", False),
        ("ptx 9.0", "12.1", True),
        ("ptx 9.0", "8.9", False),
    ],
)
def test_which_gpu_runs_which_code(code: str, capability: str, runs: bool) -> None:
    assert runs_on([code], capability) is runs


@pytest.mark.parametrize(
    ("capability", "platforms"),
    [
        ("8.9", ("Linux on x86-64", "Linux on AArch64", "Windows")),
        ("9.0", ("Linux on x86-64", "Linux on AArch64")),
        ("10.0", ()),
        ("10.3", ()),
        ("12.1", ("Linux on AArch64",)),
        ("7.0", ()),
    ],
)
def test_which_platforms_have_code_for_a_gpu(capability: str, platforms: tuple[str, ...]) -> None:
    assert published_for(capability) == platforms


def entry(kind: int, architecture: int, flags: int, code: bytes) -> bytes:
    return struct.pack("<HHIQ12xI8xQ16x", kind, 0x101, 64, len(code), architecture, flags) + code


def test_headers_are_read(tmp_path: Path) -> None:
    inside = entry(2, 90, 1 << 20, b"code") + entry(1, 80, 0, b"text!") + entry(2, 120, 0, b"")
    fatbinary = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(inside)) + inside
    other = struct.pack("<I", 0xBA55ED50)
    (tmp_path / "library.so").write_bytes(b"ELF" + other + b"\0" * 40 + fatbinary + b"rest" + other)
    assert read_device_code(tmp_path / "library.so") == ("ptx 8.0", "9.0a", "12.0")
