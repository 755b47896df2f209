"""Define the facts about hardware; see `Profile`."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmc.records import Strict


class ProfileKind(StrEnum):
    CPU = "cpu"
    GPU = "gpu"


class Throughput(Strict):
    """The dense peak rates by type in TFLOP/s (TOP/s for integers), without sparsity."""

    fp32: float | None = None
    tf32: float | None = None
    fp16: float | None = None
    bf16: float | None = None
    int8: float | None = None
    fp8: float | None = None
    fp4: float | None = None


class Profile(Strict):
    """The facts about one kind of hardware, as in `profiles/*.yaml`.

    Args:
        kind: CPU or GPU.
        device: The maker's name of the device.
        driver_names: Names under which NVIDIA's driver, and so nvidia-smi, lists the device; GPUs only. The
            facts hold for each of them.
        compute_capability: CUDA compute capability such as "8.9"; GPUs only.
        isa: Instruction sets that code may use, by their names in /proc/cpuinfo; CPUs only.
        threads: Number of threads; None uses the physical cores of the machine at hand.
        memory_gib: Memory of the device, GiB.
        bandwidth_gbs: Peak memory bandwidth, GB/s (10**9 bytes).
        dense: Peak rates.
        sources: Source of each stated fact, by field name.
        notes: Remarks for the reader.
    """

    schema_version: Literal[1]
    name: str
    kind: Annotated[ProfileKind, Field(strict=False)]
    device: str
    driver_names: tuple[str, ...] = ()
    compute_capability: str | None = None
    isa: tuple[str, ...] = ()
    threads: int | None = None
    memory_gib: float | None = None
    bandwidth_gbs: float | None = None
    dense: Throughput = Throughput()
    sources: dict[str, str] = Field(default_factory=dict)
    notes: str = ""

    @model_validator(mode="after")
    def _sourced(self) -> "Profile":
        stated = {
            name
            for name in ("compute_capability", "memory_gib", "bandwidth_gbs")
            if getattr(self, name) is not None
        }
        if self.driver_names:
            stated.add("driver_names")
        if any(v is not None for v in self.dense.model_dump().values()):
            stated.add("dense")
        missing = stated - set(self.sources)
        if missing:
            raise ValueError(f"no source for {', '.join(sorted(missing))}")
        return self


def find_profile(name: str, profiles: Iterable[Profile]) -> Profile | None:
    """Return the first profile of the device that the driver lists as `name`; None if there is none."""
    return next((each for each in profiles if name in (each.device, *each.driver_names)), None)
