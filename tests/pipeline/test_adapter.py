"""A LoRA adapter from the command's plan to the verified artifact, and back to the adapter."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from llmc.artifact.manifest import State
from llmc.config import Metric
from llmc.errors import CheckpointError, ConfigError
from llmc.pipeline import build, inspect, verify
from llmc.plan import default_output, plan_build
from llmc.progress import SilentProgress
from tests.caches import own_cache
from tests.checkpoint.test_adapter import on_q, product, save_adapter
from tests.models import EOS, save_tiny_model
from tests.notes import Notes


def test_it_is_merged_recorded_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    base = save_tiny_model("llama", tmp_path / "base", tokenizer=True, eos_token_id=EOS)
    adapter = save_adapter(tmp_path / "lora", on_q(), base_model_name_or_path=str(base))
    out, notes = tmp_path / "out", Notes()
    plan = plan_build(str(base), target="cpu-fp32", profile="local", output=out, adapter=str(adapter))
    result = build(plan, notes)
    said = f"adapter {adapter}: LoRA of rank 4, alpha 16 merged into 3 modules (q_proj 3)"
    assert result.manifest.state is State.VERIFIED
    assert said in notes.notes
    measured = json.loads((out / "reports" / "parity.json").read_text())["measurements"]
    loaders = next(each["detail"] for each in measured if each["metric"] == "original.mismatches")
    assert loaders.endswith("parameters are equal; the adapter's changes, which are not compared")
    assert said in result.render()
    assert said in inspect(str(out)).render()

    merged = save_tiny_model("llama", tmp_path / "merged", tokenizer=True, eos_token_id=EOS)
    tensors = load_file(merged / "model.safetensors")
    for name in [name for name in tensors if "q_proj" in name]:
        tensors[name] += (4 * product(on_q(), name.removesuffix(".weight"))).astype("float32")
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    assert verify(out, None, (), SilentProgress()).failure() is None
    other = verify(out, str(merged), (), SilentProgress(), force=True, adapter="none", every=True)
    # Merged in another order of sums: not the same bits, and the same numbers.
    assert {check.metric for check in other.report.verdict.missed} <= {Metric.WEIGHTS_EXACT}
    with pytest.raises(ConfigError, match="is not the model that"):
        verify(out, None, (), SilentProgress(), adapter="none")
    adapter.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=f"the adapter {adapter} does not exist"):
        verify(out, None, (), SilentProgress())


def test_the_output_is_named_after_both(tmp_path: Path) -> None:
    place = default_output("org/base@v1", "cpu-int4", "local", str(tmp_path))
    assert place == Path("artifacts") / f"org--base@v1+{tmp_path.name}" / "cpu-int4@local"
