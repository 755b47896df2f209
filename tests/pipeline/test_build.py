"""From a checkpoint on disk to a verified artifact: tiny random models of every required architecture."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from llmc.artifact.manifest import State
from llmc.artifact.store.folder import open_artifact
from llmc.catalog import load_target
from llmc.config import (
    BuildPlan,
    CalibrationText,
    Gate,
    Metric,
    PassSpec,
    WeightRole,
    WeightRule,
    WeightScheme,
)
from llmc.errors import CheckpointError, ConfigError, ParityError, ResourceError, UnsupportedError
from llmc.pipeline import bench, build, explain, inspect, verify
from llmc.pipeline.gate.parity import parity_gates
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.caches import own_cache
from tests.models import EOS, MODEL_TYPES, save_tiny_model

ROOT = Path(__file__).parents[2]

TOLERANCE = 1e-4
METRICS = (Metric.PREFILL_MAX_ABS, Metric.DECODE_MAX_ABS, Metric.RAGGED_MAX_ABS, Metric.WINDOW_MAX_ABS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))


def _plan(
    model: Path, output: Path, *, verify: bool = True, target: str = "cpu-fp32", **changes: object
) -> BuildPlan:
    plan = plan_build(str(model), target=target, profile="local", output=output, verify=verify)
    return plan.model_copy(update={"target": plan.target.model_copy(update=changes)})


def _gates() -> tuple[Gate, ...]:
    reason = "float32 arithmetic in another order"
    return tuple(Gate(metric=m, max=TOLERANCE, reason=reason) for m in METRICS)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fp32_artifact_equals_the_original_and_int4_is_int4_throughout(
    model_type: str, tmp_path: Path
) -> None:
    model = save_tiny_model(model_type, tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    result = build(_plan(model, tmp_path / "out", gates=_gates()), SilentProgress())
    assert result.failure() is None
    assert result.manifest.state is State.VERIFIED
    applied = {record.name: record.applied for record in result.manifest.passes}
    assert applied["group-query-attention"] == len(result.manifest.interface.cache)
    assert applied["last-token-logits"] == 1
    result = build(_plan(model, tmp_path / "int4", target="cpu-int4", verify=False), SilentProgress())
    assert {w.bits for w in result.manifest.weights if w.role is not WeightRole.ROUTER} == {4}
    onnxruntime.InferenceSession(result.path / "model.onnx", providers=["CPUExecutionProvider"])


def _operators(path: Path) -> dict[str, int]:
    return inspect(str(path)).operators


def test_int4_llama_keeps_no_float_matrix_and_few_operators(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, tie_word_embeddings=True)
    result = build(_plan(model, tmp_path / "out", target="cpu-int4", verify=False), SilentProgress())
    layers = 3
    operators = _operators(result.path)
    assert "MatMul" not in operators
    assert operators["com.microsoft::MatMulNBits"] == 4 * layers + 1
    assert operators["com.microsoft::GroupQueryAttention"] == layers
    assert operators["com.microsoft::SkipSimplifiedLayerNormalization"] == 2 * layers
    assert operators["com.microsoft::GatherBlockQuantized"] == 1
    names = [w.name for w in result.manifest.weights]
    assert len(names) == len(set(names))
    assert {w.bits for w in result.manifest.weights} == {4}


def test_an_artifact_explains_where_a_pass_declined(tmp_path: Path) -> None:
    model = save_tiny_model("gpt_neox", tmp_path / "model", tokenizer=True)
    artifact = build(_plan(model, tmp_path / "out", verify=False), SilentProgress()).path
    found = explain(str(artifact), "pack-qkv")
    (declined,) = found.declined
    assert (found.applied, declined.count, declined.layers) == (0, 3, (0, 1, 2))
    assert f"declined 3 times, in layers 0-2 [{declined.code}]" in found.render()
    with pytest.raises(ConfigError, match="target cpu-fp32 has no pass 'pack-qvk'") as caught:
        explain(str(artifact), "pack-qvk")
    assert caught.value.hint == "did you mean pack-qkv or pack-gate-up?"
    with pytest.raises(ConfigError, match="is not an artifact: passes run when a model is built"):
        explain(str(model), "pack-qkv")


def test_two_processes_write_the_same_bytes_wherever_llmc_lies(tmp_path: Path) -> None:
    model = save_tiny_model("qwen3", tmp_path / "model", tokenizer=True)
    for name in ("llmc", "targets", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / "second" / name)
    digests = []
    for name in ("first", "second"):
        environment = {
            **os.environ,
            "LLMC_CACHE": str(tmp_path / name / "cache"),
            "PYTHONHASHSEED": str(len(digests)),
            "PYTHONPATH": str(ROOT if name == "first" else tmp_path / name),
        }
        command = [
            sys.executable,
            "-m",
            "llmc",
            "build",
            str(model),
            "--no-verify",
            "-o",
            str(tmp_path / name / "out"),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        manifest = open_artifact(tmp_path / name / "out").manifest
        graph = (tmp_path / name / "out" / "model.onnx").read_bytes()
        assert str(tmp_path).encode() not in graph
        assert b"site-packages" not in graph
        digests.append((manifest.files, (tmp_path / name / "out" / "manifest.json").read_bytes()))
    assert digests[0] == digests[1]


def test_a_missed_gate_keeps_the_old_artifact_and_fails(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True)
    output = tmp_path / "out"
    before = build(_plan(model, output, verify=False), SilentProgress())
    strict = (Gate(metric=Metric.PREFILL_MAX_ABS, max=0.0, reason="nothing is this equal"),)
    result = build(_plan(model, output, gates=strict), SilentProgress())
    error = result.failure()
    assert isinstance(error, ParityError)
    assert "prefill.max_abs" in error.fact
    assert result.path == tmp_path / "out.failed"
    assert open_artifact(result.path).manifest.state is State.FAILED
    assert open_artifact(output).manifest == before.manifest
    report = json.loads((result.path / "reports" / "parity.json").read_text())
    assert report["verdict"]["passed"] is False


def test_a_gate_that_too_little_text_decides_fails(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True)
    loose = (Gate(metric=Metric.TEXT_KL_MEAN, max=1.0, reason="nats per token; a first look"),)
    plan = _plan(model, tmp_path / "out", target="cpu-int4", gates=loose)
    measured = build(plan, SilentProgress()).verdict
    assert measured is not None
    between = (Gate(metric=Metric.TEXT_KL_MEAN, max=measured.checks[0].value, reason="in the interval"),)
    plan = plan.model_copy(update={"target": plan.target.model_copy(update={"gates": between})})
    result = build(plan, SilentProgress())
    error = result.failure()
    assert isinstance(error, ParityError)
    assert error.fact == "too little text to decide: text.kl_mean"
    assert open_artifact(result.path).manifest.state is State.FAILED


def test_a_graph_that_cannot_be_loaded_misses_every_gate(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True)
    plan = _plan(model, tmp_path / "out", verify=False)
    result = build(plan, SilentProgress())
    (result.path / "model.onnx").write_bytes(b"no graph")
    checked = verify(result.path, None, (), SilentProgress(), every=True)
    report, failure = checked.report, checked.failure()
    said = "cannot load"
    assert not report.verdict.passed
    assert said in checked.render()
    assert "nan" not in checked.render()
    assert failure is not None
    assert said in failure.fact
    missed = {c.metric for c in report.verdict.missed}
    assert missed >= {Metric.FILES, Metric.INTERFACE, Metric.PREFILL_MAX_ABS, Metric.GENERATE_EQUAL}
    assert {m.metric for m in report.measurements} >= {g.metric for g in parity_gates(plan.target)}
    details = {m.metric: m.detail for m in report.measurements}
    assert "cannot load" in details[Metric.INTERFACE]
    assert details[Metric.FILES] == "model.onnx has 8 bytes instead of " + details[Metric.FILES].split()[-1]


def test_a_damaged_checkpoint_leaves_what_was_built(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True)
    output = tmp_path / "out"
    before = build(_plan(model, output, verify=False), SilentProgress())
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(CheckpointError):
        build(_plan(model, output, verify=False), SilentProgress())
    assert open_artifact(output).manifest == before.manifest
    assert not list(tmp_path.glob(".out.staging*"))


def test_a_fusion_that_stopped_applying_is_an_error(tmp_path: Path) -> None:
    model = save_tiny_model("gpt2", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    passes = (PassSpec(name="rms-norm", per_layer=2),)
    with pytest.raises(
        UnsupportedError, match="pass rms-norm applied 0 times in layer 0; the target asks for 2"
    ):
        build(_plan(model, tmp_path / "out", verify=False, passes=passes), SilentProgress())
    assert not (tmp_path / "out").exists()


def test_an_unknown_pass_is_named_before_any_long_work(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True)
    passes = (PassSpec(name="rms-nrom"),)
    with pytest.raises(ConfigError, match="there is no pass 'rms-nrom'"):
        build(_plan(model, tmp_path / "out", verify=False, passes=passes), SilentProgress())


@pytest.mark.parametrize("target", ["cuda-fp16", "cuda-int4"])
def test_cuda_artifacts_are_not_executed_and_their_graph_is_verified_on_the_cpu(
    target: str, tmp_path: Path
) -> None:
    model = save_tiny_model("mistral", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    plan = plan_build(str(model), target=target, profile="l4", output=tmp_path / "out")
    result = build(plan, SilentProgress())
    assert result.manifest.state is State.NOT_EXECUTED
    assert "so nothing was measured" in result.render()
    assert {s.dtype for s in result.manifest.interface.outputs} == {"float16"}
    (tmp_path / "text").write_text("The mill turns as long as there is water in the river. " * 30)
    report = verify(result.path, None, (str(tmp_path / "text"),), SilentProgress()).report
    failed = {c.metric for c in report.verdict.missed}
    # Of 4 bits a random model loses more than a trained one, and the text is short.
    assert {m for m in failed if not m.value.startswith("text.")} == set()
    assert len(report.verdict.checks) >= 15
    assert all("CPU" in c.where or "files" in c.where for c in report.verdict.checks)
    with pytest.raises(ResourceError, match="is built for CUDA: this machine has no NVIDIA GPU"):
        bench(result.path, None, SilentProgress())

    graph = onnx.load(result.path / "model.onnx")
    for node in graph.graph.node:
        if node.op_type == "GroupQueryAttention":
            kept = [a for a in node.attribute if a.name != "local_window_size"]
            del node.attribute[:]
            node.attribute.extend(kept)
    onnx.save(graph, result.path / "model.onnx")
    report = verify(result.path, None, (str(tmp_path / "text"),), SilentProgress(), every=True).report
    assert {Metric.FILES, Metric.WINDOW_MAX_ABS} <= {c.metric for c in report.verdict.missed}


def test_a_target_and_a_profile_must_fit(tmp_path: Path) -> None:
    plan = plan_build("demo", target="cpu-fp32", profile="cpu-avx2", output=tmp_path / "out")
    gpu = plan_build("demo", target="cuda-fp16", profile="t4", output=tmp_path / "out").profile
    with pytest.raises(ConfigError, match=r"target cpu-fp32 runs on a CPU; profile t4 is .*, a GPU"):
        build(plan.model_copy(update={"profile": gpu}), SilentProgress())


def test_inspecting_a_model_shows_its_canonical_graph(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True)
    found = inspect(str(model))
    assert found.kind == "model"
    assert found.operators["llmc::CachedAttention"] == 3


def test_weights_are_stored_once_for_embedding_and_head(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, tie_word_embeddings=True)
    result = build(_plan(model, tmp_path / "out", verify=False), SilentProgress())
    tables = [
        v
        for v in ir.load(result.path / "model.onnx").graph.initializers.values()
        if 256 in list(v.shape or ()) and len(v.shape or ()) == 2 and 64 in list(v.shape or ())
    ]
    assert len([t for t in tables if "embed" in str(t.name) or "lm_head" in str(t.name)]) == 1


def test_calibrated_int4_is_closer_and_the_same_every_time(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, tie_word_embeddings=True)
    stated = load_target("cpu-int4-gptq").quantize
    assert stated is not None
    text = CalibrationText(window_tokens=64, max_windows=8)
    quantize = stated.model_copy(update={"calibration": text})
    weights = []
    for name in ("first", "second"):
        plan = _plan(model, tmp_path / name, target="cpu-int4-gptq", verify=False, quantize=quantize)
        result = build(plan, SilentProgress())
        assert {w.bits for w in result.manifest.weights} == {4}
        weights.append({k: f.sha256 for k, f in result.manifest.files.items() if k.startswith("model.onnx")})
        shutil.rmtree(tmp_path / "cache")
    assert weights[0] == weights[1]
    plain = build(_plan(model, tmp_path / "plain", target="cpu-int4", verify=False), SilentProgress())
    assert plain.manifest.files["model.onnx.data"].sha256 != weights[0]["model.onnx.data"]
    # The same codes in the same blocks, with scales in float16 instead of float32.
    assert plain.manifest.files["model.onnx.data"].bytes > result.manifest.files["model.onnx.data"].bytes


def test_int8_experts_are_stored_as_integers(tmp_path: Path) -> None:
    model = save_tiny_model("gpt_oss", tmp_path / "model", tokenizer=True)
    result = build(_plan(model, tmp_path / "out", target="cpu-int8", verify=False), SilentProgress())
    layers = 3
    operators = _operators(result.path)
    assert operators["com.microsoft::QMoE"] == layers
    assert "com.microsoft::MoE" not in operators
    floats = [w for w in result.manifest.weights if w.bits == 32]
    assert [w.role for w in floats] == [WeightRole.ROUTER] * layers


@pytest.mark.parametrize(("model_type", "target"), [("mixtral", "cpu-int8"), ("gpt_oss", "cpu-int4")])
def test_quantized_experts_are_held_to_their_own_weights(
    model_type: str, target: str, tmp_path: Path
) -> None:
    """Gates on what the operators compute; random weights say nothing of text."""
    model = save_tiny_model(model_type, tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    exact = {*METRICS, Metric.WEIGHTS_SNR, Metric.WEIGHTS_BLOCK_SNR}
    plan = _plan(model, tmp_path / "out", target=target)
    gates = tuple(gate for gate in plan.target.gates if gate.metric in exact)
    assert len(gates) == len(exact)
    result = build(_plan(model, tmp_path / "out", target=target, gates=gates), SilentProgress())
    assert result.failure() is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_last_block_is_read_back_without_its_padding(tied: bool, tmp_path: Path) -> None:
    model = save_tiny_model(
        "llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS, tie_word_embeddings=tied
    )
    plan = _plan(model, tmp_path / "out", target="cpu-int8")
    assert plan.target.quantize is not None
    scheme = WeightScheme(bits=8, block_size=128, symmetric=True, method="rtn")  # of 64 features
    quantize = plan.target.quantize.model_copy(update={"rules": (WeightRule(scheme=scheme),)})
    gates = (Gate(metric=Metric.WEIGHTS_SNR, min=30, reason="8 bits keep about 40 dB"), *_gates())
    plan = _plan(model, tmp_path / "out", target="cpu-int8", quantize=quantize, gates=gates)
    result = build(plan, SilentProgress())
    assert result.failure() is None


def test_a_context_shorter_than_what_the_gate_generates(tmp_path: Path) -> None:
    fields = {"num_hidden_layers": 1, "max_position_embeddings": 24, "eos_token_id": EOS}
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, **fields)
    result = build(_plan(model, tmp_path / "out"), SilentProgress())
    assert result.manifest.state is State.VERIFIED
