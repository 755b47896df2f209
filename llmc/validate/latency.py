"""Measure latency of artifact and original, interleaved within one process.

One round times the artifact, the original and the artifact again. Other load on the machine then affects all
three, and the two series of the artifact show how large its effect is (an A/A run). The process rests before
a side's turn, because the other side's threads spin for a while after work.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.artifact.latency import (
    BatchLatency,
    DecodeLatency,
    Footprint,
    Latency,
    OperatorTime,
    PrefillLatency,
    Ratio,
    Timing,
)
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Metric
from llmc.errors import ResourceError
from llmc.gpu import Gpu
from llmc.graph.interface import Interface
from llmc.profile import Profile
from llmc.runtime.ort_model import OrtModel
from llmc.runtime.session import Rewindable
from llmc.validate.energy import POWERCAP, Counter, energy_of_steps, open_counter, open_gpu_counter
from llmc.validate.footprint import ArtifactJob, OriginalJob, Sample, take_sample
from llmc.validate.interval import mean_interval
from llmc.validate.measure import measured, unmeasured
from llmc.validate.operators import profile_decode
from llmc.validate.reference import TorchModel
from llmc.validate.roofline import roofline

#: Energy counters of the processor and of the GPU that is used; None without a counter.
Meters = tuple[Counter | None, Counter | None]


@dataclass(frozen=True)
class Schedule:
    """The lengths that are timed, and how often.

    Args:
        prompts: Prompt lengths for the time to first token.
        contexts: Lengths after which decode steps are timed; each is among `prompts`.
        batches: Numbers of rows that run together at the first context.
        prefill_rounds: How often either side runs each prompt.
        decode_rounds: Turns of `decode_tokens` steps that either side takes at each context.
        batch_rounds: How often either side runs each batch.
        energy_seconds: Least time for which steps are repeated to measure their energy.
        footprint_rounds: Number of processes of either side that are started for load time and peak memory.
    """

    prompts: tuple[int, ...] = (128, 512, 1024)
    contexts: tuple[int, ...] = (128, 1024)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    prefill_rounds: int = 5
    decode_rounds: int = 4
    decode_tokens: int = 32
    batch_rounds: int = 3
    energy_seconds: float = 2.0
    footprint_rounds: int = 3


@dataclass(frozen=True)
class Timed:
    """The artifact to be timed.

    Args:
        open: Opens a session of the artifact; picklable, for the processes that measure memory.
        module: Module of its runtime.
        interface: Its inputs and outputs.
        weight_bytes: Bytes of the weights that a decode step reads completely.
        gpu: The GPU that executes it; None for the CPU.
        rows: Maximum number of rows of a batch that it accepts; None for any number.
    """

    open: Callable[[], Rewindable]
    module: str
    interface: Interface
    weight_bytes: int
    gpu: Gpu | None = None
    rows: int | None = None


#: Seconds of rest before a side's turn.
_REST_SECONDS = 0.05


def measure_latency(
    timed: Timed,
    reference: TorchModel,
    load_reference: Callable[[], Any],
    *,
    tokens: Array,
    profile: Profile,
    threads: int,
    schedule: Schedule,
    counters: Path = POWERCAP,
) -> Latency:
    """Measure time to first token, inter-token latency, energy, load time and peak memory of both sides.

    Args:
        timed: The artifact.
        reference: The original, loaded.
        load_reference: Loads the original again in a child process; must be picklable.
        tokens: (n,) int64, at least one, repeated where a prompt needs more.
        threads: Intra-op threads of either side.
        counters: Folder of the machine's energy counters.

    Raises:
        ParityError: The artifact cannot be run.
    """
    interface = timed.interface
    limit = interface.max_length
    prompts = [n for n in schedule.prompts if limit is None or n <= limit]
    contexts = [n for n in schedule.contexts if limit is None or n + schedule.decode_tokens <= limit]
    short = f"the model ends at {limit} positions"
    dropped = [f"prompt of {n} tokens: {short}" for n in schedule.prompts if n not in prompts]
    dropped += [f"decode at context {n}: {short}" for n in schedule.contexts if n not in contexts]

    # This runs before this process opens a session, so that the children have the machine to themselves.
    footprints = _footprints(timed, load_reference, threads, max(prompts, default=1), schedule)
    meters, energy = _find_meters(counters, timed.gpu, schedule.energy_seconds)
    with _torch_threads(threads):
        model = timed.open()
        prefill: list[PrefillLatency] = []
        decode: list[DecodeLatency] = []
        for length in prompts:
            prompt = np.take(tokens, np.arange(length), mode="wrap")
            prefill.append(_time_prefill(model, reference, prompt, schedule))
            if length in contexts:
                decode.append(_time_decode(model, reference, length, schedule, meters))
        first = np.take(tokens, np.arange(contexts[0]), mode="wrap") if contexts else None
        rows = [n for n in schedule.batches if timed.rows is None or n <= timed.rows]
        batches = [_time_batch(model, reference, first, n, schedule) for n in rows if first is not None]
        operators: tuple[OperatorTime, ...] = ()
        if first is not None and isinstance(model, OrtModel):
            operators = profile_decode(model, first)
    return Latency(
        where=model.where,
        original=reference.description,
        threads=threads,
        prefill=tuple(prefill),
        decode=tuple(decode),
        roofline=tuple(
            roofline(timed.weight_bytes, interface, d.context, profile, d.artifact.p50_ms) for d in decode
        ),
        artifact_footprint=footprints[0],
        original_footprint=footprints[1],
        energy=energy,
        batches=tuple(batches),
        operators=operators,
        dropped=(*dropped, *_still(meters, decode)),
    )


def ratios(latency: Latency) -> tuple[Measurement, ...]:
    """Return TTFT_RATIO and INTER_TOKEN_RATIO: the worst ratio of medians, with its noise interval."""
    series = {
        Metric.TTFT_RATIO: {f"prompt_{p.prompt_tokens}": (p.ratio.value, p.noise) for p in latency.prefill},
        Metric.INTER_TOKEN_RATIO: {f"context_{d.context}": (d.ratio.value, d.noise) for d in latency.decode},
    }
    measurements = []
    for metric, entries in series.items():
        if entries:
            figures = {name: value for name, (value, _) in entries.items()}
            value, uncertainty = max(entries.values())
            detail = (
                f"worst of {', '.join(figures)}; against {latency.original}, {latency.threads} threads;"
                f" the machine's noise is {100 * uncertainty:.1f} %"
            )
            interval = (value / (1 + uncertainty), value * (1 + uncertainty))
            measurements.append(measured(metric, value, detail, latency.where, figures, interval))
        else:
            why = "; ".join(latency.dropped) or "no length was requested"
            measurements.append(unmeasured(metric, MeasurementStatus.NOT_MEASURED, why, latency.where))
    return tuple(measurements)


def timing(samples_ms: Sequence[float]) -> Timing:
    """Return percentiles and range of a series in milliseconds."""
    p50, p95, p99 = (float(v) for v in np.percentile(samples_ms, (50, 95, 99)))
    return Timing(
        n=len(samples_ms), p50_ms=p50, p95_ms=p95, p99_ms=p99, min_ms=min(samples_ms), max_ms=max(samples_ms)
    )


def ratio(artifact: Sequence[Sequence[float]], original: Sequence[Sequence[float]]) -> Ratio:
    """Return the ratio of medians of two interleaved series of rounds, and the range over the rounds."""
    rounds = [float(np.median(a)) / float(np.median(b)) for a, b in zip(artifact, original, strict=True)]
    value = float(np.median(np.concatenate(artifact))) / float(np.median(np.concatenate(original)))
    return Ratio(value=value, low=min(rounds), high=max(rounds))


def noise(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Return by how much two interleaved series of the same thing may differ, as a fraction.

    It is the farther end of the confidence interval of the mean logarithm of the rounds' ratios; with fewer
    than three rounds it is the largest of them.
    """
    logs = [math.log(float(np.median(a)) / float(np.median(b))) for a, b in zip(first, second, strict=True)]
    ends = mean_interval(logs) if len(logs) > 2 else (min(logs), max(logs))
    return math.exp(max(abs(end) for end in ends)) - 1


