"""`llmc tune`: targets for one model and one machine, measured, and the best that meets what is asked."""

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

#: Most bytes of measurements that are kept, over all tunings.
_CACHE_BYTES = 64 << 20
#: Tunings whose journals are kept, finished or not.
_KEPT = 8
#: Optuna's journal, in the tuning's folder.
_JOURNAL = "study.log"
#: Candidates in a row that were known already, after which there is nothing left to look for.
_KNOWN_IN_A_ROW = 200


class TuneResult(Record):
    """A tuning, and the target that was written.

    Args:
        target: The file; None if nothing meets the constraints.
    """

    tuning: Tuning
    target: PathText | None

    def render(self) -> str:
        """The front as a table, and how to build what was taken."""
        text = render_front(self.tuning)
        if self.target is None:
            return text
        told = f"--profile {self.tuning.profile} --path {self.target.parent.parent}"
        return f"{text}\n{self.target}\nllmc build {self.tuning.model} --target {self.target.stem} {told}"

    def failure(self) -> LlmcError | None:
        """A parity error, or a latency error if the nearest candidate misses nothing but speed."""
        tuning = self.tuning
        if tuning.chosen is not None:
            return None
        near = nearest(tuning.candidates, tuning.constraints)
        missed = {bound for bound, excess in find_excesses(near, tuning.constraints).items() if excess > 0}
        if not missed:
            return ParityError(
                f"none of {len(tuning.candidates)} candidates that meets the constraints keeps the gates of "
                "the target that it comes from",
                hint="the notes on stderr name the gates; llmc build with that target says more",
            )
        kind = LatencyError if missed == {Bound.SPEED} else ParityError
        return kind(
            f"none of {len(tuning.candidates)} candidates meets the constraints; the nearest is "
            f"{near.label}: {render_excesses(near, tuning.constraints)}",
            hint="ask for less, or go on looking with more --budget",
        )


