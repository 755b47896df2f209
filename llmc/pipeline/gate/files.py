"""Steps of the gate that read files and execute nothing of the artifact: settings, tokenizer, weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.config import Family, Metric
from llmc.data import prompts
from llmc.pipeline.gate.run import Run
from llmc.validate import settings
from llmc.validate.measure import measure, mismatches
from llmc.validate.served import ServedTokenizer
from llmc.validate.tokens import measure_tokens

if TYPE_CHECKING:
    from llmc.artifact.verdict import Measurement


def hold_settings(run: Run) -> None:
    """Hold the file by which a runtime serves the artifact against the original and what a build derives."""
    subject, derived = run.subject, run.subject.derived.settings
    with run.progress.stage("settings"):
        if not subject.backend.served_by_genai:
            fine = "generation_config.json and the manifest are what a build derives"
            run.found.append(mismatches(Metric.SERVING, derived, fine, "json, from the files"))
        else:
            run.found.append(
                settings.compare_settings(subject.folder, run.stated, subject.interface, derived)
            )


def hold_tokenizer(run: Run) -> None:
    """Hold the tokenizer and chat template against the original's, in every runtime that reads them.

    Raises:
        ResourceError: onnxruntime-genai is not installed.
    """
    from llmc.backends.onnxruntime.runtime_tokenizer import open_runtime_tokenizer

    folder, record = run.subject.folder, run.subject.text
    files = run.subject.derived.text
    # Some files end the process of the runtime: only those that a build wrote are read in this one.
    by_runtime = record.served and run.subject.backend.served_by_genai and not files
    readers = "onnxruntime-genai on the CPU, and transformers" if by_runtime else "transformers"

    def take() -> tuple[Measurement, ...]:
        served = ServedTokenizer(open_runtime_tokenizer(folder), record) if by_runtime else None
        return measure_tokens(folder, run.codec, served, run.tokenizer, run.text, prompts(), readers, files)

    with run.progress.stage("tokenizer"):
        run.found += measure(Family.TOKENS.metrics, readers, take)


def hold_weights(run: Run) -> None:
    """Hold every stored weight against the checkpoint's."""
    run.found += run.weights.measurements
