"""A model with latent attention in 4 bits: what its artifact caches, says and generates."""

from pathlib import Path

import pytest

from llmc.artifact.manifest import State
from llmc.pipeline import build
from llmc.plan import plan_build
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model
from tests.notes import Notes


def test_the_artifact_caches_latents_and_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    model = save_tiny_model("deepseek_v2", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    plan = plan_build(str(model), target="cpu-int4", profile="local", output=tmp_path / "out")
    notes = Notes()
    manifest = build(plan, notes).manifest
    assert manifest.state is State.VERIFIED  # onnxruntime-genai generates the original's text from it, too
    assert {(s.kv_heads, s.key_width, s.value_width) for s in manifest.interface.cache} == {(1, 16, 16)}
    layers = len(manifest.interface.cache)
    said = (
        f"passes: {layers} layers cache one latent per token instead of keys and values of heads; "
        "their matrix of keys and values stays in float"
    )
    assert said in notes.notes
    bits = {w.name.split(".")[-2]: w.bits for w in manifest.weights if "self_attn" in w.name}
    assert (bits["kv_a_proj_with_mqa"], bits["o_proj"]) == (4, 4)
    assert bits.get("kv_b_proj", 32) == 32