def tune(plan: TunePlan, progress: Progress) -> TuneResult:
    """Measure candidates until the time is over, and write the best target that meets the constraints.

    What was measured is kept in the cache folder: the same tuning goes on where it stopped, for whatever
    reason, and does nothing where its time is spent.

    Raises:
        ConfigError: A base has nothing to vary, the output is no file in a folder `targets`, or another
            process runs the same tuning.
        UnsupportedError: A base is for a GPU, or cannot be built.
        ResourceError: Optuna is not installed; no space.
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
            taken = run.settle()
        except KeyboardInterrupt:
            progress.note("what was measured is kept: the same command goes on from here")
            raise
        for name in ("base", "chosen", "chosen.failed"):
            shutil.rmtree(folder / name, ignore_errors=True)
    tuning = run.document(None if taken is None else taken[0])
    if plan.report is not None:
        write_tuning(tuning, plan.report)
    if taken is None:
        return TuneResult(tuning=tuning, target=None)
    _write_target(taken[1], plan.output)
    return TuneResult(tuning=tuning, target=plan.output)


class _Run:
    """One run of a tuning."""

    def __init__(self, plan: TunePlan, bench: Workbench, search: Search, progress: Progress) -> None:
        self.plan, self.bench, self.search, self.progress = plan, bench, search, progress
        self.targets: dict[str, Target] = {}
        self.levels: list[dict[str, Candidate]] = [{} for _ in plan.levels]
        self.refused: dict[str, Refused] = {}
        self.broken: set[str] = set()

    def measure_bases(self) -> None:
        """The first base with every level, and what earlier runs found.

        Raises:
            UnsupportedError: It cannot be built or run.
        """
        base = self.bench.base
        with self.progress.stage(f"base: {describe(base)}"), self.bench.open(base) as measure:
            for level in range(len(self.plan.levels)):
                found = measure(level)
                if isinstance(found, Refused):
                    raise UnsupportedError(
                        f"the base {base.name} cannot be measured: {found.reason}",
                        hint=f"llmc build {self.plan.model} --target {base.name} says more",
                    )
                self._remember(base, found)
        self.progress.note(self._told(found))
        for target, several in self.search.found():
            for each in several:
                self._remember(target, each)

    def search_on(self) -> None:
        """Candidates until the time or their number is spent, or none is new."""
        known = 0
        while self.search.seconds < self.plan.seconds and known < _KNOWN_IN_A_ROW:
            if self.plan.most is not None and self._count() >= self.plan.most:
                return
            asked = self.search.ask()
            known = known + 1 if self._is_known(target_digest(asked.target)) else 0
            self._climb(asked, quiet=known > 0)

    def settle(self) -> tuple[Candidate, Target] | None:
        """The candidate that is taken, measured to the end and held to its gates, with its target."""
        while True:
            known = [c for c in self._best().values() if c.digest not in self.broken]
            chosen = choose(known, self.plan.constraints)
            if chosen is None:
                return None
            target = self.targets[chosen.digest]
            if chosen.level + 1 < len(self.plan.levels):
                with self.bench.open(target) as measure:
                    found = measure(chosen.level + 1)
                self._remember(target, found)
                self.progress.note(f"    {chosen.label}: {self._told(found)}")
                held = None
            else:
                held = self._held_before(chosen, target)
                if held is None:
                    self.broken.add(chosen.digest)
            if held is not None:
                return chosen, held

    def document(self, chosen: Candidate | None) -> Tuning:
        """Everything that was found."""
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
        """One candidate, level by level, as long as it is worth it and there is time."""
        start = time.monotonic()
        found: list[Candidate | Refused] = []
        label = describe(asked.target)
        with self.bench.open(asked.target) as measure:
            for level in range(len(self.plan.levels)):
                each = measure(level)
                found.append(each)
                self._remember(asked.target, each)
                if isinstance(each, Refused):
                    break
                peers = list(self.levels[level].values())
                spent = self.search.seconds + time.monotonic() - start
                if not survives(each, peers, self.plan.constraints) or spent > self.plan.seconds:
                    break
        self.search.tell(asked, found, time.monotonic() - start)
        if not quiet:
            self.progress.note(f"{self._count():3} {label}: {self._told(found[-1])}")

    def _remember(self, target: Target, found: Candidate | Refused) -> None:
        self.targets.setdefault(found.digest, target)
        if isinstance(found, Refused):
            self.refused[found.digest] = found
        else:
            self.levels[found.level].setdefault(found.digest, found)

    def _best(self) -> dict[str, Candidate]:
        """Each candidate as it was measured most closely, the base first."""
        best: dict[str, Candidate] = {}
        for level in self.levels:
            best |= level
        return {digest: found for digest, found in best.items() if digest not in self.refused}

    def _is_known(self, digest: str) -> bool:
        return digest in self.levels[0] or digest in self.refused

    def _count(self) -> int:
        """Candidates that were looked at besides the base."""
        return len(self.levels[0]) - 1 + len(self.refused)

    def _told(self, found: Candidate | Refused) -> str:
        if isinstance(found, Refused):
            return f"refused: {found.reason}"
        return (
            f"KL {found.kl:.4g} on {self.plan.levels[found.level].windows} windows, "
            f"{found.tokens_per_s:.4g} tokens/s ({1 / found.step_ratio:.3f} x the base), "
            f"first token {found.first_ms:.4g} ms, {found.bytes / 1e6:.4g} MB"
        )

    def _held_before(self, chosen: Candidate, target: Target) -> Target | None:
        """As `_hold`, remembered where it was taken."""
        settings = target.model_copy(update={"name": self.plan.output.stem}).model_dump(mode="json")
        bound = self.plan.constraints.max_kl
        key = content_key("tune", {**self.bench.facts, "held": settings, "max_kl": bound})
        known = self.bench.cache.get(key)
        if known is not None:
            return Target.model_validate_json(known)
        with self.progress.stage(f"verify: {chosen.label}"):
            held = self._hold(chosen, target)
        if held is not None:
            self.bench.cache.put(key, held.model_dump_json().encode())
        return held

    def _hold(self, chosen: Candidate, target: Target) -> Target | None:
        """The target of a candidate with gates that it keeps; None if it is wrong, not only inexact.

        Raises:
            ParityError: Built again, it is not the same.
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
            self.progress.note(f"{chosen.label} is not taken: {failure.fact}")
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
                "summary": f"{target.name} tuned for {plan.model}: {self._told(chosen)}",
                "gates": restate_gates(target.gates, report.measurements, plan.constraints.max_kl),
            }
        )


def _make_room(folder: Path) -> None:
    """Mark a tuning's folder as used, and remove those beside it that were not used for longest."""
    os.utime(folder)
    others = [p for p in folder.parent.iterdir() if (p / _JOURNAL).is_file() and p != folder]
    for old in sorted(others, key=lambda p: p.stat().st_mtime_ns)[: max(0, len(others) - _KEPT + 1)]:
        try:
            with output_lock(old / ".lock", old):
                shutil.rmtree(old)
        except ConfigError:  # another process is at it
            continue


def _require_place(output: Path) -> None:
    """A target is found in a folder `targets` only.

    Raises:
        ConfigError: The output is elsewhere, or cannot be written to.
    """
    if output.parent.name != "targets" or output.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"--output {output} would not be found as a target",
            hint="name a YAML file in a folder targets, such as mine/targets/fast.yaml",
        )
    require_folder(output.parent)


def _write_target(target: Target, output: Path) -> None:
    """At once, so that there is never half of it."""
    partial = output.with_name(f".{output.name}.partial")
    with space_errors(output), access_errors(output):
        partial.write_text(render_document(target) + "\n", encoding="utf-8")
        os.replace(partial, output)
