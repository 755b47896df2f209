"""From a checkpoint to engines and their verdict, what waits for its GPU, and what is refused."""

import json
from io import StringIO
from pathlib import Path

import onnx
import pytest

from llmc.artifact.engine import EngineRecord
from llmc.artifact.manifest import State
from llmc.artifact.store.folder import open_artifact
from llmc.artifact.verdict import CheckStatus
from llmc.backends.special_tokens import read_stop_tokens
from llmc.backends.tensorrt.engine import load_library
from llmc.backends.tensorrt.engines import require_engine
from llmc.backends.tensorrt.support import Library
from llmc.catalog import load_profile
from llmc.config import BuildPlan, Gate, Metric, Span
from llmc.errors import ConfigError, ExitCode, ResourceError, UnsupportedError
from llmc.gpu import Gpu
from llmc.pipeline import bench, build, inspect, resume, run, verify
from llmc.plan import plan_build
from llmc.progress import PlainProgress, SilentProgress
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model

REASON = "both sides in float32 with the same weights"
GATES = (
    Gate(metric=Metric.INTERFACE, max=0, reason=REASON),
    Gate(metric=Metric.TOKENIZER_EQUAL, min=1.0, reason="the same characters are the same tokens"),
    Gate(metric=Metric.DECODE_MAX_ABS, max=1e-3, reason=REASON),
    Gate(metric=Metric.RAGGED_MAX_ABS, max=1e-3, reason=REASON),
)


UUID = "GPU-00000000-0000-0000-0000-000000000001"


def gpu(name: str, capability: str) -> Gpu:
    return Gpu(name, capability, 23034 << 20, UUID)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))


def _plan(
    model: Path,
    output: Path,
    profile: str,
    capacity: int = 128,
    target: str = "tensorrt-fp16",
    gates: tuple[Gate, ...] = GATES,
) -> BuildPlan:
    plan = plan_build(str(model), target=target, profile=profile, output=output)
    assert plan.target.engine is not None
    sizes = {"kv_capacity": capacity, "prefill": Span(least=1, typical=16, most=64)}
    engine = plan.target.engine.model_copy(update=sizes)
    return plan.model_copy(
        update={"target": plan.target.model_copy(update={"engine": engine, "gates": gates})}
    )


