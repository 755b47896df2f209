"""A build for CUDA refuses profiles of GPUs without code, and says why its gates cannot run."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmc.backends import backend_of
from llmc.backends.onnxruntime.devices import require_device_kernels, require_expert_kernels
from llmc.catalog import list_profiles, load_profile
from llmc.errors import ExitCode, UnsupportedError
from llmc.machine import detect_cpu
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.profile import ProfileKind
from llmc.progress import SilentProgress
from tests.cuda import stub_environment
from tests.models import EOS, save_tiny_model
from tests.passes.harness import graph_of

PREPARE = """
import sys
from pathlib import Path
from llmc.backends import backend_of
from llmc.plan import plan_build
plan = plan_build("demo", target="cuda-int4", profile="l4", output=Path(sys.argv[1]))
stage = backend_of(plan.target).prepare(plan)
print(stage.measurable, stage.obstacle)
"""


def test_a_gpu_without_code_in_onnxruntime_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    plan = plan_build("demo", target="cuda-int4", profile="b200", output=tmp_path / "out")
    with pytest.raises(UnsupportedError) as refused:
        backend_of(plan.target).prepare(plan)
    assert refused.value.exit_code is ExitCode.UNSUPPORTED
    assert refused.value.fact == (
        "target cuda-int4 cannot run on profile b200: onnxruntime-gpu 1.31.1 has no code for compute "
        "capability 10.0, only for 7.5, 8.0, 8.6, 8.9, 9.0, 12.0, 12.1"
    )
    hint = refused.value.hint or ""
    assert hint.startswith("for b200 use tensorrt-")
    assert "tensorrt-nvfp4" in hint


def test_every_other_gpu_is_accepted() -> None:
    for listed in list_profiles():
        if listed.document.kind is ProfileKind.GPU and listed.document.name != "b200":
            require_device_kernels("cuda-fp16", listed.document)


def test_a_gpu_that_nothing_runs_on() -> None:
    old = load_profile("t4").model_copy(update={"compute_capability": "7.0"})
    with pytest.raises(UnsupportedError) as refused:
        require_device_kernels("cuda-fp16", old)
    assert refused.value.hint == "name a profile of another GPU"


def test_a_host_without_a_gpu_may_build() -> None:
    require_device_kernels("cuda-fp16", detect_cpu())


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ((), "True None"),
        (("libcublas.so.13",), "False libcublas.so.13, which onnxruntime needs for CUDA, "),
        (("libcuda.so.1",), "False this machine has no NVIDIA GPU, or no driver for it (run it where"),
    ],
)
def test_a_build_says_why_its_gates_cannot_run(
    cuda_stub: Path, tmp_path: Path, without: tuple[str, ...], said: str
) -> None:
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "out")]
    environment = stub_environment(cuda_stub, without=without)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(said)


def test_experts_need_a_newer_gpu() -> None:
    experts = graph_of("qwen3_moe", ("experts",))
    with pytest.raises(UnsupportedError, match=r"no kernels of MoE and QMoE for compute capability 7\.5"):
        require_expert_kernels(experts, load_profile("t4"))
    for profile in (load_profile("a10"), load_profile("dgx-spark"), detect_cpu()):
        require_expert_kernels(experts, profile)
    require_expert_kernels(graph_of("llama"), load_profile("t4"))


def test_they_are_refused_before_anything_is_calibrated(tmp_path: Path) -> None:
    model = save_tiny_model("qwen3_moe", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    plan = plan_build(str(model), target="cuda-fp16", profile="t4", output=tmp_path / "out")
    progress = SilentProgress()
    with pytest.raises(UnsupportedError, match=r"no kernels of MoE and QMoE for compute capability 7\.5"):
        build(plan, progress)
    assert progress.records[-1].name == "passes"
