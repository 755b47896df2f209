"""Build and measure the candidates of `llmc tune`, each beside the base, and cache the results."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from llmc.artifact.provenance import code_digest, tool_versions
from llmc.artifact.store.cache import StageCache, content_key
from llmc.artifact.store.folder import Artifact, open_artifact
from llmc.artifact.tuning import Candidate, Refused
from llmc.config import BuildPlan, Metric, Target
from llmc.errors import CheckpointError, ConfigError, ParityError, UnsupportedError
from llmc.machine import detect_cpu, release_memory
from llmc.pipeline.build import build
from llmc.pipeline.gate.subject import load_original
from llmc.pipeline.reports import artifact_bytes
from llmc.pipeline.steps.original import remember, tokenize
from llmc.pipeline.tune.candidates import describe
from llmc.profile import Profile
from llmc.progress import SilentProgress

if TYPE_CHECKING:
    from llmc.checkpoint import Checkpoint
    from llmc.evaluation import EvaluationText
    from llmc.runtime.session import Rewindable
    from llmc.validate.quality import Windows
    from llmc.validate.remembered import RememberedModel
    from llmc.validate.rival import Turn

#: Largest number of tokens in the prompt for time to first token.
PROMPT_TOKENS = 256
#: Packages that determine the bytes of a candidate, and its measurements.
_CODE = (
    "checkpoint",
    "trace",
    "graph",
    "passes",
    "calibration",
    "prune",
    "quantize",
    "backends",
    "kernels",
    "runtime",
    "validate",
)
#: Turns of the base alone; its own speed is their median.
_BASE_TURNS = 9
_FOUND: TypeAdapter[Candidate | Refused] = TypeAdapter(Candidate | Refused)
#: Ratio of the base to itself, with its interval.
_ONE = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Level:
    """The fidelity of a measurement.

    Args:
        windows: Approximate number of windows of the evaluation text.
        samples: Number of samples of turns alternating with the base, each of two pairs of sessions.
        rounds: Times that both sessions of a pair run two turns of decode steps.
    """

    windows: int
    samples: int
    rounds: int

    def render(self) -> str:
        """Return a human-readable description."""
        return f"{self.windows} windows of text, {2 * self.samples} pairs of sessions beside the base"


#: Cheapest first; only the better half continues. Gates are checked on all windows, for the chosen candidate.
LEVELS = (Level(windows=8, samples=1, rounds=1), Level(windows=32, samples=2, rounds=3))


def target_digest(target: Target) -> str:
    """Return the digest of everything that a target says about the artifact."""
    return content_key("target", target.model_dump(mode="json", exclude={"name", "summary", "gates"}))


@dataclass(frozen=True)
class Speed:
    """The base's own speed: a decode step, and the time to first token; seconds."""

    step: float
    first: float