def test_engines_for_several_profiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    result = build(_plan(model, tmp_path / "out", "l4,h100-sxm,rtx-4090"), SilentProgress())
    manifest = open_artifact(tmp_path / "out").manifest
    assert result.failure() is None
    assert manifest.state is State.ENGINE_PENDING
    assert [p.name for p in (manifest.profile, *manifest.also)] == ["l4", "h100-sxm", "rtx-4090"]
    built, waiting = manifest.engines
    assert (built.sms, built.profiles, built.file) == (("SM89",), ("l4", "rtx-4090"), "sm89.engine")
    assert (waiting.sms, waiting.library, waiting.file) == (("SM90",), "tensorrt", None)
    assert manifest.files["sm89.engine"].bytes == (tmp_path / "out/sm89.engine").stat().st_size
    assert {check.metric for check in manifest.checks} == {gate.metric for gate in GATES}
    where = {check.metric: check.where for check in manifest.checks}
    assert where.pop(Metric.TOKENIZER_EQUAL) == "transformers"
    assert all(place.startswith("onnxruntime") for place in where.values())
    assert not (tmp_path / "out/genai_config.json").exists()
    assert read_stop_tokens(tmp_path / "out") == (EOS,)
    assert (built.context, waiting.context) == ("sm89.context.onnx", None)
    assert {"sm89.context.onnx", "generation_config.json", "tokenizer.json"} <= manifest.files.keys()
    context = onnx.load(tmp_path / "out/sm89.context.onnx")
    onnx.checker.check_model(context, full_check=True)
    assert [v.name for v in context.graph.input] == [spec.name for spec in manifest.interface.inputs]
    text = result.render()
    assert "SM89 (l4, rtx-4090): " in text
    assert "SM90 (h100-sxm): pending, llmc build --resume on that GPU with tensorrt" in text
    assert "on the CPU; no engine was executed" in text
    assert [f.profile for f in result.forecasts] == ["l4", "h100-sxm", "rtx-4090"]
    assert "forecast for l4, not measured: at most " in text
    assert len(json.loads((tmp_path / "out/reports/forecast.json").read_text())) == 3

    shown = inspect(str(tmp_path / "out"))
    assert shown.engines == manifest.engines
    lines = shown.render().splitlines()
    first = lines.index("engines") + 1
    assert lines[first].startswith("  sm89.engine: SM89 (l4, rtx-4090), tensorrt_rtx 1.")
    assert lines[first + 1].startswith("    prefill  ")
    assert ", 3 fused attention, " in lines[first + 2]
    assert lines[first + 3] == "    sm89.context.onnx  for ONNX Runtime, experimental: never executed"
    assert lines[first + 4] == "  SM90 (h100-sxm): pending, built by tensorrt on its GPU"

    before = (tmp_path / "out/manifest.json").read_bytes()
    told = StringIO()
    verified = verify(tmp_path / "out", None, (), PlainProgress(told), own_gates=True)
    assert verified.failure() is None
    assert not any("tensorrt" in m.where for m in verified.report.measurements)
    assert (
        "the graph is measured on the CPU instead of an engine: the artifact has TensorRT" in told.getvalue()
    )
    (tmp_path / "out/sm90.engine").touch()  # of a command that was killed
    with pytest.raises(ResourceError, match="the engine for SM90 needs an NVIDIA GPU of that compute capab"):
        resume(tmp_path / "out", SilentProgress())
    assert not (tmp_path / "out/sm90.engine").exists()
    with pytest.raises(ResourceError, match="engines for SM89, SM90, but this machine is "):
        run(tmp_path / "out", "hello", 4, print, SilentProgress())
    with pytest.raises(
        UnsupportedError, match="it has only the logits of the last token, which cannot verify a draft"
    ) as refused:
        run(tmp_path / "out", "hello", 4, print, SilentProgress(), lookup=4)
    assert refused.value.hint == "run it without --lookup"
    plan = (tmp_path / "out/sm89.engine").read_bytes()
    (tmp_path / "out/sm89.engine").write_bytes(plan[:-1])
    with pytest.raises(ConfigError, match=r"sm89\.engine"):
        run(tmp_path / "out", "hello", 4, print, SilentProgress())
    (tmp_path / "out/sm89.engine").write_bytes(plan)
    with pytest.raises(ResourceError, match="engines for SM89, SM90, but this machine is "):
        bench(tmp_path / "out", None, SilentProgress())
    assert (tmp_path / "out/manifest.json").read_bytes() == before

    tokens = tmp_path / "out/tokenizer.json"
    inner = json.loads(tokens.read_text(encoding="utf-8"))
    swapped = {"a": inner["model"]["vocab"]["b"], "b": inner["model"]["vocab"]["a"]}
    inner["model"]["vocab"].update(swapped)
    tokens.write_text(json.dumps(inner), encoding="utf-8")
    graph = onnx.load(tmp_path / "out/model.onnx")
    graph.graph.input[0].name = graph.graph.input[0].name + "s"
    onnx.save(graph, tmp_path / "out/model.onnx")
    missed = verify(
        tmp_path / "out", None, (), SilentProgress(), own_gates=True, every=True
    ).report.verdict.missed
    assert {Metric.INTERFACE, Metric.DECODE_MAX_ABS, Metric.TOKENIZER_EQUAL} <= {c.metric for c in missed}
    assert capsys.readouterr().out == ""


def _record(version: str | None, file: str | None = "sm89.engine") -> EngineRecord:
    return EngineRecord(file=file, library="tensorrt_rtx", version=version, sms=("SM89",), profiles=("l4",))