def _time_prefill(
    model: Rewindable, reference: TorchModel, prompt: Array, schedule: Schedule
) -> PrefillLatency:
    steps = schedule.decode_tokens

    def run_artifact() -> None:
        model.prefill(prompt[None], steps=steps)[0, -1].argmax()

    artifact: list[list[float]] = []
    original: list[list[float]] = []
    again: list[list[float]] = []
    for counted in [False] + [True] * schedule.prefill_rounds:
        a = _timed(run_artifact)
        b = _timed(lambda: reference.prefill(prompt))
        c = _timed(run_artifact)
        if counted:
            artifact.append([a])
            original.append([b])
            again.append([c])
    return PrefillLatency(
        prompt_tokens=len(prompt),
        artifact=timing([x for r in artifact for x in r]),
        original=timing([x for r in original for x in r]),
        ratio=ratio(artifact, original),
        noise=noise(artifact, again),
        artifact_tokens_per_s=_rate(artifact, len(prompt)),
        original_tokens_per_s=_rate(original, len(prompt)),
    )


def _rate(rounds: Sequence[Sequence[float]], tokens: int) -> float:
    """Tokens per second over all rounds, each time of which is that of `tokens`."""
    times = [x for r in rounds for x in r]
    return 1e3 * tokens * len(times) / sum(times)


