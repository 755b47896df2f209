"""Choose the next candidate: Optuna's multi-objective TPE with a journal that survives the process.

Optuna's pruners support only one objective, so `llmc.pipeline.tune.choosing.survives` decides how closely a
candidate is measured; Optuna gets the values of the last level that a candidate reached.
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

#: Candidates that are drawn at random before the sampler starts to model.
_RANDOM = 8
#: Smallest divergence, for its logarithm.
_LEAST_KL = 1e-9
_FOUND: TypeAdapter[tuple[Candidate | Refused, ...]] = TypeAdapter(tuple[Candidate | Refused, ...])


def require_optuna() -> Any:
    """Import the module optuna.

    Raises:
        ResourceError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ResourceError(
            "optuna, which proposes candidates, is not installed", hint="pip install 'llmc[tune]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass(frozen=True)
class Asked:
    """A candidate to measure."""

    trial: Trial
    target: Target


class Search:
    """A study whose journal is a file.

    Args:
        file: The journal; created if missing.
        space: All candidates.
        constraints: Bounds for them.
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
        trials = self._study.get_trials(deepcopy=False)
        # Another seed for each run: a continued run must not draw the same candidates again.
        self._study.sampler = optuna.samplers.TPESampler(seed=len(trials), n_startup_trials=_RANDOM)
        if not trials:
            for choices in space.anchors():
                self._study.enqueue_trial(choices)
        for trial in trials:
            if trial.state is self._states.RUNNING:  # a killed run's
                self._study.enqueue_trial(trial.params)
                self._study.tell(trial.number, state=self._states.FAIL)

    def ask(self) -> Asked:
        """Return the next candidate; it may have been measured already."""
        trial = self._study.ask()

        def choose(name: str, options: Sequence[Option]) -> Option:
            chosen: Option = trial.suggest_categorical(name, list(options))
            return chosen

        return Asked(trial, self._space.target(choose))

    def tell(self, asked: Asked, outcomes: Sequence[Candidate | Refused], seconds: float) -> None:
        """Record the results for a candidate, level by level, and the time they took."""
        trial, last = asked.trial, outcomes[-1]
        trial.set_user_attr("found", _FOUND.dump_python(tuple(outcomes), mode="json"))
        trial.set_user_attr("seconds", seconds)
        if isinstance(last, Refused):
            self._study.tell(trial, state=self._states.FAIL)
            return
        for bound, excess in find_excesses(last, self._constraints).items():
            trial.set_constraint(bound.value, excess)
        values = (max(last.kl, _LEAST_KL), last.step_ratio, last.first_ratio, last.bytes)
        self._study.tell(trial, [math.log(value) for value in values])

    def found(self) -> Iterator[tuple[Target, tuple[Candidate | Refused, ...]]]:
        """Yield each candidate so far and its results, level by level, in the order of `ask`."""
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
        """Return the time spent on candidates so far, earlier runs included."""
        attributes: list[Mapping[str, Any]] = [t.user_attrs for t in self._study.get_trials(deepcopy=False)]
        return sum(float(a.get("seconds", 0.0)) for a in attributes)


def _drop_torn_line(file: Path) -> None:
    """Remove an incomplete last line that a killed process left."""
    if file.is_file():
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with file.open("r+b") as journal:
                journal.truncate(len(whole))
