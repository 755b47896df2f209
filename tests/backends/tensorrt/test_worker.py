"""The process that builds an engine gets the variables that it needs."""

import json
import sys
from pathlib import Path

import pytest

from llmc.backends.tensorrt.support import EnginePlan, Library
from llmc.backends.tensorrt.worker import build_apart
from llmc.config import Engine, Span
from llmc.errors import ResourceError

ENGINE = Engine(
    kv_capacity=64, batch=Span(least=1, typical=1, most=1), prefill=Span(least=1, typical=8, most=8)
)


def test_it_builds_on_the_gpu_that_this_process_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tensorrt` builds for CUDA's first device, which these variables decide."""
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, os\n"
        "json.dump(dict(os.environ), open('seen.json', 'w'))\nraise SystemExit(3)\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr("llmc.backends.tensorrt.worker.sys.executable", str(python))
    chosen = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    for name, value in {**chosen, "OF_NO_USE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match="the process that builds the engine for SM90 ended with 3"):
        build_apart(tmp_path, EnginePlan(Library.TENSORRT, ("SM90",), ("h200",)), ENGINE)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {name: seen.get(name) for name in chosen} == chosen
    assert "OF_NO_USE" not in seen