def _time_decode(
    model: Rewindable, reference: TorchModel, context: int, schedule: Schedule, meters: Meters
) -> DecodeLatency:
    """Time steps after the prompt that `_time_prefill` left in both caches; each turn starts from there."""

    def step(token: int) -> int:
        return int(model.decode(np.array([[token]]))[0, -1].argmax())

    point, original_point = model.state(), reference.state()
    artifact: list[list[float]] = []
    original: list[list[float]] = []
    again: list[list[float]] = []
    for counted in [False] + [True] * schedule.decode_rounds:
        model.restore(point)
        a = _timed_steps(step, schedule)
        reference.restore(original_point)
        b = _timed_steps(reference.decode, schedule)
        model.restore(point)
        c = _timed_steps(step, schedule)
        if counted:
            artifact.append(a)
            original.append(b)
            again.append(c)
    flat_artifact = [x for r in artifact for x in r]
    flat_original = [x for r in original for x in r]
    seconds, tokens = schedule.energy_seconds, schedule.decode_tokens
    joules, original_joules = (
        energy_of_steps(partial(next, _turns(restart, run, tokens)), meters, seconds)
        for restart, run in (
            (partial(model.restore, point), step),
            (partial(reference.restore, original_point), reference.decode),
        )
    )
    return DecodeLatency(
        context=context,
        artifact=timing(flat_artifact),
        original=timing(flat_original),
        artifact_tokens_per_s=_rate(artifact, 1),
        original_tokens_per_s=_rate(original, 1),
        ratio=ratio(artifact, original),
        noise=noise(artifact, again),
        artifact_joules_per_token=joules[0],
        original_joules_per_token=original_joules[0],
        artifact_gpu_joules_per_token=joules[1],
        original_gpu_joules_per_token=original_joules[1],
    )


def _still(meters: Meters, decode: Sequence[DecodeLatency]) -> Iterator[str]:
    """Describe the counters by which no energy was measured although they can be read."""
    sides = zip(
        meters,
        ([d.artifact_joules_per_token for d in decode], [d.artifact_gpu_joules_per_token for d in decode]),
        strict=True,
    )
    for meter, joules in sides:
        if meter is not None and None in joules:
            yield f"energy by {meter.where}: the counter does not advance"


def _turns(restart: Callable[[], None], step: Callable[[int], int], tokens: int) -> Iterator[None]:
    """Run a step at each `next`, from the beginning again after `tokens` of them."""
    while True:
        restart()
        token = 1
        for _ in range(tokens):
            token = step(token)
            yield


