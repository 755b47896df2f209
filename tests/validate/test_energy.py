"""RAPL counters in a folder as Linux lays it out."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.errors import ResourceError
from llmc.validate.energy import energy_of_steps, open_counter, open_gpu_counter
from llmc.validate.latency import Schedule, measure_latency
from llmc.validate.reference import TorchModel
from tests.cuda import stub_environment

from .conftest import build
from .decoder import Variant, timed_graph, write_decoder
from .test_latency import PROFILE


def write_zone(folder: Path, entry: str, name: str, energy: int, most: int = 1_000_000) -> Path:
    zone = folder / entry
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "max_energy_range_uj").write_text(f"{most}\n")
    (zone / "energy_uj").write_text(f"{energy}\n")
    return zone / "energy_uj"


def test_packages_and_memory_are_added_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    first = write_zone(tmp_path, "intel-rapl:0", "package-0", 100)
    second = write_zone(tmp_path, "intel-rapl:1", "package-1", 200)
    memory = write_zone(tmp_path, "intel-rapl:0:1", "dram", 300)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 1)
    write_zone(tmp_path, "intel-rapl:2", "psys", 1)
    write_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1)
    counter = open_counter(tmp_path)
    assert counter.where == "RAPL dram, package-0, package-1; everything that the processor does"
    before = counter.read()
    for file, count in ((first, 1_000_100), (second, 500_200), (memory, 250_300)):
        file.write_text(f"{count}\n")
    assert counter.joules(before, counter.read()) == pytest.approx(1.75)


def test_a_counter_that_begins_anew(tmp_path: Path) -> None:
    file = write_zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    counter = open_counter(tmp_path)
    before = counter.read()
    file.write_text("150000\n")
    assert counter.joules(before, counter.read()) == pytest.approx(0.25)


def test_no_counter(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ResourceError, match="this machine has no energy counter"):
            open_counter(folder)


def test_a_counter_that_may_not_be_read(tmp_path: Path) -> None:
    file = write_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    file.write_text("\n")
    with pytest.raises(ResourceError, match=r"intel-rapl:0 cannot be read: invalid literal"):
        open_counter(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(ResourceError, match=r"intel-rapl:0 cannot be read: Is a directory") as caught:
        open_counter(tmp_path)
    assert "root" in str(caught.value.hint)


def test_no_gpu_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver, and without the library."""
    if not Path("/proc/driver/nvidia").exists():
        with pytest.raises(ResourceError, match=r"NVML does not find the GPU GPU-1: .*Library Not Found"):
            open_gpu_counter("GPU-1")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ResourceError, match=r"nvidia-ml-py, which reads .* is not installed") as caught:
        open_gpu_counter("GPU-1")
    assert caught.value.hint == "pip install 'llmc[nvml]'"


OF_ONE_GPU = """
import time
from llmc.gpu import gpus
from llmc.validate.energy import energy_of_steps, open_gpu_counter
counter = open_gpu_counter(gpus()[0].uuid)
(joules,) = energy_of_steps(lambda: time.sleep(0.01), [counter], 0.4)
print(counter.where, joules)
"""


def test_only_the_gpu_that_is_used_is_counted(cuda_stub: Path) -> None:
    # The stub's first GPU takes 100 W, its second 200 W; this process sees the second.
    machine = stub_environment(cuda_stub, capability="9.0,8.9", name="NVIDIA H200,NVIDIA L4")
    machine["CUDA_VISIBLE_DEVICES"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", OF_ONE_GPU], env=machine, capture_output=True, text=True, check=True
    )
    where, _, joules = done.stdout.strip().rpartition(" ")
    assert where == "NVML NVIDIA L4; everything that this GPU does"
    assert 200 * 0.01 <= float(joules) < 200 * 0.02


class Ticking:
    """A counter of 1 W that advances every `period` seconds, as NVML's do."""

    where = "a test"

    def __init__(self, period: float) -> None:
        self.period = period
        self.reads = 0

    def read(self) -> tuple[int, ...]:
        self.reads += 1
        return (int(time.perf_counter() / self.period),)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        return (after[0] - before[0]) * self.period


def test_a_window_is_from_one_change_of_the_counter_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Ticking(0.1), Ticking(0.001)
    seconds, steps = 0.0021, 0
    monkeypatch.setattr(time, "perf_counter", lambda: steps * seconds)

    def step() -> None:
        nonlocal steps
        steps += 1

    found = energy_of_steps(step, [slow, None, fast], 0.5)
    assert found[1] is None
    for joules in (found[0], found[2]):
        assert joules == pytest.approx(seconds, rel=0.01)  # a window of 0.5 s of a counter of 0.1 s: 20 %
    assert fast.reads < steps / 2  # not read within its window


def test_a_counter_that_stands_still_measures_nothing() -> None:
    start = time.perf_counter()
    assert energy_of_steps(lambda: time.sleep(0.01), [Ticking(1e6)], 0.2) == (None,)
    assert 1 < time.perf_counter() - start < 1.5


def test_joules_of_decoded_tokens(llama: Any, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path / "model", Variant(logits="last"))
    file = write_zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 0, most=1 << 60)
    over = threading.Event()

    def spend() -> None:
        start = time.perf_counter()
        while not over.wait(1e-3):
            (tmp_path / "next").write_text(f"{int(50e6 * (time.perf_counter() - start))}\n")  # 50 W
            os.replace(tmp_path / "next", file)

    thread = threading.Thread(target=spend)
    thread.start()
    try:
        latency = measure_latency(
            timed_graph(tmp_path / "model", interface), TorchModel(llama), partial(build, "LlamaConfig"),
            tokens=np.array([5, 6, 7]), profile=PROFILE, threads=1,
            schedule=Schedule(
                prompts=(8,), contexts=(8,), batches=(), prefill_rounds=1, decode_rounds=2, decode_tokens=60,
                footprint_rounds=1, energy_seconds=0.3,
            ),
            counters=tmp_path / "powercap",
        )  # fmt: skip
    finally:
        over.set()
        thread.join()
    (decode,) = latency.decode
    said = "RAPL package-0; everything that the processor does, over 0.3 s or more; GPU: not used"
    assert latency.energy == said
    for joules, steps in (
        (decode.artifact_joules_per_token, decode.artifact),
        (decode.original_joules_per_token, decode.original),
    ):
        assert joules is not None
        assert 50e-3 * steps.min_ms <= joules <= 50e-3 * 3 * steps.max_ms
