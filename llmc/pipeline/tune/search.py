"""Which candidate comes next: Optuna's multi-objective TPE over a journal that survives the process.

Optuna's pruners know one objective only, so that how far a candidate is measured is decided by
`llmc.pipeline.tune.choosing.survives`; Optuna is told the figures that a candidate got as far as.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from llmc.artifact.tuning import Candidate, Constraints, Refused
from llmc.errors import ResourceError
from llmc.pipeline.tune.candidates import Option, Space
from llmc.pipeline.tune.choosing import find_excesses

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

    from llmc.config import Target

#: Candidates that are drawn at random before the sampler models anything.
_RANDOM = 8
#: Least divergence that is told apart, for its logarithm.
_LEAST_KL = 1e-9
_FOUND: TypeAdapter[tuple[Candidate | Refused, ...]] = TypeAdapter(tuple[Candidate | Refused, ...])


def require_optuna() -> Any:
    """The module.

    Raises:
        ResourceError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ResourceError(
            "optuna, which proposes what to measure, is not installed", hint="pip install 'llmc[tune]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass(frozen=True)
class Asked:
    """A candidate that is to be measured."""

    trial: Trial
    target: Target


class Search:
    """A study whose journal is a file.

    Args:
        file: The journal; made if it is not there.
        space: What candidates there are.
        constraints: What is asked of them.
    """

    def __init__(self, file: Path, space: Space, constraints: Constraints) -> None:
        optuna = require_optuna()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        file.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(file)
        self._states = optuna.trial.TrialState
        self._space, self._constraints = space, constraints
        self._study: Study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(file))),
            study_name="tune",
            directions=["minimize"] * 4,
            load_if_exists=True,
        )
        known = self._study.get_trials(deepcopy=False)
        # Another seed for each run: one that goes on is not to draw again what it drew before.
        self._study.sampler = optuna.samplers.TPESampler(seed=len(known), n_startup_trials=_RANDOM)
        if not known:
            for choices in space.anchors():
                self._study.enqueue_trial(choices)
        for trial in known:
            if trial.state is self._states.RUNNING:  # a killed run's
                self._study.enqueue_trial(trial.params)
                self._study.tell(trial.number, state=self._states.FAIL)

    def ask(self) -> Asked:
        """The next candidate; it may be one that was measured already."""
        trial = self._study.ask()

        def choose(name: str, options: Sequence[Option]) -> Option:
            chosen: Option = trial.suggest_categorical(name, list(options))
            return chosen

        return Asked(trial, self._space.target(choose))

    def tell(self, asked: Asked, found: Sequence[Candidate | Refused], seconds: float) -> None:
        """What became of a candidate, level by level, and the time that it took."""
        trial, last = asked.trial, found[-1]
        trial.set_user_attr("found", _FOUND.dump_python(tuple(found), mode="json"))
        trial.set_user_attr("seconds", seconds)
        if isinstance(last, Refused):
            self._study.tell(trial, state=self._states.FAIL)
            return
        for bound, excess in find_excesses(last, self._constraints).items():
            trial.set_constraint(bound.value, excess)
        values = (max(last.kl, _LEAST_KL), last.step_ratio, last.first_ratio, last.bytes)
        self._study.tell(trial, [math.log(value) for value in values])

    def found(self) -> Iterator[tuple[Target, tuple[Candidate | Refused, ...]]]:
        """Each candidate so far and what was found on it, level by level, in the order asked for."""
        for trial in self._study.get_trials(deepcopy=False):
            if "found" in trial.user_attrs:
                params = trial.params

                def choose(
                    name: str, options: Sequence[Option], params: Mapping[str, Any] = params
                ) -> Option:
                    chosen: Option = params[name]
                    return chosen

                yield self._space.target(choose), _FOUND.validate_python(tuple(trial.user_attrs["found"]))

    @property
    def seconds(self) -> float:
        """Spent on candidates so far, earlier runs included."""
        attributes: list[Mapping[str, Any]] = [t.user_attrs for t in self._study.get_trials(deepcopy=False)]
        return sum(float(a.get("seconds", 0.0)) for a in attributes)


def _drop_torn_line(file: Path) -> None:
    """Cut off what a process that was killed in the midst of writing left of a line."""
    if file.is_file():
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with file.open("r+b") as journal:
                journal.truncate(len(whole))
