"""Build the artifacts that checks need, or draw the weights of those that were carried without them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from gpu_checks.checks import Check, Found
from gpu_checks.original import expected_logits
from gpu_checks.room import Room
from gpu_checks.seeded import drop_weights
from gpu_checks.subjects import LARGE, Subject, build_subject
from llmc.errors import LlmcError


def check_build(room: Room, check: Check) -> Found:
    """Build an artifact without its gates."""
    artifacts = room.settings.artifacts
    if not check.subject.is_built(artifacts):
        build_subject(check.subject, artifacts, room.settings.profile)
    return Found({"bytes": folder_bytes(check.subject.folder(artifacts))})


def prepare(subjects: Iterable[Subject], artifacts: Path, profile: str, *, drop: bool) -> bool:
    """Build every artifact and the original's logits where there is no GPU, and print what they hold.

    Args:
        drop: Whether large weights of the demo's and the larger shape are left out, to be drawn from a seed.

    Returns:
        Whether all of them were built.
    """
    complete = True
    for subject in subjects:
        start = time.monotonic()
        try:
            if not subject.is_built(artifacts):
                build_subject(subject, artifacts, profile)
            if subject.tiny or (subject.source == "demo" and not drop):
                expected_logits(subject, artifacts)
            if drop and not subject.tiny:
                drop_weights(subject.folder(artifacts))
        except LlmcError as error:
            complete = False
            print(f"{subject.name:24} failed: {error.fact}", flush=True)
            continue
        size = folder_bytes(subject.folder(artifacts))
        print(f"{subject.name:24} {size / 1e6:8.1f} MB {time.monotonic() - start:6.1f} s", flush=True)
    if drop:
        shutil.rmtree(artifacts / "checkpoints" / LARGE, ignore_errors=True)
    print(f"{artifacts}: {folder_bytes(artifacts) / 2**20:.1f} MiB", flush=True)
    return complete


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
