"""Energy by counters of the hardware: the processor's (RAPL), and those of NVIDIA GPUs (NVML).

Linux gives RAPL's as files below /sys/class/powercap. A zone's `energy_uj` counts microjoules and begins anew
at `max_energy_range_uj`
(https://www.kernel.org/doc/html/latest/power/powercap/powercap.html). A package's counter holds its cores;
memory has one of its own on servers. NVML's `nvmlDeviceGetTotalEnergyConsumption` counts millijoules of a GPU
with its memory since the driver was loaded, from Volta on
(https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html). Counters are of the whole device, so
whatever else runs, and the idle device itself, is in the figure.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmc.errors import ResourceError

POWERCAP = Path("/sys/class/powercap")

#: Zones that do not hold each other: cores, graphics and the platform (psys) overlap with packages.
_ZONE = re.compile(r"intel-rapl:\d+(:\d+)?")
_NAME = re.compile(r"package-\d+|dram")


class Counter(Protocol):
    """Energy of one kind of device."""

    @property
    def where(self) -> str:
        """Which counters these are."""
        ...

    def read(self) -> tuple[int, ...]:
        """What each says so far."""
        ...

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Energy between two readings."""
        ...


@dataclass(frozen=True)
class Zone:
    """One counter: its file, and the count in microjoules after which it is zero again."""

    name: str
    path: Path
    range_uj: int


@dataclass(frozen=True)
class EnergyCounter:
    """The counters of a machine that together are what its processors and their memory take.

    Args:
        zones: At least one.
    """

    zones: tuple[Zone, ...]

    @property
    def where(self) -> str:
        """Which counters these are."""
        return f"RAPL {', '.join(sorted(zone.name for zone in self.zones))}; all that the processor does"

    def read(self) -> tuple[int, ...]:
        """Microjoules of each zone so far."""
        return tuple(int(zone.path.read_text(encoding="ascii")) for zone in self.zones)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Energy between two readings, between which a counter began anew at most once."""
        spent = 0
        for zone, first, last in zip(self.zones, before, after, strict=True):
            spent += last - first if last >= first else last - first + zone.range_uj
        return spent / 1e6


def open_counter(folder: Path = POWERCAP) -> EnergyCounter:
    """The machine's counters.

    Raises:
        ResourceError: It has none, or they may not be read.
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
        raise ResourceError("no energy counter on this machine", hint="RAPL counters are not shown to guests")
    return EnergyCounter(tuple(zones))


@dataclass(frozen=True)
class GpuCounter:
    """The counters of all NVIDIA GPUs of a machine.

    Args:
        nvml: The module pynvml, initialized.
        handles: One of its handles for each GPU, at least one.
        names: What NVML calls them.
    """

    nvml: Any
    handles: tuple[Any, ...]
    names: tuple[str, ...]

    @property
    def where(self) -> str:
        """Which counters these are."""
        return f"NVML {', '.join(self.names)}; all that the GPU does"

    def read(self) -> tuple[int, ...]:
        """Millijoules of each GPU so far."""
        return tuple(int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in self.handles)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Energy between two readings."""
        return (sum(after) - sum(before)) / 1e3


def open_gpu_counter() -> GpuCounter:
    """The counters of the machine's NVIDIA GPUs.

    Raises:
        ResourceError: There is no GPU, it does not count, or nvidia-ml-py is not installed.
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
        raise ResourceError("no energy counter of an NVIDIA GPU: there is none")
    return counter
