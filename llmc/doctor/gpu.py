"""Check for NVIDIA's driver, for GPUs, and for what runs artifacts on them."""

from pydantic import BaseModel, ConfigDict

from llmc.backends import backends
from llmc.doctor.finding import Finding, Status
from llmc.doctor.probe import GENERATOR, SESSION, Step, try_cuda
from llmc.errors import ResourceError
from llmc.gpu import Gpu, driver_version, gpus
from llmc.runtime.libraries import CUDA_RELEASE, FIRST_DRIVER, library_names

_NO_GPU = "artifacts for GPUs are built here, but not executed"


class GpuFacts(BaseModel):
    """A GPU that CUDA gives to this process, in CUDA's order.

    Args:
        runtimes: The runtimes of artifacts, and whether each has code for this GPU or builds engines for it.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    compute_capability: str
    memory_bytes: int
    shares_memory: bool
    uuid: str
    runtimes: dict[str, bool]


class GpuReport(BaseModel):
    """The findings on GPUs: the release of CUDA that the driver supports, the GPUs, and the checks."""

    model_config = ConfigDict(frozen=True)

    driver: str | None
    gpus: tuple[GpuFacts, ...]
    checks: tuple[Finding, ...]


def examine_gpus() -> GpuReport:
    """Ask the driver for the GPUs, and try what runs artifacts on them."""
    try:
        version, found = driver_version(), gpus()
    except ResourceError as error:
        broken = Finding(name="nvidia driver", status="broken", detail=error.fact, hint=error.hint)
        return GpuReport(driver=None, gpus=(), checks=(broken, *check_cuda(try_cuda(), gpu=False)))
    facts = tuple(map(_describe, found))
    return GpuReport(
        driver=None if version is None else f"{version[0]}.{version[1]}",
        gpus=facts,
        checks=(
            check_driver(version, bool(found)),
            *(check_gpu(gpu, number) for number, gpu in enumerate(facts, 1)),
            *check_cuda(try_cuda(), gpu=bool(found)),
        ),
    )


def _describe(gpu: Gpu) -> GpuFacts:
    return GpuFacts(
        name=gpu.name,
        compute_capability=gpu.capability,
        memory_bytes=gpu.memory_bytes,
        shares_memory=gpu.integrated,
        uuid=gpu.uuid,
        runtimes={
            name: has for each in backends() for name, has in each.gpu_runtimes(gpu.capability).items()
        },
    )


def check_driver(version: tuple[int, int] | None, found: bool) -> Finding:
    """Check that the driver, if there is one, is new enough and finds a GPU."""
    name = "nvidia driver"
    if version is None:
        return Finding(name=name, status="absent", detail=f"none: {_NO_GPU}")
    detail = f"for CUDA up to {version[0]}.{version[1]}"
    if version[0] < CUDA_RELEASE:
        hint = f"install driver {FIRST_DRIVER} or newer: onnxruntime-gpu needs CUDA {CUDA_RELEASE}"
        return Finding(name=name, status="broken", detail=f"{detail}, which is too old", hint=hint)
    if not found:
        hint = "CUDA_VISIBLE_DEVICES may hide GPUs; nvidia-smi lists all of them"
        return Finding(name=name, status="absent", detail=f"{detail}; finds no GPU: {_NO_GPU}", hint=hint)
    return Finding(name=name, status="ok", detail=detail)


def check_gpu(gpu: GpuFacts, number: int) -> Finding:
    """Check which runtimes can use a GPU; CUDA uses the first one."""
    having = [name for name, has in gpu.runtimes.items() if has]
    lacking = [name for name, has in gpu.runtimes.items() if not has]
    memory = "memory shared with the CPU" if gpu.shares_memory else f"{gpu.memory_bytes / 2**30:.1f} GiB"
    detail = f"{gpu.name}, compute capability {gpu.compute_capability}, {memory}: runs "
    detail += f"artifacts of {', '.join(having)}" if having else "no artifact"
    if lacking:
        detail += f"; not of {', '.join(lacking)}, without code for it"
    name = "nvidia gpu" if number == 1 else f"nvidia gpu {number}"
    hint = None if number == 1 else f"CUDA_VISIBLE_DEVICES={gpu.uuid} selects it instead of the first"
    return Finding(name=name, status="ok" if having else "broken", detail=detail, hint=hint)


def check_cuda(steps: tuple[Step, ...], *, gpu: bool) -> tuple[Finding, ...]:
    """Return a check of the CUDA libraries, and if all of them load, one of each runtime that was tried.

    Args:
        steps: What was tried.
        gpu: Whether a GPU is visible: what does not work is then broken, not just absent.
    """
    bad: Status = "broken" if gpu else "absent"
    runtimes = [step for step in steps if step.name in (SESSION, GENERATOR)]
    faults = [step for step in steps if step.fault is not None and step not in runtimes]
    if faults:
        return (_describe_faults(faults, bad),)
    detail = "all that onnxruntime and onnxruntime-genai need load"
    return Finding(name="cuda libraries", status="ok", detail=detail), *(
        Finding(
            name=step.name, status="ok" if step.fault is None else bad, detail=_tell(step), hint=step.hint
        )
        for step in runtimes
    )


def _describe_faults(faults: list[Step], status: Status) -> Finding:
    missing = [step.name for step in faults if step.missing]
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [str(step.fault) for step in faults if not step.missing]
    if status == "absent":
        parts.append("only a host with an NVIDIA GPU needs them")
    brought = dict(library_names())
    distributions = dict.fromkeys(brought[step.name] for step in faults)
    hint = f"pip install 'llmc[gpu]', or pip install {' '.join(distributions)}"
    return Finding(name="cuda libraries", status=status, detail="; ".join(parts), hint=hint)


def _tell(step: Step) -> str:
    if step.fault is not None:
        return step.fault
    return "computes on the first GPU" if step.name == SESSION else "its library for CUDA loads"
