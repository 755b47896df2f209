"""A fault that shows in a small part of the context alone fails the level that looks there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmc.artifact.verdict import CheckStatus
from llmc.config import Metric
from llmc.pipeline import build, verify
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.report import Report
from tests.caches import own_cache

from .sabotage import copy_artifact, reseal
from .sabotage_positions import CONTEXT, FAULTS, Fault, save_long_model

TEXT = "The river bends twice before the mill; a compiler reads a model and writes a program. " * 40
TARGETS = ("cpu-fp32", "cpu-int4", "cpu-int4-compiled")
#: Faults that are tried on every target: its own kernels compute with what is wrong, or differ in the step.
EVERYWHERE = {
    "every step past 180 tokens",
    "rotary tables reversed from 900 on",
    "pieces of 8",
    "one token id read as another",
}
LEVELS = {"prefill", "chunks", "decode", "ragged"}


def build_long(folder: Path) -> dict[str, Path]:
    """A tiny model with a long context, as each target."""
    folder.mkdir(exist_ok=True)
    (folder / "text").write_text(TEXT, encoding="utf-8")
    model = save_long_model(folder / "model")
    for target in TARGETS:
        plan = plan_build(str(model), target=target, profile="local", output=folder / target, verify=False)
        profile = plan.profile.model_copy(update={"threads": 1})
        build(plan.model_copy(update={"profile": profile}), SilentProgress())
    return {target: folder / target for target in TARGETS}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import torch

    folder, threads = tmp_path_factory.mktemp("positions"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", own_cache(folder / "cache"))
        build_long(folder)
        yield folder
    torch.set_num_threads(threads)


def verify_long(folder: Path, root: Path) -> Report:
    """The report on an artifact, which is looked at in the same places every time, whatever else is wrong."""
    text = (str(root / "text"),)
    return verify(folder, None, text, SilentProgress(), every=True, seed=7, budget=34.0).report


def _missed(report: Report) -> set[str]:
    checks = report.verdict.checks
    areas = {str(c.metric).partition(".")[0] for c in checks if c.status is CheckStatus.FAIL}
    return areas & LEVELS


@pytest.mark.parametrize("target", TARGETS)
def test_the_whole_context_of_a_good_artifact_is_verified(target: str, root: Path) -> None:
    report = verify_long(root / target, root)
    assert _missed(report) == set()
    found = next(m for m in report.measurements if m.metric is Metric.POSITIONS)
    assert (found.value, found.figures["compared"], found.figures["seed"]) == (CONTEXT, CONTEXT, 7)


def cases() -> Iterator[Any]:
    """Every fault with the targets that it is tried on; those that only negate logits take turns."""
    for number, fault in enumerate(FAULTS):
        turn = number % len(TARGETS)
        for target in TARGETS if fault.name in EVERYWHERE else TARGETS[turn : turn + 1]:
            yield pytest.param(fault, target, id=f"{fault.name}-{target}")


@pytest.mark.parametrize(("fault", "target"), tuple(cases()))
def test_a_fault_somewhere_in_the_context_is_caught(
    fault: Fault, target: str, root: Path, tmp_path: Path
) -> None:
    folder = copy_artifact(root / target, tmp_path / "broken")
    fault.apply(folder)
    reseal(folder)
    assert _missed(verify_long(folder, root)) >= fault.caught
