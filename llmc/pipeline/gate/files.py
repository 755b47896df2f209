"""Check settings, tokenizer and weights: the steps of the gate that only read the artifact's files."""

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
    """Compare the file by which a runtime serves the artifact with the original and with a build."""
    subject, derived = run.subject, run.subject.derived.settings
    with run.progress.stage("settings"):
        if not subject.backend.served_by_genai:
            fine = f"{subject.backend.serving_file} and the manifest match what a build derives"
            run.found.append(mismatches(Metric.SERVING, derived, fine, "json, from the files"))
        else:
            run.found.append(
                settings.compare_settings(subject.folder, run.stated, subject.interface, derived)
            )


def hold_tokenizer(run: Run) -> None:
    """Compare tokenizer and chat template with the original's, in every runtime that reads them.

    Raises:
        ResourceError: onnxruntime-genai is not installed.
    """
    from llmc.backends.onnxruntime.runtime_tokenizer import open_runtime_tokenizer

    folder, record = run.subject.folder, run.subject.text
    files = run.subject.derived.text
    # Some files crash the process of the runtime: this one reads only files that a build wrote.
    by_runtime = record.served and run.subject.backend.served_by_genai and not files
    readers = "onnxruntime-genai on the CPU, and transformers" if by_runtime else "transformers"

    def take() -> tuple[Measurement, ...]:
        served = ServedTokenizer(open_runtime_tokenizer(folder), record) if by_runtime else None
        return measure_tokens(folder, run.codec, served, run.tokenizer, run.text, prompts(), readers, files)

    with run.progress.stage("tokenizer"):
        run.found += measure(Family.TOKENS.metrics, readers, take)


def hold_weights(run: Run) -> None:
    """Compare every stored weight with the checkpoint's."""
    run.found += run.weights.measurements
