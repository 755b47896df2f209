"""Run multiple-choice tasks of lm-evaluation-harness: accuracy of an artifact beside the original's.

Prompts, choices and scoring come from that library (https://github.com/EleutherAI/lm-evaluation-harness): an
item is right if the choice with the highest log-likelihood after the prompt is the right one (`acc`). Both
sides are given the tokens of the original's tokenizer.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.artifact.verdict import Measurement
from llmc.config import Metric
from llmc.errors import ConfigError, LlmcError, ResourceError, UnsupportedError
from llmc.runtime.session import Session
from llmc.validate.distribution import log_softmax
from llmc.validate.interval import mean_interval
from llmc.validate.measure import measure, measured
from llmc.validate.questions import Score, ask_score, read_score
from llmc.validate.reference import Reference

#: Scores pairs of a prompt and a choice after it.
_Scorer = Callable[[Sequence[tuple[Array, Array]]], list[Score]]

#: Minimum number of items for a confidence interval.
LEAST_ITEMS = 2


@dataclass(frozen=True)
class Tasks:
    """The tasks with their items in memory.

    Args:
        by_name: Tasks of lm-evaluation-harness.
        items: Maximum number of items of each task, counted from its first; None for all.
    """

    by_name: Mapping[str, Any]
    items: int | None


def load_tasks(names: Sequence[str], items: int | None) -> Tasks:
    """Load tasks by their names in lm-evaluation-harness, or from YAML files in its format.

    Raises:
        ResourceError: The library is not installed.
        ConfigError: There is no such task, it cannot be loaded, or it has too few items.
        UnsupportedError: It is not a multiple-choice task, or is not scored by accuracy.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ResourceError(
            "lm-evaluation-harness, which reads the tasks, is not installed",
            hint="pip install 'llmc[lm-eval]'",
        ) from error
    files = all(Path(name).is_file() for name in names)
    manager = TaskManager(include_defaults=not files)  # the defaults index thousands of files
    tasks: dict[str, Any] = {}
    for name in names:
        if not Path(name).is_file() and name not in manager.all_tasks:
            raise ConfigError(
                f"there is no task {name}: it is neither a file nor a name that lm-evaluation-harness knows",
                hint=_nearest(name, manager.all_tasks),
            )
        try:
            with _quiet():
                tasks |= manager.load([name])["tasks"]
        except Exception as error:  # YAML, templates and data sets raise many kinds of errors
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"task {name} cannot be loaded: {reason}",
                hint="its data must be on this machine: a local file, or the cache of the datasets library",
            ) from error
    for name, task in tasks.items():
        _require_choices(name, task, items)
    return Tasks(tasks, items)


def measure_tasks(model: Session, reference: Reference, tokenizer: Any, tasks: Tasks) -> Measurement:
    """Measure TASK_ACCURACY_CHANGE: accuracy of the artifact minus the original's, over all tasks' items.

    The interval is taken of the mean of the items' differences: both sides answer the same items, so that
    items that are hard for both do not widen it.

    Args:
        tokenizer: The original's transformers tokenizer.
    """

    def take() -> tuple[Measurement, ...]:
        artifact = _answer(tasks, tokenizer, lambda pairs: [_score(model, *pair) for pair in pairs])
        original = _answer(tasks, tokenizer, partial(_score_original, reference))
        differences = [artifact[item] - original[item] for item in original]
        figures = {}
        for side, answers in (("artifact", artifact), ("original", original)):
            figures[f"accuracy_{side}"] = float(np.mean(list(answers.values())))
            for name in tasks.by_name:
                figures[f"{name}_{side}"] = float(np.mean([v for (n, _), v in answers.items() if n == name]))
        ours, theirs = figures["accuracy_artifact"], figures["accuracy_original"]
        scope = f"{len(differences)} items of {', '.join(tasks.by_name)}"
        detail = f"{scope}: {ours:.3f} right, {theirs:.3f} by the original"
        interval = mean_interval(differences)
        metric = Metric.TASK_ACCURACY_CHANGE
        return (measured(metric, ours - theirs, detail, model.where, figures, interval),)

    (change,) = measure((Metric.TASK_ACCURACY_CHANGE,), model.where, take)
    return change


