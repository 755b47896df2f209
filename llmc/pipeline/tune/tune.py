"""Implement `llmc tune`: measure targets for one model and machine, and write the best that fits."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from llmc.artifact.manifest import REPORTS
from llmc.artifact.store.cache import StageCache, content_key, default_cache_folder
from llmc.artifact.store.disk import access_errors, space_errors
from llmc.artifact.store.lock import output_lock
from llmc.artifact.store.substitute import usable_folder
from llmc.artifact.tuning import Candidate, Refused, Tuning
from llmc.config import BuildPlan, Target
from llmc.document import render_document
from llmc.errors import ConfigError, LatencyError, LlmcError, ParityError, UnsupportedError
from llmc.evaluation import read_text
from llmc.machine import detect_cpu
from llmc.pipeline.build import build
from llmc.pipeline.result import PathText, require_folder
from llmc.pipeline.tune.candidates import Space, describe
from llmc.pipeline.tune.choosing import (
    Bound,
    choose,
    find_excesses,
    find_front,
    nearest,
    render_excesses,
    survives,
)
from llmc.pipeline.tune.plan import TunePlan
from llmc.pipeline.tune.restate import restate_gates, strict_gates
from llmc.pipeline.tune.search import Asked, Search, require_optuna
from llmc.pipeline.tune.workbench import Workbench, target_digest
from llmc.progress import Progress, SilentProgress
from llmc.records import Record
from llmc.report import read_report, render_front, write_tuning

#: Largest size in bytes of the cache of measurements, over all tunings.
_CACHE_BYTES = 64 << 20
#: Number of tunings whose journals are stored, finished or not.
_KEPT = 8
#: Optuna's journal, in the tuning's folder.
_JOURNAL = "study.log"
#: Number of successive known candidates after which the search space counts as exhausted.
_KNOWN_IN_A_ROW = 200


class TuneResult(Record):
    """The result of a tuning, and the target that was written.

    Args:
        target: The file; None if no candidate meets the constraints.
    """

    tuning: Tuning
    target: PathText | None

    def render(self) -> str:
        """Return the front as a table, and the command to build the chosen target."""
        text = render_front(self.tuning)
        if self.target is None:
            return text
        options = f"--profile {self.tuning.profile} --path {self.target.parent.parent}"
        return f"{text}\n{self.target}\nllmc build {self.tuning.model} --target {self.target.stem} {options}"

    def failure(self) -> LlmcError | None:
        """Return a parity error, or a latency error if the nearest candidate misses only speed."""
        tuning = self.tuning
        if tuning.chosen is not None:
            return None
        near = nearest(tuning.candidates, tuning.constraints)
        missed = {bound for bound, excess in find_excesses(near, tuning.constraints).items() if excess > 0}
        if not missed:
            return ParityError(
                f"of {len(tuning.candidates)} candidates, none that meets the constraints passes the gates "
                "of its base target",
                hint="the notes on stderr name the gates; llmc build with that target says more",
            )
        kind = LatencyError if missed == {Bound.SPEED} else ParityError
        return kind(
            f"none of {len(tuning.candidates)} candidates meets the constraints; the nearest is "
            f"{near.label}: {render_excesses(near, tuning.constraints)}",
            hint="relax the constraints, or continue the search with more --budget",
        )


def tune(plan: TunePlan, progress: Progress) -> TuneResult:
    """Measure candidates until the time is over, and write the best target that meets the constraints.

    Measurements are stored in the cache folder: the same tuning continues where it stopped, for whatever
    reason, and does nothing if its time is spent.

    Raises:
        ConfigError: A base has nothing to vary, the output is not a file in a folder `targets`, or another
            process runs the same tuning.
        UnsupportedError: A base is for a GPU, or cannot be built.
        ResourceError: Optuna is not installed, or the disk is full.
    """
    from llmc.checkpoint import open_checkpoint

    optuna = require_optuna()
    space = Space.around(plan.bases)
    _require_place(plan.output)
    if plan.report is not None:
        require_folder(plan.report)
    with progress.stage("checkpoint"):
        checkpoint = open_checkpoint(plan.model, plan.adapter)
        checkpoint.require_tokenizer()
    home = usable_folder(default_cache_folder() / "tune")
    bench = Workbench(
        checkpoint=checkpoint,
        profile=plan.profile,
        base=plan.bases[0],
        text=read_text(plan.eval_text),
        folder=home,
        cache=StageCache(home / "measured", _CACHE_BYTES),
        levels=plan.levels,
    )
    facts = {
        **bench.facts,
        "bases": [b.name + target_digest(b) for b in plan.bases],
        "constraints": plan.constraints.model_dump(),
        "levels": [level.render() for level in plan.levels],
        "optuna": optuna.__version__,
    }
    folder = home / content_key("tuning", facts)
    bench.folder = folder
    folder.mkdir(parents=True, exist_ok=True)
    _make_room(folder)
    with output_lock(folder / ".lock", folder):
        run = _Run(plan, bench, Search(folder / _JOURNAL, space, plan.constraints), progress)
        try:
            run.measure_bases()
            run.search_on()
            chosen = run.settle()
        except KeyboardInterrupt:
            progress.note("the measurements are kept: the same command continues from here")
            raise
        for name in ("base", "chosen", "chosen.failed"):
            shutil.rmtree(folder / name, ignore_errors=True)
    tuning = run.document(None if chosen is None else chosen[0])
    if plan.report is not None:
        write_tuning(tuning, plan.report)
    if chosen is None:
        return TuneResult(tuning=tuning, target=None)
    _write_target(chosen[1], plan.output)
    return TuneResult(tuning=tuning, target=plan.output)


class _Run:
    """A run of a tuning."""

    def __init__(self, plan: TunePlan, bench: Workbench, search: Search, progress: Progress) -> None:
        self.plan, self.bench, self.search, self.progress = plan, bench, search, progress
        self.targets: dict[str, Target] = {}
        self.levels: list[dict[str, Candidate]] = [{} for _ in plan.levels]
        self.refused: dict[str, Refused] = {}
        self.broken: set[str] = set()

    def measure_bases(self) -> None:
        """Measure the first base at every level, and read the results of earlier runs.

        Raises:
            UnsupportedError: The base cannot be built or run.
        """
        base = self.bench.base
        with self.progress.stage(f"base: {describe(base)}"), self.bench.open(base) as measure:
            for level in range(len(self.plan.levels)):
                measured = measure(level)
                if isinstance(measured, Refused):
                    raise UnsupportedError(
                        f"the base {base.name} cannot be measured: {measured.reason}",
                        hint=f"llmc build {self.plan.model} --target {base.name} says more",
                    )
                self._remember(base, measured)
        self.progress.note(self._describe(measured))
        for target, several in self.search.found():
            for each in several:
                self._remember(target, each)

    def search_on(self) -> None:
        """Measure candidates until the time or their number is spent, or none is new."""
        repeats = 0
        while self.search.seconds < self.plan.seconds and repeats < _KNOWN_IN_A_ROW:
            if self.plan.most is not None and self._count() >= self.plan.most:
                return
            asked = self.search.ask()
            repeats = repeats + 1 if self._is_known(target_digest(asked.target)) else 0
            self._climb(asked, quiet=repeats > 0)

    def settle(self) -> tuple[Candidate, Target] | None:
        """Choose a candidate, measure it to the end and check its gates; return it with its target."""
        while True:
            candidates = [c for c in self._best().values() if c.digest not in self.broken]
            chosen = choose(candidates, self.plan.constraints)
            if chosen is None:
                return None
            target = self.targets[chosen.digest]
            if chosen.level + 1 < len(self.plan.levels):
                with self.bench.open(target) as measure:
                    measured = measure(chosen.level + 1)
                self._remember(target, measured)
                self.progress.note(f"    {chosen.label}: {self._describe(measured)}")
                gated = None
            else:
                gated = self._gated_cached(chosen, target)
                if gated is None:
                    self.broken.add(chosen.digest)
            if gated is not None:
                return chosen, gated

    def document(self, chosen: Candidate | None) -> Tuning:
        """Collect all results."""
        profile = self.plan.profile
        return Tuning(
            model=self.plan.model,
            base=self.bench.base.name,
            profile=profile.name,
            where=detect_cpu().device,
            threads=self.bench.threads,
            constraints=self.plan.constraints,
            candidates=tuple(self._best().values()),
            refused=tuple(self.refused.values()),
            levels=tuple(level.render() for level in self.plan.levels),
            front=tuple(c.digest for c in find_front(list(self.levels[-1].values()))),
            chosen=None if chosen is None else chosen.digest,
            seconds=self.search.seconds,
        )

    def _climb(self, asked: Asked, *, quiet: bool) -> None:
        """Measure a candidate level by level, as long as it survives and there is time."""
        start = time.monotonic()
        measured: list[Candidate | Refused] = []
        label = describe(asked.target)
        with self.bench.open(asked.target) as measure:
            for level in range(len(self.plan.levels)):
                each = measure(level)
                measured.append(each)
                self._remember(asked.target, each)
                if isinstance(each, Refused):
                    break
                peers = list(self.levels[level].values())
                spent = self.search.seconds + time.monotonic() - start
                if not survives(each, peers, self.plan.constraints) or spent > self.plan.seconds:
                    break
        self.search.tell(asked, measured, time.monotonic() - start)
        if not quiet:
            self.progress.note(f"{self._count():3} {label}: {self._describe(measured[-1])}")

    def _remember(self, target: Target, measured: Candidate | Refused) -> None:
        self.targets.setdefault(measured.digest, target)
        if isinstance(measured, Refused):
            self.refused[measured.digest] = measured
        else:
            self.levels[measured.level].setdefault(measured.digest, measured)

    def _best(self) -> dict[str, Candidate]:
        """Return each candidate at its highest level, the base first."""
        best: dict[str, Candidate] = {}
        for level in self.levels:
            best |= level
        return {digest: found for digest, found in best.items() if digest not in self.refused}

    def _is_known(self, digest: str) -> bool:
        return digest in self.levels[0] or digest in self.refused

    def _count(self) -> int:
        """Count the candidates that were measured or refused, besides the base."""
        return len(self.levels[0]) - 1 + len(self.refused)

    def _describe(self, measured: Candidate | Refused) -> str:
        if isinstance(measured, Refused):
            return f"refused: {measured.reason}"
        return (
            f"KL {measured.kl:.4g} on {self.plan.levels[measured.level].windows} windows, "
            f"{measured.tokens_per_s:.4g} tokens/s ({1 / measured.step_ratio:.3f} x the base), "
            f"first token {measured.first_ms:.4g} ms, {measured.bytes / 1e6:.4g} MB"
        )

    def _gated_cached(self, chosen: Candidate, target: Target) -> Target | None:
        """Return the result of `_gated`, cached unless it is None."""
        settings = target.model_copy(update={"name": self.plan.output.stem}).model_dump(mode="json")
        bound = self.plan.constraints.max_kl
        key = content_key("tune", {**self.bench.facts, "held": settings, "max_kl": bound})
        cached = self.bench.cache.get(key)
        if cached is not None:
            return Target.model_validate_json(cached)
        with self.progress.stage(f"verify: {chosen.label}"):
            gated = self._gated(chosen, target)
        if gated is not None:
            self.bench.cache.put(key, gated.model_dump_json().encode())
        return gated

    def _gated(self, chosen: Candidate, target: Target) -> Target | None:
        """Return a candidate's target with gates that it passes; None if it is wrong, not only inexact.

        Raises:
            ParityError: A second build differs from the first.
        """
        plan = self.plan
        strict = strict_gates(target.gates, plan.constraints.max_kl)
        result = build(
            BuildPlan(
                model=plan.model,
                adapter=plan.adapter,
                target=target.model_copy(update={"gates": strict}),
                profile=plan.profile,
                output=self.bench.folder / "chosen",
                eval_text=self.bench.text,
                token_ids=True,
            ),
            SilentProgress(),
        )
        failure = result.failure()
        if failure is not None:
            self.progress.note(f"{chosen.label} is rejected: {failure.fact}")
            return None
        files = result.manifest.files
        if any(files[name].sha256 != digest for name, digest in chosen.model.items()):
            raise ParityError(
                f"{chosen.label} was built twice with different bytes",
                hint=f"remove {self.bench.folder} and tune again",
            )
        report = read_report(result.path / REPORTS / "parity.json")
        return target.model_copy(
            update={
                "name": plan.output.stem,
                "summary": f"{target.name} tuned for {plan.model}: {self._describe(chosen)}",
                "gates": restate_gates(target.gates, report.measurements, plan.constraints.max_kl),
            }
        )


def _make_room(folder: Path) -> None:
    """Mark a tuning's folder as used, and remove the least recently used ones beside it."""
    os.utime(folder)
    others = [p for p in folder.parent.iterdir() if (p / _JOURNAL).is_file() and p != folder]
    for old in sorted(others, key=lambda p: p.stat().st_mtime_ns)[: max(0, len(others) - _KEPT + 1)]:
        try:
            with output_lock(old / ".lock", old):
                shutil.rmtree(old)
        except ConfigError:  # another process is using it
            continue


def _require_place(output: Path) -> None:
    """Require a folder `targets`, since targets are found only there.

    Raises:
        ConfigError: The output is elsewhere, or is not writable.
    """
    if output.parent.name != "targets" or output.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"--output {output} would not be found as a target",
            hint="name a YAML file in a folder targets, such as mine/targets/fast.yaml",
        )
    require_folder(output.parent)


def _write_target(target: Target, output: Path) -> None:
    """Write a target atomically."""
    partial = output.with_name(f".{output.name}.partial")
    with space_errors(output), access_errors(output):
        partial.write_text(render_document(target) + "\n", encoding="utf-8")
        os.replace(partial, output)
