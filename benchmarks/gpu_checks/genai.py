"""Generate with onnxruntime-genai, as an artifact is served, and hold its tokens to a session's logits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from gpu_checks.checks import Check, Found
from gpu_checks.room import Room, bound, drawn_tokens, graph_obstacle_of
from llmc.config import Metric
from llmc.runtime.libraries import load_genai, require_cuda
from llmc.runtime.session import Session

PROMPT, STEPS = 128, 64


def check_genai(room: Room, check: Check) -> Found:
    """Time the tokens of onnxruntime-genai without and with a CUDA graph, and hold each against the logits.

    A token may differ from the session's choice only where the session's logits nearly tie. On the CPU, where
    artifacts for CUDA are not served, the tokens are compared and no time is stated.
    """
    subject = check.subject
    artifact = room.artifact(subject)
    limit = artifact.manifest.interface.max_length
    prompt = PROMPT if limit is None else min(PROMPT, limit // 2)
    ids = drawn_tokens(artifact.manifest, prompt)
    cuda = room.settings.cuda
    session = room.on_device(subject) if cuda else room.on_cpu(subject)
    figures: dict[str, Any] = {"where": session.where}
    modes = {"plain": "0", "cuda_graph": "1"} if cuda else {"cpu": ""}
    beyond = []
    for name, graph in modes.items():
        if graph == "1" and (obstacle := graph_obstacle_of(artifact)) is not None:
            figures["cuda_graph_not_measured"] = obstacle
            continue
        tokens, milliseconds = _generate(artifact.path, ids, graph)
        gap, same = _hold(session, ids, tokens)
        figures |= {f"{name}_same_tokens": same, f"{name}_tokens": len(tokens), f"{name}_logit_gap": gap}
        if cuda:
            figures[f"{name}_ms"] = float(np.median(milliseconds[8:]))
        most = bound(artifact.manifest, Metric.GENERATE_GAP)
        if most is not None and not gap <= most:
            beyond.append(f"{name}: a token lies {gap:.3g} logits below the session's choice, bound {most}")
    return Found(figures, "; ".join(beyond) or None)


def _generate(folder: Path, ids: np.ndarray, graph: str) -> tuple[list[int], list[float]]:
    """Return greedy tokens, and the milliseconds of each.

    Args:
        graph: Setting of enable_cuda_graph; empty to generate on the CPU.
    """
    og = load_genai()
    config = og.Config(str(folder))
    config.clear_providers()
    if graph:
        require_cuda()
        config.append_provider("cuda")
        config.set_provider_option("cuda", "enable_cuda_graph", graph)
    model = og.Model(config)
    params = og.GeneratorParams(model)
    length = len(ids) + STEPS
    params.set_search_options(do_sample=False, batch_size=1, min_length=length, max_length=length)
    generator = og.Generator(model, params)
    generator.append_tokens(ids.astype(np.int32))
    milliseconds = []
    while not generator.is_done():
        start = time.perf_counter()
        generator.generate_next_token()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return [int(token) for token in generator.get_sequence(0)][len(ids) :], milliseconds


def _hold(session: Session, ids: np.ndarray, tokens: list[int]) -> tuple[float, int]:
    """Return how far the tokens lie below the session's choice at most, and how many are its choice."""
    logits = session.prefill(ids[None], steps=len(tokens))[0, -1]
    gaps = []
    for token in tokens:
        gaps.append(float(logits.max() - logits[token]))
        logits = session.decode(np.array([[token]], np.int64))[0, -1]
    return max(gaps), sum(gap == 0 for gap in gaps)
