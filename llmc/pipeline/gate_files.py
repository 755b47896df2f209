"""Steps of the gate that read files and execute nothing of the artifact: settings, tokenizer, weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.config import Metric
from llmc.pipeline.gate_run import Run

if TYPE_CHECKING:
    from llmc.artifact.verdict import Measurement


def compare_settings(run: Run) -> None:
    """Hold genai_config.json against the original and the interface."""
    from llmc.validate import settings

    with run.progress.stage("settings"):
        run.found.append(settings.compare_settings(run.subject.folder, run.stated, run.subject.interface))


def compare_tokenizer(run: Run) -> None:
    """Hold the tokenizer and chat template against the original's, in every runtime that reads them.

    Raises:
        ResourceError: onnxruntime-genai is not installed.
    """
    from llmc.backends.runtime_tokenizer import open_runtime_tokenizer
    from llmc.data import prompts
    from llmc.validate.measure import measure
    from llmc.validate.served import ServedTokenizer
    from llmc.validate.tokens import measure_tokens

    folder, record = run.subject.folder, run.subject.text
    by_runtime = record.served and not run.subject.interface.static_cache
    readers = "onnxruntime-genai on the CPU, and transformers" if by_runtime else "transformers"

    def take() -> tuple[Measurement, ...]:
        served = ServedTokenizer(open_runtime_tokenizer(folder), record) if by_runtime else None
        return measure_tokens(folder, run.codec, served, run.tokenizer, run.text, prompts(), readers)

    with run.progress.stage("tokenizer"):
        run.found += measure((Metric.TOKENIZER_EQUAL, Metric.CHAT_EQUAL), readers, take)


def compare_weights(run: Run) -> None:
    """Hold every stored weight against the checkpoint's."""
    with run.progress.stage("weights"):
        run.found += run.weights.measurements
