"""Where `llmc tune` builds and measures its candidates, each beside the base, and remembers what it found."""

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

#: Prompt of the time to first token, most tokens.
PROMPT_TOKENS = 256
#: What makes the bytes of a candidate, and what measures them.
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
#: Turns of the base alone that its own speed is the median of.
_BASE_TURNS = 9
_FOUND: TypeAdapter[Candidate | Refused] = TypeAdapter(Candidate | Refused)
#: Ratio of the base to itself, with its interval.
_ONE = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Level:
    """How closely a candidate is looked at.

    Args:
        windows: Windows of the evaluation text, about.
        samples: Samples of turns in turn with the base, each of two pairs of sessions.
        rounds: Times that both sessions of a pair take two turns of decode steps.
    """

    windows: int
    samples: int
    rounds: int

    def render(self) -> str:
        """In words."""
        return f"{self.windows} windows of text, {2 * self.samples} pairs of sessions beside the base"


#: Cheap first; only what is in the better half goes on. Gates are held on all windows, for what is taken.
LEVELS = (Level(windows=8, samples=1, rounds=1), Level(windows=32, samples=2, rounds=3))


def target_digest(target: Target) -> str:
    """Digest of all that a target says about the artifact."""
    return content_key("target", target.model_dump(mode="json", exclude={"name", "summary", "gates"}))


@dataclass(frozen=True)
class Speed:
    """The base's own: a decode step, and the time to first token; seconds."""

    step: float
    first: float


@dataclass
class Workbench:
    """Builds and measures candidates beside the base.

    Args:
        checkpoint: The original.
        profile: What candidates are built for; they run on the machine at hand.
        base: The target that times are ratios to.
        text: Evaluation text.
        folder: Where artifacts stand while they are measured.
        cache: Measurements, those of earlier runs included.
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
        """What every measurement depends on, besides the candidate and the level."""
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
        """Intra-op threads of all sessions."""
        return self.profile.threads or detect_cpu().threads or 1

    @cached_property
    def reference(self) -> Artifact:
        """The base, built."""
        return self.build(self.base, "base")

    @cached_property
    def speed(self) -> Speed:
        """The base's own speed on this machine, measured once and remembered."""
        kind = TypeAdapter(Speed)
        key = content_key("tune", {**self.facts, "what": "speed"})
        known = self.cache.get(key)
        if known is not None:
            return kind.validate_json(known)
        turns = [self._decode(self.reference), self._prefill(self.reference)]
        step, first = (median([turn() for _ in range(_BASE_TURNS)][1:]) for turn in turns)
        made = Speed(step, first)
        self.cache.put(key, kind.dump_json(made))
        return made

    @contextmanager
    def open(self, target: Target) -> Iterator[Callable[[int], Candidate | Refused]]:
        """A candidate: what it gives measures it at a level, and builds it if that is not known.

        What it raises: ResourceError, if there is no space or a runtime is missing.
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
        """Build without holding the gates."""
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
        known = self.cache.get(key)
        if known is not None:
            found = _FOUND.validate_json(known)
            # What is its level here may have been another of other fidelities.
            return found.model_copy(update={"level": level}) if isinstance(found, Candidate) else found
        try:
            found = self._take(target, digest, artifact(), level)
        except (UnsupportedError, ConfigError, CheckpointError, ParityError) as error:
            found = Refused(digest=digest, label=describe(target), reason=error.fact)
        self.cache.put(key, _FOUND.dump_json(found))
        return found

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
        """Mean KL divergence with its interval.

        Raises:
            ParityError: The artifact cannot be run, or its logits are not finite.
        """
        from llmc.validate.quality import measure_quality

        windows = self._windows.sample(count)
        self._original.prepare(windows.questions())
        self._original.release()
        found = {m.metric: m for m in measure_quality(self._session(artifact), self._original, windows)}
        kl = found[Metric.TEXT_KL_MEAN]
        if kl.value is None or kl.low is None or kl.high is None or not math.isfinite(kl.value):
            raise ParityError(kl.detail)
        return kl.value, kl.low, kl.high

    def _ratios(self, artifact: Artifact, plan: Level) -> tuple[tuple[float, float, float], ...]:
        """Times over the base's in turn, with intervals: of a decode step, and to the first token."""
        from llmc.validate.rival import Pairing, compare_turns

        made = []
        for opener, rounds in ((self._decode, plan.rounds), (self._prefill, 1)):
            pairing = Pairing(least=plan.samples, most=plan.samples, rounds=rounds)
            found = compare_turns(partial(opener, self.reference), partial(opener, artifact), pairing)
            made.append((found.ratio, found.low, found.high))
        return tuple(made)

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
