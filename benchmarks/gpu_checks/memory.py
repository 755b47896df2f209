"""Measure the memory of the GPU that an artifact needs, and the energy of its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_checks.checks import Check, Found
from gpu_checks.room import Room, drawn_tokens, largest_context, require_torch_cuda
from gpu_checks.sides import SessionSide, Side, TorchSide
from llmc.artifact.manifest import MODEL
from llmc.errors import ResourceError
from llmc.gpu import gpu_memory_in_use, require_gpu
from llmc.runtime.product import product_error
from llmc.validate.energy import GpuCounter, energy_of_steps, open_gpu_counter

#: Least seconds of decoding over which energy is counted, and steps before each return to the same context.
WINDOW, STEPS = 2.0, 32


def check_memory(room: Room, check: Check) -> Found:
    """Measure device memory after loading an artifact, and after a prompt and a step; then PyTorch's.

    Memory that was in use before, such as CUDA's own context, is not counted.
    """
    subject = check.subject
    artifact = room.artifact(subject)
    length = largest_context(artifact.manifest, check.point.context, 2)
    ids = drawn_tokens(artifact.manifest, check.point.batch, length)
    product_error()  # makes CUDA's context and cuBLAS's, whose memory does not belong to the artifact
    before = gpu_memory_in_use()
    session = SessionSide(room.on_device(subject, chooses=True))
    loaded = gpu_memory_in_use() - before
    session.step(session.prefill(ids, 2))
    figures: dict[str, Any] = {
        "files_bytes": sum(f.stat().st_size for f in artifact.path.glob(f"{MODEL}*")),
        "loaded_bytes": loaded,
        "after_a_prompt_bytes": gpu_memory_in_use() - before,
        "context": length,
    }
    try:
        torch = require_torch_cuda()
        model = TorchSide(room.original(subject), compiled=False)
        figures["torch_loaded_bytes"] = torch.cuda.memory_reserved()
        model.step(model.prefill(ids, 2))
        figures["torch_after_a_prompt_bytes"] = torch.cuda.memory_reserved()
    except ResourceError as error:
        figures["torch_not_measured"] = error.fact
    return Found(figures)


def check_energy(room: Room, check: Check) -> Found:
    """Count the joules of a decoded token, for the artifact and for PyTorch run eagerly."""
    subject = check.subject
    manifest = room.artifact(subject).manifest
    counter = open_gpu_counter(require_gpu().uuid)
    context = largest_context(manifest, check.point.context, STEPS)
    ids = drawn_tokens(manifest, check.point.batch, context)
    figures: dict[str, Any] = {"context": context, "window_s": WINDOW, "where": counter.where}
    figures["joules_per_token"] = _joules(SessionSide(room.on_device(subject, chooses=True)), ids, counter)
    try:
        model = TorchSide(room.original(subject), compiled=False)
        figures["torch_joules_per_token"] = _joules(model, ids, counter)
    except ResourceError as error:
        figures["torch_not_measured"] = error.fact
    return Found(figures)


def _joules(side: Side, ids: np.ndarray, counter: GpuCounter) -> float:
    """Return joules of a token, steps of all rows counted.

    Raises:
        ResourceError: The counter stands still.
    """
    first = side.prefill(ids, STEPS)

    def decode() -> None:
        token = first
        for _ in range(STEPS):
            token = side.step(token)
        side.back(STEPS)

    decode()
    (joules,) = energy_of_steps(decode, (counter,), WINDOW)
    if joules is None:
        raise ResourceError(f"the counter of {counter.where} stands still")
    return joules / (STEPS * len(ids))
