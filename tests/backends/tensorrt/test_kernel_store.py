"""Kernels that TensorRT-RTX compiled are kept for the next session."""

from pathlib import Path

import pytest

from llmc.backends.tensorrt.kernel_store import KernelStore

ENGINE = "0" * 64
MACHINE = {"device": "NVIDIA L4", "capability": "8.9", "driver": "13000", "library": "tensorrt_rtx 1.7"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))


def test_what_a_session_saves_the_next_one_loads() -> None:
    store = KernelStore(ENGINE, **MACHINE)
    assert store.load() is None
    store.save(b"kernels")
    assert KernelStore(ENGINE, **MACHINE).load() == b"kernels"
    assert KernelStore("1" * 64, **MACHINE).load() is None
    for fact in MACHINE:
        assert KernelStore(ENGINE, **{**MACHINE, fact: "another"}).load() is None


def test_a_damaged_entry_is_ignored(tmp_path: Path) -> None:
    KernelStore(ENGINE, **MACHINE).save(b"kernels")
    (entry,) = (tmp_path / "engine-kernels").iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    store = KernelStore(ENGINE, **MACHINE)
    assert store.load() is None
    store.save(b"kernels")
    assert KernelStore(ENGINE, **MACHINE).load() == b"kernels"


def test_what_was_loaded_is_not_written_again(tmp_path: Path) -> None:
    KernelStore(ENGINE, **MACHINE).save(b"kernels")
    (entry,) = (tmp_path / "engine-kernels").iterdir()
    before = entry.stat().st_mtime_ns
    store = KernelStore(ENGINE, **MACHINE)
    store.save(store.load() or b"")
    assert entry.stat().st_mtime_ns == before
    store.save(b"more kernels")
    assert KernelStore(ENGINE, **MACHINE).load() == b"more kernels"
