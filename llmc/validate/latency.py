"""Measure latency of artifact and original, interleaved within one process.

One round times the artifact, the original and the artifact again. Other load on the machine then affects all
three, and the two series of the artifact show how large its effect is (an A/A run). The process rests before
a side's turn, because the other side's threads spin for a while after work.
"""

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
    Latency,
    OperatorTime,
    PrefillLatency,
    StepWay,
)
from llmc.errors import LlmcError, first_lines
from llmc.gpu import Gpu
from llmc.graph.interface import Interface
from llmc.profile import Profile
from llmc.runtime.failures import is_out_of_memory
from llmc.runtime.ort_model import OrtModel
from llmc.runtime.session import Rewindable
from llmc.validate.energy import POWERCAP, Meters, energy_of_steps, find_meters
from llmc.validate.footprint import ArtifactJob, OriginalJob, measure_footprints
from llmc.validate.operators import profile_decode
from llmc.validate.reference import TorchModel
from llmc.validate.roofline import roofline
from llmc.validate.series import noise, ratio, timing, tokens_per_second


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
        others: Further ways to open one; the one with the fastest steps is measured.
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
    others: tuple[Callable[[], Rewindable], ...] = ()


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
    longest = max(prompts, default=1)
    further = 16 if limit is None else min(16, max(0, limit - longest))
    footprints = measure_footprints(
        ArtifactJob(timed.open, timed.module, longest, further, timed.gpu is not None),
        OriginalJob(load_reference, threads, longest, further, reference.on_gpu),
        schedule.footprint_rounds,
    )
    meters, energy = find_meters(counters, timed.gpu, schedule.energy_seconds)
    with _torch_threads(threads):
        opener, ways = _fastest(timed, tokens, contexts, schedule)
        model = opener()
        prefill: list[PrefillLatency] = []
        decode: list[DecodeLatency] = []
        for length in prompts:
            prompt = np.take(tokens, np.arange(length), mode="wrap")
            prefill.append(_time_prefill(model, reference, prompt, schedule))
            if length in contexts:
                decode.append(_time_decode(model, reference, length, schedule, meters))
        first = np.take(tokens, np.arange(contexts[0]), mode="wrap") if contexts else None
        rows = [n for n in schedule.batches if timed.rows is None or n <= timed.rows]
        batches = [] if first is None else _time_batches(model, reference, first, rows, schedule, dropped)
        operators: tuple[OperatorTime, ...] = ()
        if first is not None and isinstance(model, OrtModel):
            if timed.gpu is None:
                operators = profile_decode(model, first)
            else:
                dropped.append("operators: onnxruntime times the launch of a GPU's kernel, not its run")
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
        ways=ways,
        apart=_apart(timed, reference),
        batches=tuple(batches),
        operators=operators,
        dropped=(*dropped, *_still(meters, decode)),
    )


def _fastest(
    timed: Timed, tokens: Array, contexts: Sequence[int], schedule: Schedule
) -> tuple[Callable[[], Rewindable], tuple[StepWay, ...]]:
    """Return the way to open the artifact whose steps are fastest, and the times of all ways."""
    if not timed.others or not contexts:
        return timed.open, ()
    prompt, ways = np.take(tokens, np.arange(contexts[0]), mode="wrap"), []
    for opener in (timed.open, *timed.others):
        model = opener()
        model.prefill(prompt[None], steps=schedule.decode_tokens)
        point, times = model.state(), list[float]()
        for counted in [False] + [True] * schedule.decode_rounds:
            model.restore(point)
            turn = _timed_steps(_step_of(model), schedule)
            times += turn if counted else []
        ways.append((opener, StepWay(where=model.where, context=contexts[0], step=timing(times))))
        del model
    fastest, _ = min(ways, key=lambda way: way[1].step.p50_ms)
    return fastest, tuple(way for _, way in ways)


def _step_of(model: Rewindable) -> Callable[[int], int]:
    """Return the function that feeds a token to a session of one row, and returns the next."""
    return lambda token: int(model.next_tokens(np.array([token]))[0])


def _apart(timed: Timed, reference: TorchModel) -> str | None:
    """Explain why the two sides did not run on the same kind of device; None if they did."""
    if (timed.gpu is not None) == reference.on_gpu:
        return None
    import torch

    return f"the original ran on the CPU, since torch {torch.__version__} finds no GPU"


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
        artifact_tokens_per_s=tokens_per_second(artifact, len(prompt)),
        original_tokens_per_s=tokens_per_second(original, len(prompt)),
    )


def _time_decode(
    model: Rewindable, reference: TorchModel, context: int, schedule: Schedule, meters: Meters
) -> DecodeLatency:
    """Time steps after the prompt that `_time_prefill` left in both caches; each turn starts from there."""

    step = _step_of(model)
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
        energy_of_steps(partial(next, _turns(restart, run, tokens)), counters, seconds)
        for restart, run, counters in (
            (partial(model.restore, point), step, meters),
            (
                partial(reference.restore, original_point),
                reference.decode,
                meters if reference.on_gpu else (meters[0], None),
            ),
        )
    )
    return DecodeLatency(
        context=context,
        artifact=timing(flat_artifact),
        original=timing(flat_original),
        artifact_tokens_per_s=tokens_per_second(artifact, 1),
        original_tokens_per_s=tokens_per_second(original, 1),
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


def _time_batches(
    model: Rewindable,
    reference: TorchModel,
    prompt: Array,
    rows: Sequence[int],
    schedule: Schedule,
    dropped: list[str],
) -> list[BatchLatency]:
    """Time batches up to the first that either side has no memory for, which is added to `dropped`."""
    timed: list[BatchLatency] = []
    for batch in rows:
        try:
            timed.append(_time_batch(model, reference, prompt, batch, schedule))
        except Exception as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
            why = error.fact if isinstance(error, LlmcError) else first_lines(error)
            dropped.append(f"batches from {batch} rows on: {why}")
            break
    return timed


def _time_batch(
    model: Rewindable, reference: TorchModel, prompt: Array, batch: int, schedule: Schedule
) -> BatchLatency:
    """Time prefill and steps of `batch` equal rows, the sides in turn; the first round is not counted."""
    rows = np.repeat(prompt[None], batch, axis=0)

    def prefill() -> None:
        model.prefill(rows, steps=schedule.decode_tokens)[:, -1].argmax(axis=-1)

    def step(token: int) -> int:
        return int(model.next_tokens(np.full(batch, token))[0])

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
        tokens_per_s=tokens_per_second(artifact, batch),
        original_tokens_per_s=tokens_per_second(original, batch),
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


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
