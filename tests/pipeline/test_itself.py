"""A model whose steps over the cache are not its own pass: a right artifact passes, a wrong one does not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from llmc.artifact.manifest import State
from llmc.artifact.verdict import CheckStatus
from llmc.checkpoint import open_checkpoint
from llmc.config import Metric
from llmc.pipeline import build, verify
from llmc.pipeline.result import BuildResult
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.report import Report, render_html, render_markdown, render_text
from llmc.validate.reference import TorchModel
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model

from .sabotage import Edit, cache_off_by_one, copy_artifact, reseal

TEXT = "The river bends twice before the mill; a compiler reads a model and writes a program. " * 40
HELD = "the artifact is therefore compared with its one pass"
#: What a fault in single steps must fail.
STEPS = {Metric.DECODE_MAX_ABS, Metric.TEXT_KL_MEAN, Metric.GENERATE_EQUAL}


class Told(SilentProgress):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model whose decode in transformers is wrong: its convolution, and its states."""
    import torch

    folder, threads = tmp_path_factory.mktemp("itself"), torch.get_num_threads()
    torch.set_num_threads(1)
    (folder / "text").write_text(TEXT, encoding="utf-8")
    layers: dict[str, Any] = {"num_hidden_layers": 3, "attn_layer_indices": [1]}
    sizes = {"max_position_embeddings": 64, "eos_token_id": EOS}
    save_tiny_model("bamba", folder / "model", tokenizer=True, **layers, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", own_cache(folder / "cache"))
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def built(root: Path) -> tuple[BuildResult, list[str]]:
    plan = plan_build(str(root / "model"), target="cpu-fp32", profile="local", output=root / "out")
    told = Told()
    return build(plan, told), told.notes


def _verify(folder: Path, root: Path) -> Report:
    return verify(folder, None, (str(root / "text"),), SilentProgress(), every=True).report


def test_the_right_artifact_passes_and_the_distance_is_reported(
    built: tuple[BuildResult, list[str]], root: Path
) -> None:
    result, notes = built
    assert result.manifest.state is State.VERIFIED
    assert len([note for note in notes if note.endswith(HELD)]) == 1
    report = _verify(result.path, root)
    assert report.verdict.passed
    found = next(m for m in report.measurements if m.metric is Metric.ORIGINAL_DECODE)
    assert found.value is not None
    assert found.value > 0.1
    assert found.figures["other_choices"] > 0
    equal = next(c for c in report.verdict.checks if c.metric is Metric.GENERATE_EQUAL)
    assert equal.status is CheckStatus.PASS
    for text in (render_markdown(report), render_html(report), " ".join(render_text(report).split())):
        assert found.detail in text


def test_the_originals_own_greedy_text_is_not_that_of_its_pass(root: Path) -> None:
    """So that text by its steps could not judge an artifact."""
    model = TorchModel(open_checkpoint(str(root / "model")).fill_reference())
    prompt = np.arange(20, 30)
    text = np.concatenate([prompt, model.greedy(prompt, 24)])
    assert (model.logits(text[:-1], keep=24).argmax(axis=1) != text[10:]).any()


def _stale(name: str) -> Callable[[Path], None]:
    """Single steps leave a state of the first layer as it was."""

    def apply(folder: Path) -> None:
        with Edit(folder) as edit:
            one = edit.constant("stale/one", np.array([1], np.int64))
            now = [
                helper.make_node("Shape", ["input_ids"], ["stale/new"], start=1, end=2),
                helper.make_node("Equal", ["stale/new", one], ["stale/step"]),
            ]

            def make(a: str, b: str) -> list[Any]:
                past = f"past_key_values.0.{name}"
                return [*now, helper.make_node("Where", ["stale/step", past, a], [b])]

            edit.filter_output(f"present.0.{name}", make)

    return apply


@pytest.mark.parametrize(
    ("fault", "missed"),
    [
        (cache_off_by_one, STEPS),
        (_stale("conv_state"), STEPS),
        (_stale("recurrent_state"), STEPS),
    ],
    ids=["cache off by one", "stale convolution", "stale recurrence"],
)
def test_an_artifact_that_is_wrong_in_steps_fails(
    fault: Callable[[Path], None],
    missed: set[Metric],
    built: tuple[BuildResult, list[str]],
    root: Path,
    tmp_path: Path,
) -> None:
    folder = copy_artifact(built[0].path, tmp_path / "broken")
    fault(folder)
    reseal(folder)
    report = _verify(folder, root)
    failed = {c.metric for c in report.verdict.checks if c.status is CheckStatus.FAIL}
    assert missed <= failed
    assert next(c for c in report.verdict.checks if c.metric is Metric.PREFILL_MAX_ABS).value < 1e-3
