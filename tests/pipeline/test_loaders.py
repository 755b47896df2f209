"""The comparison of loaders as a figure of the gate: remembered, or not applicable with the reason."""

from pathlib import Path

import pytest

from llmc.artifact.verdict import MeasurementStatus
from llmc.checkpoint import Checkpoint, open_checkpoint
from llmc.checkpoint.agreement import Agreement
from llmc.pipeline.gate.loaders import measure_loaders
from llmc.progress import SilentProgress
from tests.models import save_tiny_model

DIGEST = "0" * 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(save_tiny_model("llama", tmp_path_factory.mktemp("llama"))))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))


def answer(monkeypatch: pytest.MonkeyPatch, agreement: Agreement) -> None:
    monkeypatch.setattr(Checkpoint, "compare_loaders", lambda self: agreement)


def test_equal_and_remembered(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    made = measure_loaders(checkpoint, DIGEST, SilentProgress())
    assert made.value == 0
    assert made.detail.endswith("parameters are equal")
    answer(monkeypatch, Agreement(("x differs",), 1))
    monkeypatch.setattr("llmc.pipeline.gate.loaders.available_memory", lambda: 0)
    assert measure_loaders(checkpoint, DIGEST, SilentProgress()) == made
    assert measure_loaders(checkpoint, "1" * 64, SilentProgress()).status is MeasurementStatus.NOT_APPLICABLE


def test_mismatches_are_counted_and_named(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, Agreement(("a differs", "b differs"), 9))
    made = measure_loaders(checkpoint, DIGEST, SilentProgress())
    assert (made.value, made.detail) == (2, "a differs; b differs")


def test_not_enough_memory(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.pipeline.gate.loaders.available_memory", lambda: 10**5)
    made = measure_loaders(checkpoint, DIGEST, SilentProgress())
    assert made.status is MeasurementStatus.NOT_APPLICABLE
    assert "own loader: 0.0 GB needed, 0.0 GB free" in made.detail


def test_what_transformers_cannot_load_is_tried_again(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, Agreement(left_out="it lacks a package"))
    assert "own loader: it lacks a package" in measure_loaders(checkpoint, DIGEST, SilentProgress()).detail
    answer(monkeypatch, Agreement((), 3, "the rest is in codes"))
    assert measure_loaders(checkpoint, DIGEST, SilentProgress()).value == 0