def test_what_a_host_cannot_load_is_known_from_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = load_library(Library.RTX).__version__
    l4, t4 = load_profile("l4"), load_profile("t4")
    assert require_engine([_record(installed)], l4).file == "sm89.engine"
    with pytest.raises(ResourceError, match=r"engines for SM89, but this machine is NVIDIA T4 \(SM75\)"):
        require_engine([_record(installed)], t4)
    message = (
        f"sm89.engine was built by tensorrt_rtx 1.0.0, the only version that loads it, but {installed} is"
    )
    with pytest.raises(ResourceError, match=message) as caught:
        require_engine([_record("1.0.0")], l4)
    assert caught.value.hint == "pip install tensorrt-rtx-cu13==1.0.0, or build it again"
    monkeypatch.setattr("llmc.gpu.gpus", lambda: (gpu("Tesla T4", "7.5"), gpu("NVIDIA L4", "8.9")))
    with pytest.raises(ResourceError, match="but this machine is NVIDIA T4") as other:
        require_engine([_record(installed)], t4)
    assert other.value.hint == f"CUDA_VISIBLE_DEVICES={UUID} selects the NVIDIA L4 of this machine"
    with pytest.raises(ResourceError, match="the engine for SM89 is pending"):
        require_engine([_record(None, file=None)], l4)


def test_where_there_is_the_gpu_its_engine_is_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver names an L4, and the CUDA runtime finds no device: its error is raised."""
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    plan = _plan(model, tmp_path / "out", "l4").model_copy(update={"verify": False})
    assert build(plan, SilentProgress()).manifest.state is State.NOT_EXECUTED
    with pytest.raises(ConfigError, match="has no engine pending: it is built, not executed"):
        resume(tmp_path / "out", SilentProgress())

    monkeypatch.setattr("llmc.machine.gpus", lambda: (gpu("NVIDIA L4", "8.9"),))
    monkeypatch.setattr("llmc.backends.tensorrt.backend.require_gpu", lambda: gpu("NVIDIA L4", "8.9"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    fails = "cudaGetDeviceProperties of CUDA fails: "
    hidden = "this machine has no NVIDIA GPU|CUDA_VISIBLE_DEVICES='-1'"  # in the child that measures memory
    for command, message in (
        (lambda: run(tmp_path / "out", "hello", 4, print, SilentProgress()), fails),
        (lambda: verify(tmp_path / "out", None, (), SilentProgress(), own_gates=True), fails),
        (lambda: bench(tmp_path / "out", None, SilentProgress()), hidden),
    ):
        with pytest.raises(ResourceError, match=message) as caught:
            command()
        assert caught.value.exit_code is ExitCode.RESOURCES


def test_plain_rounding_is_the_yardstick_of_what_llmc_steps_through(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    gate = Gate(metric=Metric.TEXT_KL_RATIO, max=1.5, reason="not worse than plain rounding")
    plan = _plan(model, tmp_path / "out", "h100-sxm", target="tensorrt-int4", gates=(gate,))
    result = build(plan, SilentProgress())
    assert result.verdict is not None
    (check,) = (check for check in result.verdict.checks if check.metric is Metric.TEXT_KL_RATIO)
    assert check.status is CheckStatus.PASS
    assert check.value is not None
    assert check.value > 0.1


def test_a_cache_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    message = "kv_capacity is 512, but the model has 256 positions"
    with pytest.raises(UnsupportedError, match=message) as caught:
        build(_plan(model, tmp_path / "out", "l4", capacity=512), SilentProgress())
    assert caught.value.hint == "copy the target and set kv_capacity to 256 or less"
    assert not (tmp_path / "out").exists()


def test_a_precision_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    plan = plan_build("no-such-model", target="tensorrt-int4", profile="rtx-4090,t4", output=tmp_path / "out")
    with pytest.raises(UnsupportedError, match="needs int8, which NVIDIA T4"):
        build(plan, SilentProgress())