@dataclass
class Workbench:
    """The place where candidates are built and measured beside the base.

    Args:
        checkpoint: The original.
        profile: Profile that candidates are built for; they run on this machine.
        base: The target that times are ratios to.
        text: Evaluation text.
        folder: Folder for artifacts while they are measured.
        cache: Measurements, including those of earlier runs.
        levels: Fidelities, the cheapest first.
    """

    checkpoint: Checkpoint
    profile: Profile
    base: Target
    text: EvaluationText
    folder: Path
    cache: StageCache
    levels: tuple[Level, ...]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Return what every measurement depends on, besides the candidate and the level."""
        machine = detect_cpu()
        return {
            "model": self.checkpoint.digest(),
            "base": target_digest(self.base),
            "profile": self.profile.model_dump(mode="json"),
            "machine": [machine.device, list(machine.isa), machine.threads],
            "text": hashlib.sha256(self.text.text.encode()).hexdigest(),
            "tools": tool_versions(),
            "code": code_digest(*(f"llmc.{package}" for package in _CODE)),
        }

    @cached_property
    def threads(self) -> int:
        """Return the number of intra-op threads of all sessions."""
        return self.profile.threads or detect_cpu().threads or 1

    @cached_property
    def reference(self) -> Artifact:
        """Return the base as a built artifact."""
        return self.build(self.base, "base")

    @cached_property
    def speed(self) -> Speed:
        """Return the base's own speed on this machine, measured once and cached."""
        kind = TypeAdapter(Speed)
        key = content_key("tune", {**self.facts, "what": "speed"})
        cached = self.cache.get(key)
        if cached is not None:
            return kind.validate_json(cached)
        turns = [self._decode(self.reference), self._prefill(self.reference)]
        step, first = (median([turn() for _ in range(_BASE_TURNS)][1:]) for turn in turns)
        measured = Speed(step, first)
        self.cache.put(key, kind.dump_json(measured))
        return measured

    @contextmanager
    def open(self, target: Target) -> Iterator[Callable[[int], Candidate | Refused]]:
        """Provide a function that measures a candidate at a level, and builds it if not cached.

        The function raises ResourceError if the disk is full or a runtime is missing.
        """
        built: list[Artifact] = []

        def artifact() -> Artifact:
            if target_digest(target) == self.facts["base"]:
                return self.reference
            if not built:
                built.append(self.build(target, "candidate"))
            return built[0]

        try:
            yield partial(self._measure, target, artifact)
        finally:
            for each in built:
                shutil.rmtree(each.path)
            release_memory()

    def build(self, target: Target, name: str) -> Artifact:
        """Build without running the gates."""
        merged = self.checkpoint.adapter
        plan = BuildPlan(
            model=self.checkpoint.ref,
            adapter=merged.ref if merged is not None else None,
            target=target,
            profile=self.profile,
            output=self.folder / name,
            verify=False,
            token_ids=True,  # candidates are compared by token ids
        )
        return open_artifact(build(plan, SilentProgress()).path)

    def _measure(self, target: Target, artifact: Callable[[], Artifact], level: int) -> Candidate | Refused:
        plan, digest = self.levels[level], target_digest(target)
        settings = [plan.windows, plan.samples, plan.rounds]
        key = content_key("tune", {**self.facts, "candidate": digest, "level": settings})
        cached = self.cache.get(key)
        if cached is not None:
            outcome = _FOUND.validate_json(cached)
            # The index of a level differs between lists of levels.
            return outcome.model_copy(update={"level": level}) if isinstance(outcome, Candidate) else outcome
        try:
            outcome = self._take(target, digest, artifact(), level)
        except (UnsupportedError, ConfigError, CheckpointError, ParityError) as error:
            outcome = Refused(digest=digest, label=describe(target), reason=error.fact)
        self.cache.put(key, _FOUND.dump_json(outcome))
        return outcome

    def _take(self, target: Target, digest: str, artifact: Artifact, level: int) -> Candidate:
        plan, speed, files = self.levels[level], self.speed, artifact.manifest.files
        kl, kl_low, kl_high = self._divergence(artifact, plan.windows)
        step, first = (_ONE, _ONE) if digest == self.facts["base"] else self._ratios(artifact, plan)
        return Candidate(
            digest=digest,
            label=describe(target),
            level=level,
            kl=kl,
            kl_low=kl_low,
            kl_high=kl_high,
            step_ratio=step[0],
            step_low=step[1],
            step_high=step[2],
            first_ratio=first[0],
            tokens_per_s=1 / (speed.step * step[0]),
            first_ms=1e3 * speed.first * first[0],
            bytes=artifact_bytes(artifact.manifest),
            model={name: file.sha256 for name, file in files.items() if name.startswith("model.onnx")},
        )

    def _divergence(self, artifact: Artifact, count: int) -> tuple[float, float, float]:
        """Measure mean KL divergence with its interval.

        Raises:
            ParityError: The artifact cannot be run, or its logits are not finite.
        """
        from llmc.validate.quality import measure_quality

        windows = self._windows.sample(count)
        self._original.prepare(windows.questions())
        self._original.release()
        by_metric = {m.metric: m for m in measure_quality(self._session(artifact), self._original, windows)}
        kl = by_metric[Metric.TEXT_KL_MEAN]
        if kl.value is None or kl.low is None or kl.high is None or not math.isfinite(kl.value):
            raise ParityError(kl.detail)
        return kl.value, kl.low, kl.high

    def _ratios(self, artifact: Artifact, plan: Level) -> tuple[tuple[float, float, float], ...]:
        """Measure ratios of times to the base's, with intervals: decode step, time to first token."""
        from llmc.validate.rival import Pairing, compare_turns

        ratios = []
        for opener, rounds in ((self._decode, plan.rounds), (self._prefill, 1)):
            pairing = Pairing(least=plan.samples, most=plan.samples, rounds=rounds)
            comparison = compare_turns(partial(opener, self.reference), partial(opener, artifact), pairing)
            ratios.append((comparison.ratio, comparison.low, comparison.high))
        return tuple(ratios)

    def _decode(self, artifact: Artifact) -> Turn:
        from llmc.validate.rival import CONTEXT, decode_turn

        return decode_turn(self._session(artifact), self._prompt(artifact, CONTEXT))

    def _prefill(self, artifact: Artifact) -> Turn:
        from llmc.validate.rival import prefill_turn

        return prefill_turn(self._session(artifact), self._prompt(artifact, PROMPT_TOKENS))

    def _session(self, artifact: Artifact) -> Rewindable:
        from llmc.runtime.ort_model import OrtModel, shares_buffer

        share = shares_buffer(artifact.path)
        return OrtModel(artifact.path, artifact.manifest.interface, threads=self.threads, share_buffer=share)

    def _prompt(self, artifact: Artifact, length: int) -> Any:
        import numpy as np

        limit = artifact.manifest.interface.max_length
        length = length if limit is None else min(length, limit // 2)
        return np.take(self._tokens[0], np.arange(length), mode="wrap")

    @cached_property
    def _tokens(self) -> tuple[Any, tuple[int, ...]]:
        return tokenize(self.checkpoint.tokenizer(), self.text.text)

    @cached_property
    def _windows(self) -> Windows:
        from llmc.validate.quality import plan_windows

        return plan_windows(self.reference.manifest.interface, *self._tokens)

    @cached_property
    def _original(self) -> RememberedModel:
        checkpoint = self.checkpoint
        return remember(checkpoint, self.facts["model"], "", lambda: load_original(checkpoint))
