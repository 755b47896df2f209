"""Measure energy by counters of the hardware: the processor's (RAPL) and those of NVIDIA GPUs (NVML).

Linux exposes RAPL as files below /sys/class/powercap. A zone's `energy_uj` counts microjoules and wraps
around at `max_energy_range_uj` (https://www.kernel.org/doc/html/latest/power/powercap/powercap.html). A
package's counter includes its cores; memory has a counter of its own on servers. NVML's
`nvmlDeviceGetTotalEnergyConsumption` counts millijoules of a GPU with its memory since the driver was loaded,
from Volta on (https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html). Counters cover the
whole device, so that the figure includes everything else that runs and the idle device itself.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmc.errors import ResourceError

POWERCAP = Path("/sys/class/powercap")

#: Zones that do not include each other: cores, graphics and the platform (psys) overlap with packages.
_ZONE = re.compile(r"intel-rapl:\d+(:\d+)?")
_NAME = re.compile(r"package-\d+|dram")


class Counter(Protocol):
    """The energy counters of one kind of device."""

    @property
    def where(self) -> str:
        """The names of the counters."""
        ...

    def read(self) -> tuple[int, ...]:
        """Read the current value of each counter."""
        ...

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Return the energy between two readings."""
        ...


@dataclass(frozen=True)
class Zone:
    """The file of one counter, and the count in microjoules after which it is zero again."""

    name: str
    path: Path
    range_uj: int


@dataclass(frozen=True)
class EnergyCounter:
    """The counters of a machine that together cover its processors and their memory.

    Args:
        zones: The counters, at least one.
    """

    zones: tuple[Zone, ...]

    @property
    def where(self) -> str:
        """The names of the counters."""
        return (
            f"RAPL {', '.join(sorted(zone.name for zone in self.zones))}; everything that the processor does"
        )

    def read(self) -> tuple[int, ...]:
        """Read the microjoules of each zone so far."""
        return tuple(int(zone.path.read_text(encoding="ascii")) for zone in self.zones)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Return the energy between two readings, between which a counter wrapped around at most once."""
        spent = 0
        for zone, first, last in zip(self.zones, before, after, strict=True):
            spent += last - first if last >= first else last - first + zone.range_uj
        return spent / 1e6


def open_counter(folder: Path = POWERCAP) -> EnergyCounter:
    """Open the machine's energy counters.

    Raises:
        ResourceError: The machine has no energy counter, or the counter cannot be read.
    """
    zones = []
    for entry in sorted(folder.glob("intel-rapl:*")):
        if not _ZONE.fullmatch(entry.name):
            continue
        try:
            name = (entry / "name").read_text(encoding="ascii").strip()
            if not _NAME.fullmatch(name):
                continue
            zone = Zone(name, entry / "energy_uj", int((entry / "max_energy_range_uj").read_text("ascii")))
            int(zone.path.read_text(encoding="ascii"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ResourceError(
                f"the energy counter {entry} cannot be read: {reason}",
                hint="most systems let only root read energy_uj: chmod a+r it until the next start",
            ) from error
        zones.append(zone)
    if not zones:
        raise ResourceError("this machine has no energy counter", hint="guests do not see RAPL counters")
    return EnergyCounter(tuple(zones))


@dataclass(frozen=True)
class GpuCounter:
    """The counters of all NVIDIA GPUs of a machine.

    Args:
        nvml: The module pynvml, initialized.
        handles: NVML's handle of each GPU, at least one.
        names: NVML's names of the GPUs.
    """

    nvml: Any
    handles: tuple[Any, ...]
    names: tuple[str, ...]

    @property
    def where(self) -> str:
        """The names of the counters."""
        return f"NVML {', '.join(self.names)}; everything that the GPU does"

    def read(self) -> tuple[int, ...]:
        """Read the millijoules of each GPU so far."""
        return tuple(int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in self.handles)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Return the energy between two readings."""
        return (sum(after) - sum(before)) / 1e3


def open_gpu_counter() -> GpuCounter:
    """Open the counters of the machine's NVIDIA GPUs.

    Raises:
        ResourceError: There is no GPU, it has no energy counter, or nvidia-ml-py is not installed.
    """
    try:
        import pynvml
    except ImportError as error:
        raise ResourceError(
            "nvidia-ml-py, which reads the energy of NVIDIA GPUs, is not installed",
            hint="pip install 'llmc[nvml]'",
        ) from error
    try:
        pynvml.nvmlInit()
        handles = tuple(pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount()))
        counter = GpuCounter(pynvml, handles, tuple(str(pynvml.nvmlDeviceGetName(h)) for h in handles))
        counter.read()
    except pynvml.NVMLError as error:
        raise ResourceError(f"no energy counter of an NVIDIA GPU: {error}") from error
    if not handles:
        raise ResourceError("no energy counter of an NVIDIA GPU: the machine has no such GPU")
    return counter