def _time_batch(
    model: Rewindable, reference: TorchModel, prompt: Array, batch: int, schedule: Schedule
) -> BatchLatency:
    """Time prefill and steps of `batch` equal rows, the sides in turn; the first round is not counted."""
    rows = np.repeat(prompt[None], batch, axis=0)

    def prefill() -> None:
        model.prefill(rows, steps=schedule.decode_tokens)[:, -1].argmax(axis=-1)

    def step(token: int) -> int:
        return int(model.decode(np.full((batch, 1), token))[:, -1].argmax(axis=-1)[0])

    def step_original(token: int) -> int:
        return int(reference.decode_rows(np.full(batch, token))[0])

    first: list[tuple[float, float]] = []
    artifact: list[list[float]] = []
    original: list[list[float]] = []
    for counted in [False] + [True] * schedule.batch_rounds:
        ttft, times = _timed(prefill), _timed_steps(step, schedule)
        ttft_original = _timed(lambda: reference.prefill_rows(rows))
        times_original = _timed_steps(step_original, schedule)
        if counted:
            first.append((ttft, ttft_original))
            artifact.append(times)
            original.append(times_original)
    flat, flat_original = ([x for r in rounds for x in r] for rounds in (artifact, original))
    return BatchLatency(
        batch=batch,
        context=len(prompt),
        ttft=timing([a for a, _ in first]),
        ttft_original=timing([b for _, b in first]),
        artifact=timing(flat),
        original=timing(flat_original),
        ratio=ratio(artifact, original),
        tokens_per_s=_rate(artifact, batch),
        original_tokens_per_s=_rate(original, batch),
    )


def _timed(run: Callable[[], object]) -> float:
    """Return the milliseconds of one call, after a rest."""
    time.sleep(_REST_SECONDS)
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _timed_steps(step: Callable[[int], int], schedule: Schedule) -> list[float]:
    """Return the milliseconds of each of `decode_tokens` consecutive steps after a rest."""
    time.sleep(_REST_SECONDS)
    token, times = 1, []
    for _ in range(schedule.decode_tokens):
        start = time.perf_counter()
        token = step(token)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _find_meters(folder: Path, gpu: Gpu | None, seconds: float) -> tuple[Meters, str]:
    """Open the energy counters, and say what they cover or why there are none."""
    meters: list[Counter | None] = []
    descriptions = []
    openers: list[Callable[[], Counter]] = [partial(open_counter, folder)]
    if gpu is not None:
        openers.append(partial(open_gpu_counter, gpu.uuid))
    for opener in openers:
        try:
            counter = opener()
        except ResourceError as error:
            meters.append(None)
            descriptions.append(f"not measured: {error.fact}")
        else:
            meters.append(counter)
            descriptions.append(f"{counter.where}, over {seconds:g} s or more")
    if gpu is None:
        return (meters[0], None), f"{descriptions[0]}; GPU: not used"
    return (meters[0], meters[1]), f"{descriptions[0]}; GPU: {descriptions[1]}"


def _footprints(
    timed: Timed, load_reference: Callable[[], Any], threads: int, prompt: int, schedule: Schedule
) -> tuple[Footprint, Footprint]:
    limit = timed.interface.max_length
    steps = 16 if limit is None else min(16, max(0, limit - prompt))
    jobs = (
        ArtifactJob(timed.open, timed.module, prompt, steps),
        OriginalJob(load_reference, threads, prompt, steps),
    )
    rounds = [tuple(take_sample(job) for job in jobs) for _ in range(schedule.footprint_rounds)]
    artifact, original = (
        _footprint([samples[side] for samples in rounds], prompt, steps) for side in range(len(jobs))
    )
    return artifact, original


def _footprint(samples: Sequence[Sample], prompt: int, steps: int) -> Footprint:
    peaks = [s.peak_bytes for s in samples if s.peak_bytes is not None]
    steady = [s.steady_bytes for s in samples if s.steady_bytes is not None]
    return Footprint(
        load=timing([s.load_ms for s in samples]),
        peak_bytes=max(peaks, default=None),
        steady_bytes=int(np.median(steady)) if steady else None,
        prompt_tokens=prompt,
        decoded_tokens=steps,
    )


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
