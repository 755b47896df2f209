"""Run ONNX Runtime's and onnxruntime-genai's own CUDA code on a machine without a GPU.

`cuda_stub/` has the source of libraries that stand in for the CUDA driver, the CUDA runtime and cuBLAS. What
they do is said in `cuda_stub/stub.h`. Since a library path is read when a process starts, tests run the
command line or a script in a child process, in the environment that `stub_environment` returns.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from llmc.backends.compiled.toolchain import find_compiler

_SOURCES = Path(__file__).with_name("cuda_stub")
#: File name of each library, and its source.
_LIBRARIES = {
    "libcuda.so.1": "driver.c",
    "libcudart.so.13": "runtime.c",
    "libcublas.so.13": "blas.c",
    "libcublasLt.so.13": "blaslt.c",
    "libcurand.so.10": "nothing.c",
    "libcufft.so.12": "nothing.c",
    "libnvidia-ml.so.1": "nvml.c",
}
#: The libraries of the driver, whose functions have no version.
_UNVERSIONED = {"libcuda.so.1", "libnvidia-ml.so.1"}
#: Compilers of C that are tried before the one for compiled kernels, which may first build its own libraries.
_COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 600
_FLAGS = ("-x", "c", "-std=gnu11", "-O1", "-fPIC", "-shared", "-Wall", "-Wno-unused-parameter")


@dataclass(frozen=True)
class Counters:
    """The calls of a process to its devices, in the order of `enum counter` in stub.h."""

    launches: int
    products: int
    syncs: int
    to_device: int
    to_host: int
    on_device: int
    graphs: int
    captured: int
    captured_copies: int
    allocated: int
    allocated_peak: int
    bytes_to_device: int
    bytes_to_host: int

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))

    @property
    def starts(self) -> int:
        """The number of things that the host started on the device: kernels, products and graphs."""
        return self.launches + self.products + self.graphs


def build_stub(folder: Path) -> None:
    """Compile the libraries of the stub into `folder`."""
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    compiler = find_compiler().command if found is None else (found,)
    started = []
    for name, source in _LIBRARIES.items():
        linked = [f"-Wl,-soname,{name}"]
        if name not in _UNVERSIONED:
            script = folder / f"{name}.map"
            script.write_text(f"{name} {{ global: *; }};\n", encoding="ascii")
            linked.append(f"-Wl,--version-script={script}")
        command = [*compiler, *_FLAGS, *linked, "-o", str(folder / name), str(_SOURCES / source)]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, said = process.communicate(timeout=_SECONDS)
        if process.returncode:
            raise RuntimeError(f"the stub of CUDA does not compile: {said}")


def stub_environment(
    folder: Path,
    *,
    count: Path | None = None,
    devices: int = 1,
    capability: str = "9.0",
    driver: int = 13000,
    memory: int = 16 << 30,
    name: str | None = None,
    without: tuple[str, ...] = (),
) -> dict[str, str]:
    """Return the environment in which a child process sees a machine with GPUs.

    Args:
        folder: Where `build_stub` put the libraries.
        count: File in which the process counts its calls, for `read_counters`.
        devices: Number of GPUs, where `capability` lists fewer.
        capability: Compute capability of each GPU, separated by commas.
        driver: Version of the driver, as cuDriverGetVersion returns it.
        memory: Bytes of each GPU.
        name: Name of each GPU, separated by commas.
        without: File names of libraries that the machine lacks; without libcuda.so.1 it has no driver.
    """
    unknown = set(without) - set(_LIBRARIES)
    assert not unknown, f"the stub has no {', '.join(sorted(unknown))}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
    paths = [
        str(_folder_without(folder, without) if without else folder),
        environment.get("LD_LIBRARY_PATH", ""),
    ]
    environment |= {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths)),
        "CUDA_STUB_DEVICES": str(devices),
        "CUDA_STUB_CAPABILITY": capability,
        "CUDA_STUB_DRIVER": str(driver),
        "CUDA_STUB_MEMORY": str(memory),
    }
    if name is not None:
        environment["CUDA_STUB_NAME"] = name
    if count is not None:
        environment["CUDA_STUB_COUNT"] = str(count)
    return environment


def _folder_without(folder: Path, without: Sequence[str]) -> Path:
    """Return a folder of links to all libraries but some.

    A library that this machine has itself is replaced by an empty file, which cannot be loaded either.
    """
    lacking = folder / "-".join(["without", *sorted(without)])
    if not lacking.is_dir():
        lacking.mkdir()
        for name in _LIBRARIES:
            if name not in without:
                (lacking / name).symlink_to(folder / name)
            elif name in _installed_libraries():
                (lacking / name).touch()
    return lacking


@cache
def _installed_libraries() -> frozenset[str]:
    """Return the names of the libraries that this machine or NVIDIA's distributions have."""
    spec = find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    names = {file.name for place in places for file in Path(place).glob("*/lib/*.so*")}
    path = os.pathsep.join([os.environ.get("PATH", ""), "/sbin", "/usr/sbin"])
    ldconfig = shutil.which("ldconfig", path=path)
    if ldconfig is not None:
        command = [ldconfig, "-p"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        names |= set(re.findall(r"^\s*(\S+) \(", listed, re.MULTILINE))
    return frozenset(names)


def read_counters(file: Path) -> Counters:
    """Read what processes counted whose environment named `file`; zeros if none has called CUDA yet."""
    size = 8 * len(fields(Counters))
    content = file.read_bytes() if file.exists() else bytes(size)
    return Counters(*struct.unpack(f"={size // 8}q", content))
