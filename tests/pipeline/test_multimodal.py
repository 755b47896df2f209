"""The language model of a multimodal checkpoint, built from text alone."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from llmc.architecture import building, is_multimodal
from llmc.artifact.manifest import State
from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.checkpoint.served import load_served
from llmc.pipeline import build, verify
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model, tiny_config, tiny_multimodal_fields
from tests.notes import Notes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    fields = tiny_multimodal_fields("qwen3_vl")
    return save_tiny_model("qwen3_vl", folder, tokenizer=True, eos_token_id=EOS, **fields)


def test_it_is_verified_and_the_build_says_what_was_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    notes = Notes()
    plan = plan_build(str(model), target="cpu-fp32", profile="local", output=tmp_path / "out")
    manifest = build(plan, notes).manifest
    count = sum(name.startswith("model.visual.") for name in load_file(model / "model.safetensors"))
    said = f"text only: {count} tensors of model.visual are left out"
    assert (manifest.state, manifest.model.notes) == (State.VERIFIED, (said,))
    assert [n for n in notes.notes if "left out" in n or "does not use" in n] == [said]
    applied = {record.name: record.applied for record in manifest.passes}
    assert (applied["rotary"], applied["group-query-attention"]) == (6, 3)
    assert verify(tmp_path / "out", None, (), SilentProgress()).failure() is None


#: The matrix that is embedding and head.
EMBEDDING = "model.language_model.embed_tokens"


def test_embedding_rows_behind_replaced_ids_share_the_codes_of_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3 replaces the ids of images before its lookup; the matrix is also the head's, in 4 bits."""
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    folder = save_tiny_model("gemma3", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    plan = plan_build(str(folder), target="cpu-int4", profile="local", output=tmp_path / "out", verify=False)
    build(plan, SilentProgress())
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    assert [node.op_type for node in graph if "Gather" in node.op_type and "embedding" in str(node.name)] == [
        "GatherBlockQuantized"
    ]
    assert not [name for name in graph.initializers if name in ("lm_head.weight", f"{EMBEDDING}.weight")]


def test_a_model_of_speech_is_verified_from_text_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    text = tiny_multimodal_fields("llava")["text_config"]
    tower = {"encoder_layers": 5, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "d_model": 32}
    fields = {"text_config": text, "audio_config": tower, "audio_token_index": 3, "audio_token_id": 3}
    folder = save_tiny_model("qwen2_audio", tmp_path / "model", tokenizer=True, eos_token_id=EOS, **fields)
    manifest = build(
        plan_build(str(folder), target="cpu-fp32", profile="local", output=tmp_path / "out"), Notes()
    ).manifest
    assert manifest.state is State.VERIFIED
    assert "model.audio_tower and model.multi_modal_projector are left out" in " ".join(manifest.model.notes)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_names_of_earlier_versions_are_read(model_type: str, tmp_path: Path) -> None:
    folder = save_tiny_model(model_type, tmp_path, **tiny_multimodal_fields(model_type))
    assert not any(
        name.startswith("model.language_model.") for name in load_file(folder / "model.safetensors")
    )
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.unused == ()
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in checkpoint.tensors.infos()


def test_a_config_of_both_is_multimodal_where_architectures_says_so(tmp_path: Path) -> None:
    from llmc.checkpoint.configuration import load_config

    for name in ("Llama4ForConditionalGeneration", "Llama4ForCausalLM"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4", "architectures": [name]}))
        assert is_multimodal(load_config(tmp_path)) is name.endswith("ConditionalGeneration")


def test_a_tower_whose_package_is_missing_is_left_out(tmp_path: Path) -> None:
    text = tiny_config(
        "gemma3n_text", num_kv_shared_layers=0, laurel_rank=8, activation_sparsity_pattern=[0.0] * 6
    )
    audio = {"conf_num_hidden_layers": 1, "hidden_size": 64, "conf_num_attention_heads": 4}
    parts = {"text_config": text.to_dict(), "audio_config": audio, "vision_config": {"hidden_size": 64}}
    with building():
        folder = save_tiny_model("gemma3n", tmp_path / "model", **parts)
    file = folder / "model.safetensors"
    tower = {"model.vision_tower.timm_model.conv_stem.weight": np.zeros((2, 2), np.float32)}
    save_file(load_file(file) | tower, file, {"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    assert [*tower] == [*checkpoint.unused]
    assert "conv_stem.weight (encoders of images" in checkpoint.notes[0]


def test_towers_within_the_language_model_are_named_as_one(tmp_path: Path) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    image = {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14, "crop_size": 28, "image_token_id": 3}
    parts = {"vision_config": tower | image, "audio_config": tower | {"num_blocks": 1, "audio_token_id": 4}}
    checkpoint = open_checkpoint(str(save_tiny_model("phi4_multimodal", tmp_path, **parts)))
    within = [name for name in checkpoint.tensors.infos() if ".embed_tokens_extend." in name]
    said = f"text only: {len(within)} tensors of model.embed_tokens_extend are left out"
    assert checkpoint.text_only_note(within) == said
    assert checkpoint.text_only_note(["model.norm.weight"]) is None


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl"])
def test_a_checkpoint_for_servers_keeps_the_towers_and_is_read_under_the_names_of_its_files(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files say language_model.model.layers for Gemma 3, transformers model.language_model.layers."""
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    fields = tiny_multimodal_fields(model_type)
    model = save_tiny_model(model_type, tmp_path / "model", tokenizer=True, eos_token_id=EOS, **fields)
    (model / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    notes = Notes()
    out = tmp_path / "out"
    plan = plan_build(str(model), target="vllm-fp8", profile="local", output=out, verify=False)
    manifest = build(plan, notes).manifest
    loaded = load_served(open_checkpoint(str(out)), quantize_activations=False)
    assert (loaded.problems, "compressed-tensors" in loaded.library) == ((), True)
    assert any("are copied and not verified" in note for note in manifest.model.notes)
    before, after = (SafetensorsStore.open(folder) for folder in (model, out))
    towers = [name for name in before.infos() if "vis" in name]
    assert towers
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in towers)
    name = "preprocessor_config.json"
    assert (out / name).read_bytes() == (model / name).read_bytes()
