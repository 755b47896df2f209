"""RAPL counters in a folder as Linux lays it out."""

import os
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.errors import ResourceError
from llmc.validate.energy import open_counter, open_gpu_counter
from llmc.validate.latency import Schedule, measure_latency
from llmc.validate.reference import TorchModel

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
        with pytest.raises(ResourceError, match=r"no energy counter of an NVIDIA GPU: .*Library Not Found"):
            open_gpu_counter()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ResourceError, match=r"nvidia-ml-py, which reads .* is not installed") as caught:
        open_gpu_counter()
    assert caught.value.hint == "pip install 'llmc[nvml]'"


def test_joules_of_decoded_tokens(llama: Any, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path / "model", Variant(logits="last"))
    file = write_zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 0, most=1 << 60)
    over = threading.Event()

    def spend() -> None:
        count = 0
        while not over.wait(1e-4):
            count += 1_000_000
            (tmp_path / "next").write_text(f"{count}\n")
            os.replace(tmp_path / "next", file)

    thread = threading.Thread(target=spend)
    thread.start()
    try:
        latency = measure_latency(
            timed_graph(tmp_path / "model", interface), TorchModel(llama), partial(build, "LlamaConfig"),
            tokens=np.array([5, 6, 7]), profile=PROFILE, threads=1,
            schedule=Schedule(
                prompts=(8,), contexts=(8,), batches=(), prefill_rounds=1, decode_rounds=2, decode_tokens=60,
                footprint_rounds=1,
            ),
            counters=tmp_path / "powercap",
        )  # fmt: skip
    finally:
        over.set()
        thread.join()
    (decode,) = latency.decode
    assert latency.energy.startswith("RAPL package-0; everything that the processor does; GPU: ")
    assert decode.artifact_joules_per_token is not None
    assert decode.original_joules_per_token is not None
    # Whole joules of two turns, over their tokens.
    for value in (decode.artifact_joules_per_token, decode.original_joules_per_token):
        assert value > 0
        assert value * decode.artifact.n == pytest.approx(round(value * decode.artifact.n))
