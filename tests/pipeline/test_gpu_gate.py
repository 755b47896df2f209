"""A CUDA artifact is held to its gates on the GPU if there is one; over a stub, whose kernels do nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.artifact.verdict import CheckStatus, MeasurementStatus
from llmc.config import Family, Metric
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.report import Report, read_report
from tests.caches import own_cache
from tests.cuda import stub_environment
from tests.models import EOS, save_tiny_model

GPU = "NVIDIA L4"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, its artifact for CUDA, and a cache for this module's processes."""
    folder = tmp_path_factory.mktemp("gpu")
    model = save_tiny_model(
        "llama", folder / "model", tokenizer=True, eos_token_id=EOS, max_position_embeddings=64
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", own_cache(folder / "cache"))
        plan = plan_build(str(model), target="cuda-fp16", profile="l4", output=folder / "built", verify=False)
        build(plan, SilentProgress())
    return folder


def llmc(work: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmc", *arguments],
        env={**environment, "LLMC_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


BENCH = """
import sys
from pathlib import Path
from llmc.pipeline.bench import bench
from llmc.progress import SilentProgress
from llmc.validate import latency
small = latency.Schedule(
    prompts=(8,), contexts=(8,), batches=(1, 2), prefill_rounds=1, decode_rounds=1, decode_tokens=8,
    batch_rounds=1, energy_seconds=0.2, footprint_rounds=1,
)
latency.Schedule = lambda: small
print(bench(Path(sys.argv[1]), None, SilentProgress()).model_dump_json())
"""


Verified = tuple[int, str, Report]


def verified(work: Path, environment: dict[str, str], out: Path, *options: str) -> Verified:
    done = llmc(work, environment, "verify", str(work / "built"), "--report", str(out), *options)
    return done.returncode, done.stderr, read_report(out / "report.json")


@pytest.fixture(scope="module")
def on_cpu(work: Path, cuda_stub: Path) -> Verified:
    """Return what verify says without a driver; its report is in `work`/cpu."""
    return verified(work, stub_environment(cuda_stub, without=("libcuda.so.1",)), work / "cpu")


def test_kernels_that_do_nothing_do_not_pass(
    work: Path, cuda_stub: Path, tmp_path: Path, on_cpu: Verified
) -> None:
    baseline = str(work / "cpu" / "report.json")
    machine = stub_environment(cuda_stub, name=GPU)
    code, err, report = verified(work, machine, tmp_path, "--baseline", baseline)
    assert code == 5, err
    assert report.measured == "measured on NVIDIA L4: CUDA's kernels"
    assert report.apart == f"before, {on_cpu[2].measured}; now, {report.measured}"
    for form in ("report.md", "report.html"):
        text = (tmp_path / form).read_text("utf-8")
        assert "the baseline is of another device: before, measured on the CPU" in text
    assert report.measured in (tmp_path / "report.md").read_text("utf-8")
    checks = {check.metric: check for check in report.verdict.checks}
    executed = [Metric.PREFILL_MAX_ABS, Metric.CHUNKS_MAX_ABS, Metric.DECODE_MAX_ABS, Metric.RAGGED_MAX_ABS]
    executed += [Metric.DECODE_TOP1, Metric.TEXT_KL_MEAN, Metric.GENERATE_GAP]
    for metric in executed:
        assert checks[metric].status is CheckStatus.FAIL, metric
        assert checks[metric].where.endswith("CUDAExecutionProvider, NVIDIA L4")
    assert all("NVIDIA" in m.where for m in report.measurements if m.metric.family is Family.GENERATION)
    assert checks[Metric.INTERFACE].status is CheckStatus.PASS


def test_without_a_gpu_the_graph_is_measured_on_the_cpu(on_cpu: Verified) -> None:
    code, err, report = on_cpu
    assert code == 0, err
    assert report.measured == "measured on the CPU: the graph, not CUDA's kernels"
    assert "measured on the CPU: the graph, not CUDA's kernels: this machine has no NVIDIA GPU" in err
    assert not any("CUDA" in m.where for m in report.measurements)


def test_a_build_holds_the_gates_on_the_gpu(work: Path, cuda_stub: Path, tmp_path: Path) -> None:
    out = tmp_path / "built"
    done = llmc(
        work,
        stub_environment(cuda_stub, name=GPU),
        *("build", str(work / "model"), "--target", "cuda-fp16", "--profile", "l4", "-o", str(out)),
    )
    assert done.returncode == 5, done.stderr
    assert "measured on NVIDIA L4: CUDA's kernels" in done.stdout
    manifest = json.loads((tmp_path / "built.failed" / "manifest.json").read_text("utf-8"))
    places = {check["metric"]: check["where"] for check in manifest["checks"]}
    assert places["decode.max_abs"].endswith("CUDAExecutionProvider, NVIDIA L4")


@pytest.mark.parametrize("memory", [1 << 10, 3 << 20], ids=["at loading", "in a step"])
def test_memory_that_runs_out(work: Path, cuda_stub: Path, memory: int) -> None:
    done = llmc(work, stub_environment(cuda_stub, memory=memory), "verify", str(work / "built"))
    assert done.returncode == 4, done.stderr
    assert ": out of memory: " in done.stderr
    assert "hint: run fewer rows or a shorter context" in done.stderr
    assert "Traceback" not in done.stderr


def test_bench_times_the_gpu_and_compares_it_with_no_cpu(work: Path, cuda_stub: Path, tmp_path: Path) -> None:
    machine = stub_environment(cuda_stub, name=GPU, count=tmp_path / "count")
    machine |= {"LLMC_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BENCH, str(work / "built")]
    done = subprocess.run(command, env=machine, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = Report.model_validate_json(done.stdout)
    latency = report.latency
    assert latency is not None
    # Both ways are timed; the stub launches a graph faster than single kernels.
    graph, single = (way.where for way in latency.ways)
    assert (graph, single) == (f"{single}; steps as CUDA graphs", latency.where.partition(";")[0])
    assert single.endswith("CUDAExecutionProvider, NVIDIA L4")
    assert report.measured == "measured on NVIDIA L4: CUDA's kernels"
    assert [len(entries) for entries in (latency.prefill, latency.decode, latency.batches)] == [1, 1, 2]
    # torch here has no CUDA, so that its times on the CPU must not be compared.
    found = {m.metric: m for m in report.measurements}
    for metric in (Metric.TTFT_RATIO, Metric.INTER_TOKEN_RATIO):
        assert found[metric].status is MeasurementStatus.NOT_MEASURED
        assert found[metric].detail.startswith("the original ran on the CPU, since torch ")
    assert latency.artifact_footprint.gpu_bytes is not None
    assert latency.artifact_footprint.gpu_bytes > 0
    assert latency.original_footprint.gpu_bytes is None
    assert latency.energy.partition("GPU: ")[2].startswith("NVML NVIDIA L4; everything that this GPU does")
    (decode,) = latency.decode
    assert decode.artifact_gpu_joules_per_token is not None
    assert decode.original_gpu_joules_per_token is None
    assert any(each.startswith("operators: ") for each in latency.dropped)


def test_bench_without_a_gpu(work: Path, cuda_stub: Path) -> None:
    machine = stub_environment(cuda_stub, without=("libcuda.so.1",))
    done = llmc(work, machine, "bench", str(work / "built"))
    assert done.returncode == 4, done.stderr
    assert "is built for CUDA: this machine has no NVIDIA GPU, or no driver for it" in done.stderr
