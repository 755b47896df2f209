"""One report in its three forms."""

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from llmc.artifact.latency import DecodeLatency, Footprint, Latency, PrefillLatency, Ratio, Roofline, Timing
from llmc.artifact.verdict import Check, CheckStatus, Measurement, MeasurementStatus, Verdict
from llmc.config import Metric
from llmc.report import Report, render_text, write_json, write_junit

TIMING = Timing(n=5, p50_ms=10.0, p95_ms=12.0, p99_ms=12.5, min_ms=9.0, max_ms=13.0)
RATIO = Ratio(value=0.5, low=0.45, high=0.61)
FOOTPRINT = Footprint(load=TIMING, peak_bytes=300 << 20, prompt_tokens=128, decoded_tokens=16)
LATENCY = Latency(
    where="onnxruntime 1.31.1 CPUExecutionProvider",
    original="torch float32 sdpa, dynamic cache",
    threads=2,
    prefill=(PrefillLatency(prompt_tokens=128, artifact=TIMING, original=TIMING, ratio=RATIO),),
    decode=(
        DecodeLatency(
            context=128, artifact=TIMING, original=TIMING, artifact_tokens_per_s=100.0,
            original_tokens_per_s=50.0, ratio=RATIO,
        ),
    ),
    roofline=(
        Roofline(
            context=128, weight_bytes=90_000_000, kv_bytes=6_000_000, bandwidth_gbs=None, bound_ms=None,
            fraction=None,
        ),
    ),
    artifact_footprint=FOOTPRINT,
    original_footprint=FOOTPRINT.model_copy(update={"peak_bytes": None}),
    dropped=("prompt of 1024 tokens: the model ends at 512 positions",),
)  # fmt: skip


def measurement(metric: Metric, value: float | None, status: str = "measured") -> Measurement:
    return Measurement(
        metric=metric, value=value, status=MeasurementStatus(status), detail=f"detail of {metric}",
        where="onnxruntime", figures={"length_1": math.inf} if value is not None else {},
    )  # fmt: skip


def check(metric: Metric, value: float | None, status: str, bound: float | None = 1e-3) -> Check:
    return Check(
        metric=metric, value=value, bound=bound, direction=None if bound is None else "max",
        reason="because of [rounding] & <order>", status=CheckStatus(status),
        detail=f"detail of {metric} [red] \x00", where="onnxruntime",
    )  # fmt: skip


@pytest.fixture
def report() -> Report:
    return Report(
        llmc="0.1.0",
        model="demo",
        target="cpu-int4",
        profile="local",
        verdict=Verdict(
            passed=False,
            checks=(
                check(Metric.PREFILL_MAX_ABS, 0.0002, "pass"),
                check(Metric.DECODE_MAX_ABS, math.nan, "fail"),
                check(Metric.WINDOW_MAX_ABS, None, "not applicable"),
                check(Metric.TEXT_KL_MEAN, math.inf, "fail", bound=None),
            ),
        ),
        measurements=(
            measurement(Metric.PREFILL_MAX_ABS, 0.0002),
            measurement(Metric.DECODE_MAX_ABS, math.nan),
            measurement(Metric.WINDOW_MAX_ABS, None, "not applicable"),
            measurement(Metric.TEXT_KL_MEAN, math.inf),
            measurement(Metric.TEXT_TOP1, 0.987654321),
            measurement(Metric.GENERATE_EQUAL, None, "not measured"),
        ),
        latency=LATENCY,
    )


def test_json_reads_back_with_nan_and_infinity(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "reports" / "parity.json"
    write_json(report, path)
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert '"schema_version": 1' in text
    back = Report.model_validate_json(text)
    assert math.isnan(back.measurements[1].value)
    assert back.measurements[1].figures == {"length_1": math.inf}
    assert back.verdict.checks[3].value == math.inf
    assert back.model_dump_json() == report.model_dump_json()
    assert back.latency == report.latency


def test_junit(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "reports" / "junit.xml"
    write_junit(report, path)
    root = ET.parse(path).getroot()
    assert root.tag == "testsuites"
    (suite,) = root
    assert suite.attrib == {
        "name": "demo cpu-int4@local",
        "tests": "6",
        "failures": "2",
        "errors": "0",
        "skipped": "3",
        "time": "0",
    }
    cases = {f"{c.get('classname')}.{c.get('name')}": c for c in suite}
    assert len(cases) == 6
    assert {n for n, c in cases.items() if c.find("failure") is not None} == {
        "llmc.decode.max_abs",
        "llmc.text.kl_mean",
    }
    assert {n for n, c in cases.items() if c.find("skipped") is not None} == {
        "llmc.window.max_abs",
        "llmc.text.top1_agreement",
        "llmc.generate.equal_fraction",
    }
    failure = cases["llmc.decode.max_abs"].find("failure")
    assert failure.get("message") == "nan, gate <= 0.001"
    assert "because of [rounding] & <order>" in failure.text
    # The schema's order within a testcase: skipped or failure, then system-out.
    assert [e.tag for e in cases["llmc.decode.max_abs"]] == ["failure", "system-out"]
    assert [e.tag for e in cases["llmc.prefill.max_abs"]] == ["system-out"]
    assert "\x00" not in path.read_text(encoding="utf-8")


def test_text(report: Report) -> None:
    text = render_text(report, width=160)
    lines = text.splitlines()
    assert lines[-1] == "demo cpu-int4@local: FAILED: decode.max_abs, text.kl_mean"
    row = next(line for line in lines if "prefill.max_abs" in line)
    assert "0.0002" in row
    assert "<= 0.001" in row
    assert "pass" in row
    assert "[red]" in row
    assert any("text.top1_agreement" in line and "0.9877" in line and "none" in line for line in lines)
    assert any("TTFT, 128 tokens" in line and "0.500 (0.450..0.610)" in line for line in lines)
    assert any("100.0 tokens/s (original 50.0)" in line and "bandwidth not stated" in line for line in lines)
    assert "artifact: load 10 ms, peak memory 300 MiB" in lines
    assert "original: load 10 ms, peak memory not known" in lines
    assert "not measured: prompt of 1024 tokens: the model ends at 512 positions" in lines
    assert "\x1b" not in text
    assert "\x1b[" in render_text(report, colour=True)


def test_text_of_a_pass_without_latency_and_with_a_roofline(report: Report) -> None:
    verdict = Verdict(passed=True, checks=report.verdict.checks[:1])
    passed = report.model_copy(update={"verdict": verdict, "latency": None})
    assert render_text(passed).splitlines()[-1] == "demo cpu-int4@local: passed"
    roof = LATENCY.roofline[0].model_copy(update={"bandwidth_gbs": 40.0, "bound_ms": 2.4, "fraction": 0.24})
    bound = report.model_copy(update={"latency": LATENCY.model_copy(update={"roofline": (roof,)})})
    assert "roofline 2.40 ms at 40 GB/s" in render_text(bound, width=200)
