"""Compare what CUDA's kernels compute with the same graph on the CPU, and with PyTorch."""

from __future__ import annotations

from gpu_checks.checks import Check, Found
from gpu_checks.original import expected_logits
from gpu_checks.room import Room
from gpu_checks.walk import bounds_of, compare, walk, walk_tokens


def check_parity(room: Room, check: Check) -> Found:
    """Compare the graph on the GPU with the same graph on the CPU, both in the served arithmetic."""
    subject = check.subject
    manifest = room.artifact(subject).manifest
    tokens = walk_tokens(manifest)
    device = room.on_device(subject)
    figures, beyond = compare(bounds_of(manifest), walk(device, tokens), walk(room.on_cpu(subject), tokens))
    return Found({**figures, "where": device.where}, beyond)


def check_original(room: Room, check: Check) -> Found:
    """Compare the graph, on the GPU if there is one, with PyTorch in float32 with the artifact's weights."""
    subject = check.subject
    manifest = room.artifact(subject).manifest
    expected = expected_logits(subject, room.settings.artifacts)
    session = room.on_device(subject) if room.settings.cuda else room.on_cpu(subject)
    figures, beyond = compare(bounds_of(manifest), walk(session, walk_tokens(manifest)), expected)
    return Found({**figures, "where": session.where}, beyond)
