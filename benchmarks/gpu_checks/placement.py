"""Count where ONNX Runtime places the nodes of an artifact's graph, by the profile of a decode step."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from gpu_checks.checks import Check, Found
from gpu_checks.room import Room
from llmc.runtime.libraries import CUDA_PROVIDER


def check_placement(room: Room, check: Check) -> Found:
    """Count the nodes of a decode step by provider, the nodes off the GPU by operator, and copies."""
    with tempfile.TemporaryDirectory() as scratch:
        session = room.on_device(check.subject, profile=Path(scratch) / "profile")
        session.prefill(np.array([[5, 6, 7, 8]]), steps=1)
        session.decode(np.array([[9]]))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = [e["ts"] for e in events if e.get("name") == "model_run"]
    kernels = [e for e in events if e.get("cat") == "Node" and str(e["name"]).endswith("_kernel_time")]
    last = [e["args"] for e in kernels if e["ts"] >= max(runs)]
    providers = Counter(str(each["provider"]) for each in last)
    elsewhere = Counter(str(each["op_name"]) for each in last if each["provider"] != CUDA_PROVIDER)
    copies = sum(n for name, n in Counter(str(each["op_name"]) for each in last).items() if "Memcpy" in name)
    return Found({"nodes": dict(providers), "off_the_gpu": dict(elsewhere), "copies_between_devices": copies})
