"""Measure what the type of the KV cache costs and gains with compiled kernels: quality and speed by context.

    python benchmarks/kv_cache.py [--contexts 128 1024 4096] [--no-speed] [--no-quality]

Builds one checkpoint with a cache in float32, float16 and int8, which differ in nothing else. Quality uses
windows of the evaluation text whose last tokens are decoded one by one after all others were prefilled; it is
NLL and KL divergence to PyTorch in float32, and KL divergence to the same kernels with a float32 cache. CPU
time is that of decode steps on one thread, with caches of noise, for a machine that has other users. For
speed, one process of onnxruntime-genai per type is asked in turn. Ratios are to float32, with the range over
the rounds.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from common.artifacts import open_model, show_progress
from common.fidelity import cut_windows, divergence, reference
from common.machine import describe
from common.options import add_checkpoint, add_timing, make_parser
from common.peers import model_bytes
from common.runners import Runner, take_turns
from common.sources import checkpoint
from common.timing import ratio

from llmc.artifact.store.folder import open_artifact
from llmc.checkpoint import Checkpoint, open_checkpoint
from llmc.config import CacheType
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.runtime.ort_model import OrtModel
from llmc.validate.distribution import log_softmax

#: Number of tokens that are measured at each context, over all windows, and maximum of one window.
MEASURED, STEPS = 512, 128


def main() -> None:
    parser = make_parser(__doc__)
    add_checkpoint(parser)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096])
    add_timing(parser)
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--no-cpu-time", action="store_true")
    parser.add_argument("--no-quality", action="store_true")
    parser.set_defaults(batch=1)
    options = parser.parse_args()
    source = open_checkpoint(str(checkpoint(options.checkpoint, options.cache)))
    folders = {cache: make(source, cache, options) for cache in CacheType}
    print(describe())
    if not options.no_quality:
        for context in options.contexts:
            quality(source, folders, context, options)
    if not options.no_cpu_time:
        cpu_time(folders, options)
    if not options.no_speed:
        speed(folders, options)


def make(source: Checkpoint, cache: CacheType, options: argparse.Namespace) -> Path:
    output: Path = options.cache / f"{options.checkpoint}-kv-{cache.value}"
    plan = plan_build(
        str(source.path), target="cpu-int4-compiled", profile="local", output=output, verify=False
    )
    target = plan.target.model_copy(update={"kv_cache": cache})
    build(plan.model_copy(update={"target": target}), show_progress())
    return output


def quality(
    source: Checkpoint, folders: dict[CacheType, Path], context: int, options: argparse.Namespace
) -> None:
    windows = cut_windows(source, MEASURED // STEPS, context + STEPS)
    count, file = len(windows), options.cache / f"{options.checkpoint}-{context}-logits.npy"
    original = log_softmax(reference(source, windows, file, STEPS))
    wide = None
    for cache, folder in folders.items():
        logps = log_softmax(decoded(folder, windows, options.threads))
        wide = logps if wide is None else wide
        following = windows[:, -STEPS:, None]
        change = np.take_along_axis(original - logps, following, axis=-1).mean()
        apart = divergence(wide, logps)
        print(
            f"context {context:5} {cache.value:8} dNLL {change:+.4f}, "
            f"KL {divergence(original, logps).mean():.4f}, to float32's cache {apart.mean():.1e}, "
            f"largest {apart.max():.1e}; {count} windows, {count * STEPS} tokens",
            flush=True,
        )


def decoded(folder: Path, windows: np.ndarray, threads: int) -> np.ndarray:
    """Return logits (windows, STEPS, vocabulary) that predict the last STEPS tokens of each window."""
    model = open_model(folder, threads)
    rows = []
    for row in windows:
        first = model.prefill(row[None, :-STEPS], steps=STEPS)[:, -1]
        steps = [model.decode(row[None, i : i + 1])[:, -1] for i in range(len(row) - STEPS, len(row) - 1)]
        rows.append(np.concatenate([first, *steps]))
    return np.stack(rows)


def cpu_time(folders: dict[CacheType, Path], options: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    slots = max(options.contexts) + options.rounds * options.steps + 1
    models = {}
    for cache, folder in folders.items():
        model = OrtModel(folder, open_artifact(folder).manifest.interface, threads=1, share_buffer=True)
        model.prefill(np.array([[5]]), steps=slots)
        for value in model._cache:
            value.update_inplace(noise(cache, value.shape(), rng))
        models[cache] = model
    for context in options.contexts:
        times: dict[CacheType, list[float]] = {cache: [] for cache in models}
        for round_ in range(options.rounds):
            for cache in models if round_ % 2 else reversed(models):
                models[cache]._mask = np.ones((1, context), np.int64)
                start = time.thread_time()
                for _ in range(options.steps):
                    models[cache].decode(np.array([[7]]))
                times[cache].append(1e3 * (time.thread_time() - start) / options.steps)
        for cache, milliseconds in times.items():
            print(
                f"context {context:5} {cache.value:8} {np.median(milliseconds):.2f} ms of CPU a step, "
                f"{ratio(times[CacheType.FLOAT32], milliseconds)} x float32's",
                flush=True,
            )


def noise(cache: CacheType, shape: list[int], rng: np.random.Generator) -> np.ndarray:
    """Return a cache of normally distributed rows."""
    if cache is not CacheType.INT8:
        return rng.standard_normal(shape, np.float32).astype(cache.value)
    x = rng.standard_normal((*shape[:-1], shape[-1] - 4), np.float32)
    scales = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    return np.concatenate([np.rint(x / scales).astype(np.int8), scales.view(np.int8)], axis=-1)


def speed(folders: dict[CacheType, Path], options: argparse.Namespace) -> None:
    runners = [Runner(cache.value, folder, model_bytes(folder)) for cache, folder in folders.items()]
    take_turns(runners, options.contexts, options)
    for prompt in options.contexts:
        for runner in runners:
            step, base = runner.step_ms[prompt], runners[0].step_ms[prompt]
            print(
                f"context {prompt:5} {runner.name:8} {1e3 / np.median(step):.1f} tok/s, "
                f"{ratio(base, step)} x float32's, peak {runner.peak_bytes / 1e6:.0f} MB"
            )


if __name__ == "__main__":
    main()
