"""Steps leave nothing behind: memory of a process that runs thousands of them."""

from pathlib import Path

import numpy as np

from llmc.artifact.store.folder import open_artifact
from llmc.machine import collect_garbage
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.runtime.ort_model import OrtModel
from llmc.validate.footprint import resident_bytes
from tests.models import EOS, VOCAB_SIZE, save_tiny_model

STEPS = 4_000
#: Bytes by which a process may grow in the second half of the steps: half a KiB a step.
MOST = 1 << 20


def test_thousands_of_steps_leave_nothing_behind(tmp_path: Path) -> None:
    source = save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    plan = plan_build(
        str(source), target="cpu-int4-compiled", profile="local", output=tmp_path / "out", verify=False
    )
    build(plan, SilentProgress())
    interface = open_artifact(tmp_path / "out").manifest.interface
    model = OrtModel(tmp_path / "out", interface, threads=1, share_buffer=True)
    ids = np.random.default_rng(0).integers(5, VOCAB_SIZE, (2, 40))

    def run(steps: int) -> int:
        """Resident set after prompts of many lengths, with three decode steps each."""
        for i in range(steps // 4):
            model.prefill(ids[:, : 1 + i % 40], steps=3)
            for _ in range(3):
                model.decode(ids[:, :1])
        collect_garbage()  # so that what is left behind finds no room that was freed before
        return resident_bytes()[1] or 0

    half = run(STEPS // 2)
    assert run(STEPS // 2) - half < MOST
