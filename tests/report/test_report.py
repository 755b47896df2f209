"""One report in its three forms."""

import math
import resource
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmc.artifact.latency import (
    BatchLatency,
    DecodeLatency,
    Footprint,
    Latency,
    OperatorTime,
    PrefillLatency,
    Ratio,
    Roofline,
    StepWay,
    Timing,
)
from llmc.artifact.served import Deed, ServerRecord
from llmc.artifact.verdict import Check, CheckStatus, Measurement, MeasurementStatus, Peer, Verdict
from llmc.config import Metric
from llmc.errors import ConfigError, ResourceError
from llmc.progress import printable
from llmc.report import (
    Report,
    read_report,
    render_html,
    render_markdown,
    render_schema,
    render_text,
    write_html,
    write_json,
    write_junit,
    write_markdown,
)
from llmc.report.tables import make_tables

TIMING = Timing(n=5, p50_ms=10.0, p95_ms=12.0, p99_ms=12.5, min_ms=9.0, max_ms=13.0)
RATIO = Ratio(value=0.5, low=0.45, high=0.61)
FOOTPRINT = Footprint(
    load=TIMING, peak_bytes=300 << 20, steady_bytes=200 << 20, gpu_bytes=77 << 20, prompt_tokens=128,
    decoded_tokens=16,
)  # fmt: skip
LATENCY = Latency(
    where="onnxruntime 1.31.1 CPUExecutionProvider",
    original="torch float32 sdpa, dynamic cache",
    threads=2,
    prefill=(PrefillLatency(prompt_tokens=128, artifact=TIMING, original=TIMING, ratio=RATIO, noise=0.02,
        artifact_tokens_per_s=12800.0, original_tokens_per_s=6400.0),),
    decode=(
        DecodeLatency(
            context=128, artifact=TIMING, original=TIMING, artifact_tokens_per_s=100.0,
            original_tokens_per_s=50.0, ratio=RATIO, noise=0.02, artifact_joules_per_token=0.31,
            original_joules_per_token=1.27,
        ),
    ),
    roofline=(
        Roofline(
            context=128, weight_bytes=90_000_000, kv_bytes=6_000_000, bandwidth_gbs=None, bound_ms=None,
            fraction=None,
        ),
    ),
    artifact_footprint=FOOTPRINT,
    original_footprint=FOOTPRINT.model_copy(update={"peak_bytes": None, "steady_bytes": None}),
    ways=(StepWay(where="as CUDA graphs", context=128, step=TIMING),),
    apart="the original ran on the CPU",
    energy="RAPL package-0",
    batches=(
        BatchLatency(
            batch=4, context=128, ttft=TIMING, ttft_original=TIMING, artifact=TIMING, original=TIMING,
            ratio=RATIO, tokens_per_s=400.0, original_tokens_per_s=70.0,
        ),
    ),
    operators=(OperatorTime(name="MatMulNBits", calls=121, ms=4.5),),
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
    assert '"schema_version": 5' in text
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
    assert failure.get("message") == "no figure, gate <= 0.001"
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
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    times = ["10", "12", "12.5", "10", "0.500 (0.450 to 0.610)"]
    assert ["first token after 128", *times, "12,800", "6400", "5"] in cells
    assert ["128", "90", "6", "not stated by the profile"] in cells
    assert ["128", "0.31", "1.27"] in cells
    assert "energy: RAPL package-0" in lines
    assert ["artifact", "10", "314.6", "209.7", "80.74"] in cells
    assert ["original", "10", "-", "-", "80.74"] in cells
    assert "not measured: prompt of 1024 tokens: the model ends at 512 positions" in lines
    assert "\x1b" not in text
    assert "\x1b[" in render_text(report, colour=True)


def test_text_of_a_pass_without_latency_and_with_a_roofline(report: Report) -> None:
    verdict = Verdict(passed=True, checks=report.verdict.checks[:1])
    passed = report.model_copy(update={"verdict": verdict, "latency": None})
    assert render_text(passed).splitlines()[-1] == "demo cpu-int4@local: passed"
    roof = LATENCY.roofline[0].model_copy(update={"bandwidth_gbs": 40.0, "bound_ms": 2.4, "fraction": 0.24})
    bound = report.model_copy(update={"latency": LATENCY.model_copy(update={"roofline": (roof,)})})
    made = next(table for table in make_tables(bound) if table.name == "decode")
    assert made.columns[-2:] == ("bandwidth, GB/s", "roofline, ms")
    assert made.rows == (("128", "90", "6", "40", "2.4"),)


def undecided(report: Report) -> Report:
    found = check(Metric.TEXT_TOP1, 0.66, "undecided", bound=0.65).model_copy(
        update={"low": 0.6, "high": 0.7}
    )
    verdict = Verdict(passed=False, checks=(*report.verdict.checks, found))
    return report.model_copy(update={"verdict": verdict})


def test_what_cannot_be_decided_is_a_failure_of_its_own_kind(report: Report, tmp_path: Path) -> None:
    write_junit(undecided(report), tmp_path / "junit.xml")
    (suite,) = ET.parse(tmp_path / "junit.xml").getroot()
    case = next(c for c in suite if c.get("classname") == "llmc.text" and c.get("name") == "top1_agreement")
    assert case.find("failure").attrib == {"message": "0.66 (0.6 to 0.7), gate <= 0.65", "type": "undecided"}
    assert suite.get("failures") == "3"
    assert render_text(undecided(report), width=160).splitlines()[-1].endswith("text.top1_agreement")


def test_markdown(report: Report, tmp_path: Path) -> None:
    write_markdown(undecided(report), tmp_path / "out" / "report.md")
    lines = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "## demo cpu-int4@local: FAILED"
    assert "| prefill.max_abs | 0.0002 | <= 0.001 | pass |" in lines
    assert "| decode.max_abs | no figure | <= 0.001 | **FAIL** |" in lines
    assert "| text.top1_agreement | 0.66 (0.6 to 0.7) | <= 0.65 | **undecided** |" in lines
    assert "| next token at 128 | 10 | 12 | 12.5 | 10 | 0.500 (0.450 to 0.610) | 100 | 50 | 5 |" in lines
    assert "| 128 | 0.31 | 1.27 |" in lines
    assert "energy: RAPL package-0" in lines


def test_every_form_has_every_figure_of_every_table(report: Report) -> None:
    made = make_tables(report)
    assert {table.name for table in made} == {
        "latency", "decode", "ways", "footprints", "energy", "operators", "batches",
    }  # fmt: skip
    forms = (render_text(report, width=400), render_markdown(report), render_html(report))
    for table in made:
        for text in (table.caption, *table.columns, *(cell for row in table.rows for cell in row)):
            assert all(text in form for form in forms), text
    assert make_tables(report.model_copy(update={"latency": None})) == []


class _Page(HTMLParser):
    """Figures by metric, the embedded document, and everything that would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: dict[str, str] = {}
        self.document = ""
        self.loads: list[str] = []
        self.tags: list[str] = []
        self._metric: str | None = None
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        stated = dict(attrs)
        self.tags.append(tag)
        self._metric, self._inside = stated.get("data-metric"), tag
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and v[0] != "#"]

    def handle_data(self, data: str) -> None:
        if self._metric is not None:
            self.figures.setdefault(self._metric, data)
        if self._inside == "script":
            self.document += data

    def handle_endtag(self, tag: str) -> None:
        self._metric, self._inside = None, ""


def test_html_is_one_file_with_the_figures_of_the_document(report: Report) -> None:
    hostile = report.model_copy(
        update={
            "model": "<script>alert(1)</script>",
            "sizes": {"lm_head, 4 bits": 15_000_000, "linear, 4 bits": 60_000_000},
            "measurements": (
                *report.measurements[:2],
                measurement(Metric.TEXT_KL_MEAN, 0.2).model_copy(
                    update={"figures": {"position_0": 0.1, "position_16": 0.3}}
                ),
                measurement(Metric.WEIGHTS_SNR, 20.0).model_copy(
                    update={"figures": {"model.layers.0.q": 21.0, "model.layers.1.q": 20.0}}
                ),
            ),
        }
    )
    text = render_html(hostile)
    page = _Page()
    page.feed(text)
    assert Report.model_validate_json(page.document).model_dump_json() == hostile.model_dump_json()
    assert page.figures["prefill.max_abs"] == "0.0002"
    assert page.figures["weights.snr_db"] == "20"
    assert page.loads == ["data:,"]
    assert page.tags.count("script") == 1
    # Layers, along the text, sizes, latency, operators, batches; no level has a finite figure.
    assert page.tags.count("svg") == 6
    assert "#0102" not in text
    assert "var(--first)" in text
    assert render_html(hostile) == text
    assert 'id="energy"' in text
    assert "energy: RAPL package-0" in text
    metered = LATENCY.decode[0].model_copy(update={"artifact_joules_per_token": None})
    assert 'id="energy-gpu"' not in text
    assert '<td>artifact</td><td class="number">10</td><td class="number">314.6</td>' in text
    assert '<td>original</td><td class="number">10</td><td class="number">-</td>' in text
    without = LATENCY.model_copy(update={"decode": (metered,), "energy": "not measured: no counter"})
    text = render_html(report.model_copy(update={"latency": without}))
    assert 'id="energy"' not in text
    assert "energy: not measured: no counter" in text


@pytest.mark.parametrize("name", [r"p$\frac{$", "a$b$c", "esc\x1b[2Jape"])
def test_any_name_of_a_folder_can_be_drawn(name: str, report: Report) -> None:
    peers = (Peer(title=name, bytes=1000, kl_mean=0.1), Peer(title="other", bytes=2000, kl_mean=0.2))
    page = render_html(report.model_copy(update={"peers": peers, "model": name}))
    assert printable(name) in page


def test_a_report_reads_back_or_says_why_not(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(report, path)
    assert read_report(path).model_dump_json() == report.model_dump_json()
    path.write_text(path.read_text().replace('"schema_version": 5', '"schema_version": 6'))
    with pytest.raises(ConfigError, match="has schema version 6, but this version of llmc reads 5"):
        read_report(path)
    path.write_text('{"schema_version": 5}')
    with pytest.raises(ConfigError, match="is damaged: llmc: Field required"):
        read_report(path)
    with pytest.raises(ConfigError, match=r"is not a report: .*No such file"):
        read_report(tmp_path / "absent")


def test_the_published_schema_is_that_of_the_code() -> None:
    path = Path(__file__).parents[2] / "docs" / "report.schema.json"
    assert path.read_text(encoding="utf-8") == render_schema(), "make schema writes it"


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 4 KiB: the kernel itself refuses, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("write", [write_json, write_junit, write_markdown, write_html])
def test_a_full_disk_leaves_the_earlier_report(
    report: Report, tmp_path: Path, write: Callable[[Report, Path], None]
) -> None:
    path = tmp_path / "report"
    path.write_text("the earlier one")
    with pytest.raises(ResourceError, match="report cannot be written: File too large"):
        write(report.model_copy(update={"model": "m" * (1 << 13)}), path)
    assert path.read_text() == "the earlier one"
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_every_form_names_the_servers_and_what_they_did(report: Report, tmp_path: Path) -> None:
    asked = ServerRecord(
        name="vllm", version="0.32.0", deed=Deed.EXECUTED, where="CPU", dtype="bfloat16", taken=692,
        skipped=0, figures={"server.kl_mean": 0.00125},
    )  # fmt: skip
    reader = ServerRecord(name="edgellm", version="0.11.0", deed=Deed.READ, taken=690, skipped=2)
    other = ServerRecord(name="deepspeed", version=None, deed=Deed.NOT_ASKED)
    served = report.model_copy(update={"servers": (asked, reader, other)})
    write_junit(served, tmp_path / "junit.xml")
    forms = (
        render_text(served, width=200),
        render_markdown(served),
        render_html(served),
        served.model_dump_json(),
        (tmp_path / "junit.xml").read_text(),
    )
    for form in forms:
        for word in ("vllm", "0.32.0", "executed", "692", "edgellm", "read, not executed", "deepspeed"):
            assert word in form
        assert "not measured" in form
    suite = ET.parse(tmp_path / "junit.xml").getroot()[0]
    assert suite[0].tag == "properties"
