"""Measure time by kind of operator with ONNX Runtime's own profiler."""

import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from llmc.arrays import Array
from llmc.artifact.latency import OperatorTime
from llmc.runtime.ort_model import OrtModel

#: Number of decode steps that are profiled, after as many that are not counted.
STEPS = 8


def profile_decode(model: OrtModel, prompt: Array) -> tuple[OperatorTime, ...]:
    """Measure the time of each kind of operator in a decode step after `prompt` (sequence,), slowest first.

    A separate session is profiled, since profiling costs time. The format is Chrome's trace format: an event
    of category Node for each run of a kernel, with its duration in microseconds.
    """
    with TemporaryDirectory() as folder:
        profiled = model.profiled(Path(folder) / "profile")
        profiled.prefill(prompt[None], steps=2 * STEPS)
        for _ in range(2 * STEPS):
            profiled.decode(np.array([[1]]))
        events = json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8"))
    runs = [e for e in events if e.get("name") == "model_run"]
    since = sorted(e["ts"] for e in runs)[-STEPS]
    micro: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= since:
            name = event["args"]["op_name"]
            micro[name] += event["dur"]
            calls[name] += 1
    return tuple(
        OperatorTime(name=name, calls=calls[name] // STEPS, ms=total / 1e3 / STEPS)
        for name, total in micro.most_common()
    )
