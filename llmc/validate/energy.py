"""Measure energy by counters of the hardware: the processor's (RAPL) and an NVIDIA GPU's (NVML).

Linux exposes RAPL as files below /sys/class/powercap. A zone's `energy_uj` counts microjoules and wraps
around at `max_energy_range_uj` (https://www.kernel.org/doc/html/latest/power/powercap/powercap.html). A
package's counter includes its cores; memory has a counter of its own on servers. NVML's
`nvmlDeviceGetTotalEnergyConsumption` counts millijoules of a GPU with its memory since the driver was loaded,
from Volta on (https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html). Counters cover the
whole device, so that the figure includes everything else that runs and the idle device itself.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from llmc.errors import ResourceError
from llmc.gpu import Gpu

POWERCAP = Path("/sys/class/powercap")
#: Seconds after which a counter that has not changed is taken to be broken.
_STILL_SECONDS = 1.0

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
    """The counter of an NVIDIA GPU.

    Args:
        nvml: The module pynvml, initialized.
        handle: NVML's handle of the GPU.
        name: NVML's name of it.
    """

    nvml: Any
    handle: Any
    name: str

    @property
    def where(self) -> str:
        """The name of the counter."""
        return f"NVML {self.name}; everything that this GPU does"

    def read(self) -> tuple[int, ...]:
        """Read the millijoules of the GPU so far."""
        return (int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)),)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Return the energy between two readings."""
        return (after[0] - before[0]) / 1e3


def open_nvml(uuid: str) -> tuple[Any, Any]:
    """Return the module pynvml, initialized, and the handle of one NVIDIA GPU.

    Args:
        uuid: The driver's name of it, "GPU-...".

    Raises:
        ResourceError: nvidia-ml-py, its library or the GPU is missing.
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
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        raise ResourceError(f"NVML does not find the GPU {uuid}: {error}") from error


def open_gpu_counter(uuid: str) -> GpuCounter:
    """Open the counter of one NVIDIA GPU.

    Args:
        uuid: The driver's name of it, "GPU-...".

    Raises:
        ResourceError: NVML does not find the GPU, or the GPU has no energy counter.
    """
    nvml, handle = open_nvml(uuid)
    try:
        counter = GpuCounter(nvml, handle, str(nvml.nvmlDeviceGetName(handle)))
        counter.read()
    except nvml.NVMLError as error:
        raise ResourceError(f"the GPU {uuid} has no energy counter: {error}") from error
    return counter


#: Energy counters of the processor and of the GPU that is used; None without a counter.
Meters = tuple[Counter | None, Counter | None]


class _Window:
    """The time between two changes of a counter, and the steps in it.

    A counter that advances every 20 to 100 ms is up to as much time behind: its readings are therefore taken
    when it changes.
    """

    def __init__(self, counter: Counter, seconds: float) -> None:
        self._counter = counter
        self._seconds = seconds
        self._first: tuple[tuple[int, ...], int] | None = None
        self._resume = self._since = 0.0
        self._last: tuple[int, ...] | None = None
        self.joules_per_step: float | None = None
        self.over = False

    def after(self, steps: int, now: float) -> None:
        """Look at the counter after so many steps, except while the window is short of its length."""
        if self.over or now < self._resume:
            return
        reading = self._counter.read()
        if self._last is None:
            self._last, self._since = reading, now
        elif reading == self._last:
            self.over = now - self._since > _STILL_SECONDS
        elif self._first is None:
            self._first, self._last, self._resume = (reading, steps), None, now + self._seconds
        else:
            before, begun = self._first
            self.joules_per_step = self._counter.joules(before, reading) / (steps - begun)
            self.over = True


def energy_of_steps(
    step: Callable[[], object], counters: Sequence[Counter | None], seconds: float
) -> tuple[float | None, ...]:
    """Repeat a step for at least `seconds`, from one change of each counter to another.

    Returns:
        Joules per step by each counter; None without a counter, or if it does not change.
    """
    windows = [None if counter is None else _Window(counter, seconds) for counter in counters]
    steps = 0
    while any(window is not None and not window.over for window in windows):
        step()
        steps += 1
        now = time.perf_counter()
        for window in windows:
            if window is not None:
                window.after(steps, now)
    return tuple(None if window is None else window.joules_per_step for window in windows)


def find_meters(folder: Path, gpu: Gpu | None, seconds: float) -> tuple[Meters, str]:
    """Open the energy counters, and say what they cover or why there are none."""
    meters: list[Counter | None] = []
    descriptions = []
    openers: list[Callable[[], Counter]] = [partial(open_counter, folder)]
    if gpu is not None:
        openers.append(partial(open_gpu_counter, gpu.uuid))
    for opener in openers:
        try:
            counter = opener()
        except ResourceError as error:
            meters.append(None)
            descriptions.append(f"not measured: {error.fact}")
        else:
            meters.append(counter)
            descriptions.append(f"{counter.where}, over {seconds:g} s or more")
    if gpu is None:
        return (meters[0], None), f"{descriptions[0]}; GPU: not used"
    return (meters[0], meters[1]), f"{descriptions[0]}; GPU: {descriptions[1]}"
