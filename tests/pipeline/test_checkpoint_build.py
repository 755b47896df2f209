"""Builds of checkpoints for servers: what is copied, renamed, quantized, scaled and refused."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from llmc.arrays import Array
from llmc.artifact.manifest import State
from llmc.artifact.store.folder import open_artifact
from llmc.backends.checkpoint.writer import INDEX, SINGLE
from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.files import linear_parameters
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.config import (
    Allocation,
    BuildPlan,
    CalibrationText,
    EngineRule,
    EngineScheme,
    WeightRule,
    WeightScheme,
)
from llmc.errors import ConfigError, ResourceError, UnsupportedError
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.quantize.activations import SMOOTHING
from tests.architectures import build_on_meta
from tests.caches import own_cache
from tests.checkpoint.tiny_gguf import write_gguf
from tests.models import save_tiny_model, tiny_config
from tests.notes import Notes

TEXT = CalibrationText(window_tokens=32, max_windows=8)
FLOAT = (WeightRule(role="embedding", scheme=None), WeightRule(role="lm_head", scheme=None))
BLOCKS = {"bits": 4, "block_size": 32, "symmetric": True, "method": "rtn"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path_factory.getbasetemp() / "checkpoint-cache"))


def plan(model: Path, output: Path, target: str = "vllm-w4a16", **quantize: Any) -> BuildPlan:
    """A build in blocks of 32 by rounding to nearest, with other settings of `quantize`."""
    planned = plan_build(str(model), target=target, profile="cpu-avx2", output=output, verify=False)
    if planned.target.quantize is None:
        return planned
    rules = (*FLOAT, WeightRule.model_validate({"scheme": BLOCKS}))
    changes = {"rules": rules, "calibration": None, "scale_channels": False, **quantize}
    section = planned.target.quantize.model_copy(update=changes)
    return planned.model_copy(update={"target": planned.target.model_copy(update={"quantize": section})})


def build_folder(planned: BuildPlan) -> Path:
    build(planned, SilentProgress())
    return planned.output


def tensors_of(folder: Path) -> SafetensorsStore:
    return SafetensorsStore.open(folder)


def config_of(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return fields


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16, in two files."""
    folder = tmp_path_factory.mktemp("llama")
    return save_tiny_model("llama", folder, dtype=torch.bfloat16, tokenizer=True, max_shard_size="200KB")


def test_what_is_not_quantized_keeps_its_name_and_its_bytes(llama: Path, tmp_path: Path) -> None:
    assert (llama / INDEX).is_file()
    folder = build_folder(plan(llama, tmp_path / "out"))
    before, after = tensors_of(llama), tensors_of(folder)
    kept = {name for name in before.infos() if name in after.infos()}
    assert {name for name in before.infos() if name not in kept} == {
        name for name in before.infos() if "_proj" in name
    }
    for name in kept:
        assert before.read(name).tobytes() == after.read(name).tobytes()
        assert before.infos()[name].dtype == after.infos()[name].dtype
    module = "model.layers.1.mlp.down_proj"
    assert after.infos()[f"{module}.weight_packed"].shape == (64, 12)
    assert after.infos()[f"{module}.weight_scale"].dtype.name == "BFLOAT16"
    manifest = open_artifact(folder).manifest
    assert manifest.state is State.NOT_VERIFIED
    assert SINGLE in manifest.files
    assert not list(folder.glob("*.onnx*"))