def _nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists the tasks it knows"


def _require_choices(name: str, task: Any, items: int | None) -> None:
    if task.OUTPUT_TYPE != "multiple_choice":
        raise UnsupportedError(
            f"task {name} asks for {task.OUTPUT_TYPE}; only multiple_choice tasks are measured",
            hint="use a task whose output_type is multiple_choice",
        )
    if "acc" not in task.aggregation():
        raise UnsupportedError(
            f"task {name} is scored by {', '.join(task.aggregation())}, not by acc",
            hint="add `- metric: acc` to its metric_list",
        )
    count = len(task.eval_docs) if items is None else min(items, len(task.eval_docs))
    if count < LEAST_ITEMS:
        raise ConfigError(
            f"task {name} has {count} items, at least {LEAST_ITEMS} are needed",
            hint="a difference of two accuracies of a few hundred items is still uncertain by some percent",
        )


def _answer(tasks: Tasks, tokenizer: Any, score: _Scorer) -> dict[tuple[str, int], float]:
    """Return 1 for each item (task, number) that is answered right, otherwise 0."""
    from lm_eval import evaluate

    try:
        with _quiet():
            results = evaluate(
                lm=_adapt(score, tokenizer),
                task_dict=dict(tasks.by_name),
                limit=tasks.items,
                bootstrap_iters=0,
                log_samples=True,
            )
    except LlmcError:
        raise
    except Exception as error:  # a template that does not fit the task's items raises many kinds of errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"tasks {', '.join(tasks.by_name)} cannot be run: {reason}") from error
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = results["samples"]
    return {(name, int(s["doc_id"])): float(s["acc"]) for name, rows in samples.items() for s in rows}


def _adapt(score: _Scorer, tokenizer: Any) -> Any:
    """Adapt a function that scores tokens to the model interface of lm-evaluation-harness."""
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):  # type: ignore[misc]
        """Scores continuations; the base class cuts pairs of prompt and choice into tokens."""

        @property
        def eot_token_id(self) -> int:
            begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
            return int(begin if begin is not None else end)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            special = add_special_tokens is not False
            ids: list[int] = tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"]
            return ids

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            pairs = [(np.array(p, np.int64), np.array(c, np.int64)) for _texts, p, c in requests]
            return [(scored.log_likelihood, scored.greedy) for scored in score(pairs)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise UnsupportedError("a task asks for the likelihood of whole texts; only choices are scored")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise UnsupportedError("a task asks for generated text; only choices are scored")

    return Adapter()


def _score_original(reference: Reference, pairs: Sequence[tuple[Array, Array]]) -> list[Score]:
    questions = [ask_score(prompt, choice) if len(choice) else None for prompt, choice in pairs]
    reference.prepare([q for q in questions if q is not None])
    return [Score(0.0, True) if q is None else read_score(reference.ask(q)) for q in questions]


def _score(model: Session, prompt: Array, choice: Array) -> Score:
    """Return the log-likelihood of `choice` after `prompt`, decoded token by token as when served."""
    limit = model.interface.max_length
    if limit is not None:
        prompt = prompt[max(0, len(prompt) + len(choice) - limit) :]
    total, greedy = 0.0, True
    logits = model.prefill(prompt[None], steps=max(0, len(choice) - 1))[0, -1]
    for at, token in enumerate(choice):
        if at > 0:
            logits = model.decode(choice[None, at - 1 : at])[0, -1]
        total += float(log_softmax(logits)[token])
        greedy = greedy and int(logits.argmax()) == int(token)
    return Score(total, greedy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice of the libraries off the terminal, which shows llmc's own progress."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
