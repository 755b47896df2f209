"""Measure the memory of the GPU that an artifact needs, and the energy of its tokens."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from gpu_checks.checks import Check, Found
from gpu_checks.machine import multiply
from gpu_checks.room import Room, drawn_tokens, largest_context, require_torch_cuda
from gpu_checks.sides import SessionSide, Side, TorchSide
from llmc.artifact.manifest import MODEL
from llmc.errors import ResourceError
from llmc.gpu import require_gpu
from llmc.runtime.libraries import library_names, require_cuda
from llmc.validate.energy import GpuCounter, energy_of_steps, open_gpu_counter

#: Least seconds of decoding over which energy is counted, and steps before each return to the same context.
WINDOW, STEPS = 2.0, 32


def check_memory(room: Room, check: Check) -> Found:
    """Measure device memory after loading an artifact, and after a prompt and a step; then that of PyTorch.

    What the process had before, which is CUDA's own context, is not counted.
    """
    subject = check.subject
    artifact = room.artifact(subject)
    length = largest_context(artifact.manifest, check.point.context, 2)
    ids = drawn_tokens(artifact.manifest, check.point.batch, length)
    multiply()  # makes CUDA's context, whose memory is no artifact's
    before = _free_bytes()
    session = SessionSide(room.on_device(subject, chooses=True))
    loaded = before - _free_bytes()
    session.step(session.prefill(ids, 2))
    figures: dict[str, Any] = {
        "files_bytes": sum(f.stat().st_size for f in artifact.path.glob(f"{MODEL}*")),
        "loaded_bytes": loaded,
        "after_a_prompt_bytes": before - _free_bytes(),
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


def _free_bytes() -> int:
    """Return the free bytes of the GPU, by the CUDA runtime that ONNX Runtime has loaded.

    Raises:
        ResourceError: CUDA cannot be used, or does not tell.
    """
    require_cuda()
    runtime = ctypes.CDLL(library_names()[0][0])
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if code := runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
        raise ResourceError(f"cudaMemGetInfo fails with error {code}")
    return free.value


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
