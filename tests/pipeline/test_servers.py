"""`llmc verify --runtime` with a server of the tests' own, which speaks the protocol of workers."""

from pathlib import Path

import pytest

from llmc import pipeline
from llmc.artifact.served import Deed
from llmc.artifact.verdict import CheckStatus
from llmc.catalog import load_target
from llmc.config import Family, Metric
from llmc.errors import ConfigError, ResourceError, UnsupportedError
from llmc.pipeline.gate.servers import Runtimes, records_of_all
from llmc.pipeline.result import GateReport
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.models import save_tiny_model, save_tiny_tokenizer
from tests.servers.fake import make_environment

TARGET = """
name: mine
summary: "gptq by blocks of 32, for tiny models"
extends: gptq-int4
quantize:
  calibration: null
  rules:
    - {role: embedding, scheme: null}
    - {role: lm_head, scheme: null}
    - {scheme: {bits: 4, block_size: 32, symmetric: true, method: mse}}
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "targets").mkdir()
    (folder / "targets" / "mine.yaml").write_text(TARGET)
    return folder


@pytest.fixture(scope="module")
def artifact(user: Path) -> Path:
    save_tiny_model("llama", user / "model")
    save_tiny_tokenizer(user / "model")
    build(user, "mine", user / "artifact")
    return user / "artifact"


def build(user: Path, target: str, output: Path) -> None:
    model = str(user / "model")
    plan = plan_build(
        model, target=target, profile="local", output=output, path=user, verify=False, token_ids=True
    )
    pipeline.build(plan, SilentProgress())


def verify(artifact: Path, user: Path, tmp_path: Path, how: str) -> GateReport:
    environment = make_environment(tmp_path / "environment", how)
    runtimes = Runtimes(("vllm",), (f"vllm={environment}",), 240.0)
    return pipeline.verify(
        artifact, None, (), SilentProgress(), search=user, runtimes=runtimes, folder=tmp_path / "report",
        every=True, budget=1.0,
    )  # fmt: skip


def figures(result: GateReport) -> dict[Metric, CheckStatus]:
    checks = result.report.verdict.checks
    return {check.metric: check.status for check in checks if check.metric.family is Family.SERVER}


def test_a_server_that_is_right_passes(artifact: Path, user: Path, tmp_path: Path) -> None:
    result = verify(artifact, user, tmp_path, "model")
    executed = {Metric.SERVER_SKIPPED, Metric.SERVER_TOKENIZER, Metric.SERVER_LOGPROB, Metric.SERVER_KL_MEAN}
    executed |= {Metric.SERVER_GREEDY_GAP}
    found = figures(result)
    assert {metric for metric, status in found.items() if status is CheckStatus.PASS} == executed
    assert {found[m] for m in found if m not in executed} == {CheckStatus.NOT_APPLICABLE}
    records = {each.name: each for each in result.report.servers}
    assert (records["vllm"].version, records["vllm"].deed) == ("9.1", Deed.EXECUTED)
    assert records["edgellm"].deed is records["deepspeed"].deed is Deed.NOT_ASKED
    for name in ("report.md", "report.html", "report.json", "junit.xml"):
        assert "vllm" in (tmp_path / "report" / name).read_text()


def test_a_server_that_dies_fails_the_gate(artifact: Path, user: Path, tmp_path: Path) -> None:
    result = verify(artifact, user, tmp_path, "die")
    assert figures(result)[Metric.SERVER_SKIPPED] is CheckStatus.FAIL
    assert Metric.SERVER_SKIPPED.value in str(result.failure())
    assert "ended with signal 9" in result.render()
    assert result.report.servers[0].deed is Deed.FAILED


def test_a_server_that_is_not_installed_ends_before_the_gate(
    artifact: Path, user: Path, tmp_path: Path
) -> None:
    runtimes = Runtimes(("vllm",), (f"vllm={tmp_path / 'nothing'}",))
    with pytest.raises(ResourceError, match="vllm is not installed"):
        pipeline.verify(artifact, None, (), SilentProgress(), search=user, runtimes=runtimes)


def test_a_server_that_reads_the_format_wrongly_is_not_started() -> None:
    target = load_target("vllm-w4a16")
    with pytest.raises(UnsupportedError, match="edgellm does not serve artifacts of target vllm-w4a16: "):
        Runtimes(("edgellm",)).extras(target, target)


def test_graphs_are_not_for_servers() -> None:
    target = load_target("cpu-fp32")
    with pytest.raises(UnsupportedError, match="artifacts of target cpu-fp32 are graphs, which vllm"):
        Runtimes(("vllm",)).extras(target, target)
    assert records_of_all((), target) == ()


def test_an_environment_without_its_server_is_refused(tmp_path: Path) -> None:
    target = load_target("vllm-w8a8")
    with pytest.raises(ConfigError, match="--environment names the environment of vllm, which is not asked"):
        Runtimes((), (f"vllm={tmp_path}",)).extras(target, target)
