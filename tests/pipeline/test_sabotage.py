"""Two good artifacts pass; each of those that were broken on purpose fails with the right check named."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmc.artifact.verdict import CheckStatus
from llmc.config import Gate, Metric
from llmc.pipeline import build, verify
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.models import save_tiny_model

from .sabotage import SABOTAGES, Sabotage, copy_artifact, reseal

TEXT = "The river bends twice before the mill; a compiler reads a model and writes a program. " * 40
#: A random model of three layers loses more to 4 bits than the targets allow a trained one.
RANDOM = {
    Metric.TEXT_KL_MEAN: ("max", 0.5),
    Metric.TEXT_TOP1: ("min", 0.2),
    Metric.TEXT_PERPLEXITY_RATIO: ("max", 1.6),
}


def _gates(gates: tuple[Gate, ...]) -> Iterator[Gate]:
    for gate in gates:
        direction, bound = RANDOM.get(gate.metric, (None, None))
        if direction is None:
            yield gate
        else:
            yield Gate(metric=gate.metric, reason="a random model of three layers", **{direction: bound})


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """One artifact in float32 and one in 4 bits; PyTorch's side is computed once for all tests."""
    import torch

    root = tmp_path_factory.mktemp("good")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (root / "text").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", str(root / "cache"))
        built = {}
        model = save_tiny_model("mistral", root / "model", tokenizer=True, tie_word_embeddings=True)
        for name, target in (("float", "cpu-fp32"), ("int4", "cpu-int4")):
            plan = plan_build(str(model), target=target, profile="local", output=root / name, verify=False)
            gates = tuple(_gates(plan.target.gates)) if name == "int4" else plan.target.gates
            changed = plan.target.model_copy(update={"gates": gates})
            threads_of_one = plan.profile.model_copy(update={"threads": 1})
            plan = plan.model_copy(update={"target": changed, "profile": threads_of_one})
            built[name] = build(plan, SilentProgress()).path
        yield built
    torch.set_num_threads(threads)


def _check(folder: Path, artifacts: dict[str, Path]) -> dict[Metric, CheckStatus]:
    text = artifacts["float"].parent / "text"
    report = verify(folder, None, (str(text),), SilentProgress()).report
    assert report.verdict.passed == (not report.verdict.missed)
    return {c.metric: c.status for c in report.verdict.checks}


@pytest.mark.parametrize("name", ["float", "int4"])
def test_a_good_artifact_passes(name: str, artifacts: dict[str, Path]) -> None:
    found = _check(artifacts[name], artifacts)
    assert {m for m, s in found.items() if s is not CheckStatus.PASS} == set()


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda s: f"{s.name} ({s.artifact})")
def test_a_broken_artifact_fails_the_right_check(
    sabotage: Sabotage, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_artifact(artifacts[sabotage.artifact], tmp_path / "broken")
    sabotage.apply(folder)
    if sabotage.sealed:
        reseal(folder)
    found = _check(folder, artifacts)
    missed = {m for m, s in found.items() if s is CheckStatus.FAIL}
    expected = {m for m in sabotage.caught if m in found}
    assert expected
    assert expected <= missed
