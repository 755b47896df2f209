"""Write JUnit XML, as CI systems read it (the schema of Apache Ant's junitreport task).

What servers did is in the properties of the suite. There is one testcase per check, then one per measurement
that has no gate, which is `skipped` since nothing requires it.
"""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from llmc.artifact.store.disk import replace_text
from llmc.artifact.verdict import MISSED, Check, CheckStatus, Measurement
from llmc.report.document import Report
from llmc.report.figures import format_bound, format_estimate, format_figure, ungated

#: Characters that XML 1.0 cannot represent (section 2.2, Char).
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(report: Report, path: Path) -> None:
    """Write the verdict as one test suite named after model, target and profile."""
    checks = report.verdict.checks
    rest = ungated(report.measurements, checks)
    worse = [c for c in report.changes if c.regression is not None]
    suite = ET.Element(
        "testsuite",
        name=_clean(f"{report.model} {report.target}@{report.profile}"),
        tests=str(len(checks) + len(rest) + len(report.changes)),
        failures=str(len(report.verdict.missed) + len(worse)),
        errors="0",
        skipped=str(len(rest) + sum(c.status is CheckStatus.NOT_APPLICABLE for c in checks)),
        time="0",
    )
    if report.servers:
        properties = ET.SubElement(suite, "properties")
        for server in report.servers:
            ET.SubElement(properties, "property", name=f"server {server.name}", value=_clean(server.line))
    for check in checks:
        _add_check(suite, check)
    for measurement in rest:
        _add_measurement(suite, measurement)
    for change in report.changes:
        case = ET.SubElement(suite, "testcase", classname="llmc.baseline", name=change.name, time="0")
        if change.regression is not None:
            ET.SubElement(case, "failure", message=_clean(change.regression), type="regression")
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ET.tostring(root, encoding="unicode")
    replace_text(path, f"<?xml version='1.0' encoding='utf-8'?>\n{text}")


def _add_check(suite: ET.Element, check: Check) -> None:
    case = _case(suite, check.metric)
    figure = f"{format_estimate(check.value, check.low, check.high)}, gate {format_bound(check)}"
    if check.status in MISSED:
        kind = "gate" if check.status is CheckStatus.FAIL else check.status.value
        failure = ET.SubElement(case, "failure", message=_clean(figure), type=kind)
        failure.text = _clean(f"{check.detail}\n{check.reason}")
    elif check.status is CheckStatus.NOT_APPLICABLE:
        ET.SubElement(case, "skipped", message=_clean(f"not applicable: {check.detail}"))
    ET.SubElement(case, "system-out").text = _clean(f"{figure}; {check.detail}; {check.where}")


def _add_measurement(suite: ET.Element, measurement: Measurement) -> None:
    case = _case(suite, measurement.metric)
    ET.SubElement(case, "skipped", message=f"{measurement.status}, no gate")
    out = f"{format_figure(measurement.value)}; {measurement.detail}; {measurement.where}"
    ET.SubElement(case, "system-out").text = _clean(out)


def _case(suite: ET.Element, metric: str) -> ET.Element:
    area, _, name = metric.partition(".")
    return ET.SubElement(suite, "testcase", classname=f"llmc.{area}", name=name, time="0")


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("?", text)
