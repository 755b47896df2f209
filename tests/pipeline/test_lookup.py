"""`llmc run --lookup` on the demo model with compiled kernels: the same text, to the last token."""

import json
from pathlib import Path

import pytest

from llmc.artifact.store.folder import open_artifact
from llmc.backends.base import SameText
from llmc.backends.onnxruntime.lookup import same_text
from llmc.cli import main
from llmc.config import Dtype
from llmc.errors import ConfigError
from llmc.pipeline import build, run
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model

CODE = """def sum_prices(items):
    total = 0
    for item in items:
        if item.price > 0:
            total = total + item.price * item.count
    return total
"""
PROMPTS = (
    f"Rename the variable `total` to `amount` and print the whole code again.\n\n{CODE}",
    "Summarise: the river Asel rose above the old bridge for three days, and the old bridge held.",
    "Name three rivers of Europe.",
    "Hi",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", own_cache(folder / "cache"))
        plan = plan_build(
            "demo", target="cpu-int4-compiled", profile="local", output=folder / "out", verify=False
        )
        return build(plan, SilentProgress()).path


def silent(_: str) -> None:
    pass


@pytest.mark.parametrize("prompt", PROMPTS, ids=["code", "summary", "chat", "short"])
def test_the_demo_says_the_same(demo: Path, prompt: str) -> None:
    plain = run(demo, prompt, 100, silent, SilentProgress())
    found = run(demo, prompt, 100, silent, SilentProgress(), lookup=7)
    assert found.text == plain.text
    assert found.tokens == plain.tokens > 5
    assert plain.lookup is None
    assert found.lookup is not None
    assert found.lookup.same_text is SameText.EXACT


def test_what_repeats_takes_fewer_steps(demo: Path) -> None:
    found = run(demo, "Count from 1 to 40, separated by commas.", 60, silent, SilentProgress(), lookup=7)
    assert found.lookup is not None
    assert 10 < found.lookup.accepted <= found.lookup.drafted
    assert found.steps < found.tokens / 2
    assert found.tokens_per_step == round(found.tokens / found.steps, 3)


def test_the_command_prints_one_document(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", str(demo), PROMPTS[0], "--max-tokens", "30", "--lookup", "5", "--json"])
    captured = capsys.readouterr()
    assert caught.value.code == 0
    printed = json.loads(captured.out)
    assert set(printed) == {"text", "tokens", "steps", "tokens_per_step", "lookup"}
    assert set(printed["lookup"]) == {"draft", "drafted", "accepted", "same_text"}
    assert printed["lookup"]["draft"] == 5
    assert printed["lookup"]["same_text"] == "exact"
    assert f"{printed['tokens']} tokens in {printed['steps']} steps" in captured.err
    with pytest.raises(SystemExit) as caught:
        main(["run", str(demo), PROMPTS[0], "--max-tokens", "30"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == printed["text"] + "\n"


def test_drafts_have_a_length(demo: Path) -> None:
    for draft in (0, 8):
        with pytest.raises(ConfigError, match=f"{draft} tokens are to be drafted in a step"):
            run(demo, "Hi", 4, silent, SilentProgress(), lookup=draft)


def test_what_the_same_text_rests_on(demo: Path) -> None:
    manifest = open_artifact(demo).manifest
    plain = manifest.model_copy(update={"kernels": None})
    assert same_text(plain) is SameText.ROUNDED  # its products round activations to 8 bits
    floats = manifest.target.model_copy(update={"quantize": None})
    assert same_text(plain.model_copy(update={"target": floats})) is SameText.TIES
    halves = floats.model_copy(update={"dtype": Dtype.FLOAT16})
    assert same_text(plain.model_copy(update={"target": halves})) is SameText.ROUNDED
    assert manifest.kernels is not None
    left = manifest.kernels.outside[0].model_copy(update={"operator": "MatMul"})
    partial = manifest.kernels.model_copy(update={"outside": (left,)})
    assert same_text(manifest.model_copy(update={"kernels": partial})) is SameText.ROUNDED


def test_rounding_is_said_and_an_artifact_may_ask_for_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    plan = plan_build(str(model), target="cpu-int4", profile="local", output=tmp_path / "out", verify=False)
    passes = tuple(spec for spec in plan.target.passes if spec.name != "last-token-logits")
    target = plan.target.model_copy(update={"logits": "all", "passes": passes, "lookup": 6})
    made = build(plan.model_copy(update={"target": target}), SilentProgress()).path
    assert json.loads((made / "genai_config.json").read_text())["speculative"]["max_draft_tokens"] == 6
    served = run(made, "the river", 40, silent, SilentProgress())
    again = run(made, "the river", 40, silent, SilentProgress(), lookup=6)
    assert served.text == again.text
    with pytest.raises(SystemExit):
        main(["run", str(made), "the river", "--max-tokens", "4", "--lookup", "6"])
    assert "the text may diverge from the text without --lookup" in capsys.readouterr().err