def test_the_config_is_the_original_with_a_declaration(llama: Path, tmp_path: Path) -> None:
    folder = build_folder(plan(llama, tmp_path / "out"))
    fields = config_of(folder)
    declared = fields.pop("quantization_config")
    assert fields == config_of(llama)
    assert declared["quant_method"] == "compressed-tensors"
    assert declared["ignore"] == ["lm_head"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_two_builds_give_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    first, second = (open_artifact(build_folder(plan(llama, tmp_path / each))) for each in "ab")
    assert first.manifest.files == second.manifest.files


def test_our_reader_gives_the_rounded_weights(llama: Path, tmp_path: Path) -> None:
    folder = build_folder(plan(llama, tmp_path / "out"))
    original, back = open_checkpoint(str(llama)), open_checkpoint(str(folder))
    for name in original.tensors.infos():
        was, now = (each.tensors.read(name).astype(np.float32) for each in (original, back))
        if "_proj" in name:
            scales = np.abs(was.reshape(len(was), -1, 32)).max(2, keepdims=True) / 7
            steps = np.abs(was - now).reshape(len(was), -1, 32) / scales
            assert 0.1 < steps.max() < 1
        else:
            assert np.array_equal(was, now)


@pytest.mark.parametrize("target", ["gptq-int4", "awq-int4"])
def test_other_formats_hold_the_same_weights(llama: Path, tmp_path: Path, target: str) -> None:
    first = open_checkpoint(str(build_folder(plan(llama, tmp_path / "first")))).tensors
    other = open_checkpoint(str(build_folder(plan(llama, tmp_path / "other", target)))).tensors
    for name in first.infos():
        assert np.array_equal(first.read(name).astype(np.float32), other.read(name).astype(np.float32))


def test_a_head_that_is_tied_is_not_written_twice(tmp_path: Path) -> None:
    model = save_tiny_model("qwen2", tmp_path / "qwen2", tokenizer=True, tie_word_embeddings=True)
    folder = build_folder(plan(model, tmp_path / "out"))
    after = tensors_of(folder).infos()
    assert "lm_head.weight" not in after
    assert "model.layers.0.self_attn.q_proj.bias" in after
    assert config_of(folder)["quantization_config"]["ignore"] == ["lm_head"]


def test_scaled_norms_are_written_in_their_type(llama: Path, tmp_path: Path) -> None:
    rules = (*FLOAT, WeightRule.model_validate({"scheme": {**BLOCKS, "method": "gptq"}}))
    changes = {"rules": rules, "calibration": TEXT, "scale_channels": True}
    notes = Notes()
    build(plan(llama, folder := tmp_path / "out", **changes), notes)
    vectors = load_file(folder / SMOOTHING)
    scaled = f"quantize: the channels of {len(vectors)} activations are scaled"
    assert any(note.startswith(scaled) for note in notes.notes)
    before, after = tensors_of(llama), tensors_of(folder)
    name = "model.layers.1.input_layernorm.weight"
    factors = vectors["model.layers.1.self_attn.q_proj.weight"]
    expected = (before.read(name).astype(np.float32) * (1 / factors)).astype(before.read(name).dtype)
    assert after.read(name).tobytes() == expected.tobytes()
    original, back = open_checkpoint(str(llama)), open_checkpoint(str(folder))
    for each in ("q_proj", "k_proj"):
        weight = f"model.layers.1.self_attn.{each}.weight"
        was, now = (m.tensors.read(weight).astype(np.float32) for m in (original, back))
        assert _snr(was * factors, now) > 12
    assert [path.name for path in folder.glob("*.safetensors")] == [SINGLE]


def test_a_norm_that_adds_one_is_scaled_too(tmp_path: Path) -> None:
    model = save_tiny_model("gemma2", tmp_path / "gemma2", tokenizer=True)
    rules = (*FLOAT, WeightRule.model_validate({"scheme": {**BLOCKS, "method": "gptq"}}))
    changes = {"rules": rules, "calibration": TEXT, "scale_channels": True}
    folder = build_folder(plan(model, tmp_path / "out", **changes))
    vectors, before, after = load_file(folder / SMOOTHING), tensors_of(model), tensors_of(folder)
    scaled = [name for name in vectors if name.endswith("q_proj.weight")]
    assert scaled
    for name in scaled:
        norm = name.replace("self_attn.q_proj", "input_layernorm")
        assert np.allclose(after.read(norm), (before.read(norm) + 1) / vectors[name] - 1, atol=1e-6)


def _snr(was: Array, now: Array) -> float:
    return float(10 * np.log10(np.square(was).sum() / np.square(was - now).sum()))


def typed(planned: BuildPlan, **scheme: Any) -> BuildPlan:
    """The same build with another scheme for all linear layers."""
    section = planned.target.checkpoint
    assert section is not None
    floats = (EngineRule(role="embedding", scheme=None), EngineRule(role="lm_head", scheme=None))
    rules = (*floats, EngineRule(scheme=EngineScheme.model_validate(scheme)))
    text = None if section.calibration is None else TEXT
    changed = section.model_copy(update={"weights": rules, "calibration": text})
    target = planned.target.model_copy(update={"checkpoint": changed})
    return planned.model_copy(update={"target": target})


@pytest.mark.parametrize("target", ["modelopt-fp8", "vllm-nvfp4", "modelopt-nvfp4"])
def test_products_that_servers_fuse_share_the_scale_of_a_matrix(
    llama: Path, tmp_path: Path, target: str
) -> None:
    planned = plan(llama, tmp_path / "out", target)
    assert planned.target.checkpoint is not None
    scheme = next(rule.scheme for rule in planned.target.checkpoint.weights if rule.scheme is not None)
    folder = build_folder(typed(planned, **scheme.model_dump()))
    after = tensors_of(folder)
    part = {"modelopt-fp8": "weight_scale", "vllm-nvfp4": "weight_global_scale"}.get(target, "weight_scale_2")
    given = "input_global_scale" if target == "vllm-nvfp4" else "input_scale"
    layer = "model.layers.1"
    for modules in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        for name in (part, given):
            values = {float(after.read(f"{layer}.{module}.{name}").reshape(-1)[0]) for module in modules}
            assert len(values) == 1
            assert values.pop() > 0


def test_an_activation_that_stays_in_float_keeps_its_products_in_float(llama: Path, tmp_path: Path) -> None:
    planned = typed(
        plan(llama, tmp_path / "out", "modelopt-fp8"), format="fp8", activations="static", scale_per="tensor"
    )
    section = planned.target.checkpoint
    assert section is not None
    strict = section.model_copy(update={"least_activation_db": 200.0})
    target = planned.target.model_copy(update={"checkpoint": strict})
    folder = build_folder(planned.model_copy(update={"target": target}))
    assert "quantization_config" not in config_of(folder)
    assert tensors_of(folder).infos().keys() == tensors_of(llama).infos().keys()


def test_a_model_in_gguf_is_written_under_the_names_of_transformers(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    folder = build_folder(plan(file, tmp_path / "out"))
    infos = tensors_of(folder).infos()
    assert "model.layers.0.self_attn.q_proj.weight_packed" in infos
    assert infos["model.embed_tokens.weight"].dtype.name == "BFLOAT16"
    assert infos["model.norm.weight"].dtype.name == "FLOAT"  # a tensor that the file has in float32
    assert config_of(folder)["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"block_size": 128}, "cannot hold model.layers.0.*: groups of 128 do not divide 64 inputs; groups"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    llama: Path, tmp_path: Path, scheme: Mapping[str, Any], message: str
) -> None:
    rules = (*FLOAT, WeightRule.model_validate({"scheme": {**BLOCKS, **scheme}}))
    with pytest.raises(UnsupportedError, match=message) as caught:
        build_folder(plan(llama, tmp_path / "out", rules=rules))
    assert str(caught.value.hint).startswith("copy the target and change its rule")
    assert not (tmp_path / "out").exists()


def test_a_refusal_names_the_target_that_can(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, intermediate_size=128)
    planned = plan_build(
        str(model), target="vllm-w4a16", profile="cpu-avx2", output=tmp_path / "out", verify=False
    )
    with pytest.raises(UnsupportedError, match="groups of 128 do not divide 64 inputs") as caught:
        build_folder(planned)
    assert caught.value.hint == "--target vllm-w4a16-g64 can"


def test_an_embedding_is_refused(llama: Path, tmp_path: Path) -> None:
    rules = (WeightRule.model_validate({"scheme": BLOCKS}),)
    with pytest.raises(
        UnsupportedError, match=r"embed_tokens\.weight is an embedding, whose rows servers read"
    ):
        build_folder(plan(llama, tmp_path / "out", rules=rules))


def test_inputs_that_come_first_are_refused(tmp_path: Path) -> None:
    model = save_tiny_model("gpt2", tmp_path / "gpt2", tokenizer=True)
    with pytest.raises(
        UnsupportedError, match=r"c_attn\.weight has its inputs first, and servers do not read"
    ):
        build_folder(plan(model, tmp_path / "out"))


def test_a_class_that_derives_from_linear_is_a_linear_layer() -> None:
    """Falcon's own class multiplies as its parent does."""
    parameters = linear_parameters(build_on_meta(tiny_config("falcon")))
    assert "transformer.h.0.self_attention.query_key_value.weight" in parameters


def test_a_target_that_quantizes_nothing_is_refused(llama: Path, tmp_path: Path) -> None:
    rules = (WeightRule.model_validate({"match": "nothing", "scheme": BLOCKS}),)
    with pytest.raises(ConfigError, match="target vllm-w4a16 quantizes no matrix of this model"):
        build_folder(plan(llama, tmp_path / "out", rules=rules))


def test_rules_that_part_what_servers_join_are_refused(llama: Path, tmp_path: Path) -> None:
    rules = (*FLOAT, WeightRule(match="*.k_proj.weight", scheme=None))
    rules = (*rules, WeightRule.model_validate({"scheme": BLOCKS}))
    with pytest.raises(UnsupportedError, match=r"servers join .*q_proj.weight and .*k_proj.weight, and the"):
        build_folder(plan(llama, tmp_path / "out", rules=rules))


def test_products_that_servers_join_by_other_names_are_not_parted_either(tmp_path: Path) -> None:
    """The MLP of LFM2 has w1 and w3 in the place of gate_proj and up_proj."""
    model = save_tiny_model("lfm2", tmp_path / "lfm2", tokenizer=True)
    rules = (*FLOAT, WeightRule(match="*.w3.weight", scheme=None))
    rules = (*rules, WeightRule.model_validate({"scheme": BLOCKS}))
    with pytest.raises(UnsupportedError, match=r"servers join .*\.w1\.weight and .*\.w3\.weight, and the"):
        build_folder(plan(model, tmp_path / "out", rules=rules))


def test_bits_are_allocated_to_what_servers_join_together(llama: Path, tmp_path: Path) -> None:
    wide = WeightScheme.model_validate({**BLOCKS, "bits": 8})
    text = CalibrationText(window_tokens=32, max_windows=8)
    allocation = Allocation(choices=(wide,), text=text, budget_bits=12.7)
    folder = build_folder(plan(llama, tmp_path / "out", allocation=allocation))
    bits = {record.name: record.bits for record in open_artifact(folder).manifest.weights}
    assert {bits[name] for name in bits if "_proj" in name} == {4, 8}
    for layer in range(2):
        modules = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        assert len({bits[f"model.layers.{layer}.{module}.weight"] for module in modules}) == 1
    groups = config_of(folder)["quantization_config"]["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {4, 8}


def test_fp8_and_nvfp4_are_mixed_by_rules(llama: Path, tmp_path: Path) -> None:
    planned = plan(llama, tmp_path / "out", "modelopt-mixed")
    section = planned.target.checkpoint
    assert section is not None
    target = planned.target.model_copy(
        update={"checkpoint": section.model_copy(update={"calibration": TEXT})}
    )
    folder = build_folder(planned.model_copy(update={"target": target}))
    declared = config_of(folder)["quantization_config"]
    assert declared["quant_algo"] == "MIXED_PRECISION"
    kinds = {
        name.rpartition(".")[2]: each["quant_algo"] for name, each in declared["quantized_layers"].items()
    }
    assert kinds["down_proj"] == "FP8"
    assert kinds["q_proj"] == "NVFP4"
    assert json.loads((folder / "hf_quant_config.json").read_text())["quantization"]["quant_algo"]


def test_the_library_of_the_gates_is_missed_before_any_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an empty path of imports, only the packages that are imported already are found."""
    planned = plan(llama, tmp_path / "out").model_copy(update={"verify": True})
    monkeypatch.delitem(sys.modules, "compressed_tensors", raising=False)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ResourceError, match="compressed-tensors is not installed, by which") as caught:
        build(planned, SilentProgress())
    assert caught.value.hint == "pip install 'llmc[servers]', or build with --no-verify"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE, whose experts the files have one by one."""
    folder = tmp_path_factory.mktemp("experts")
    return save_tiny_model("qwen3_moe", folder, dtype=torch.bfloat16, tokenizer=True)


def test_experts_are_written_one_by_one(experts: Path, tmp_path: Path) -> None:
    router = WeightRule(role="router", scheme=None)
    rules = (*FLOAT, router, WeightRule.model_validate({"scheme": {**BLOCKS, "block_size": 16}}))
    folder = build_folder(plan(experts, tmp_path / "out", rules=rules))
    after = tensors_of(folder)
    assert "model.layers.1.mlp.experts.3.up_proj.weight_packed" in after.infos()
    gate = "model.layers.1.mlp.gate.weight"
    assert after.read(gate).tobytes() == tensors_of(experts).read(gate).tobytes()
    assert "model.layers.1.mlp.gate" in config_of(folder)["quantization_config"]["ignore"]
    original, back = (open_checkpoint(str(each)).tensors for each in (experts, folder))
    for name in ("gate_up_proj", "down_proj"):
        weight = f"model.layers.1.mlp.experts.{name}"
        assert _snr(*(each.read(weight).astype(np.float32) for each in (original, back))) > 18
    records = {record.name: record for record in open_artifact(folder).manifest.weights}
    assert records["model.layers.1.mlp.experts.down_proj"].bits == 4


def test_experts_in_fp8_have_a_scale_for_each_output(experts: Path, tmp_path: Path) -> None:
    planned = plan(experts, tmp_path / "out", "vllm-fp8")
    folder = build_folder(planned)
    infos = tensors_of(folder).infos()
    assert infos["model.layers.0.mlp.experts.0.down_proj.weight"].dtype.name == "FLOAT8E4M3FN"
    assert infos["model.layers.0.mlp.experts.0.down_proj.weight_scale"].shape == (64, 1)
