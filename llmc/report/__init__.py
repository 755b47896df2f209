"""Render one report on an artifact in several forms: JSON, JUnit XML, Markdown, HTML, terminal text."""

from llmc.report.comparison import compare_reports, devices_apart, parse_allowed, render_changes
from llmc.report.document import Report, read_report, render_schema, write_json
from llmc.report.figures import format_figure
from llmc.report.front import render_front, write_tuning
from llmc.report.html import render_html, write_html
from llmc.report.junit import write_junit
from llmc.report.markdown import render_markdown, write_markdown
from llmc.report.text import render_text

__all__ = [
    "Report",
    "compare_reports",
    "devices_apart",
    "format_figure",
    "parse_allowed",
    "read_report",
    "render_changes",
    "render_front",
    "render_html",
    "render_markdown",
    "render_schema",
    "render_text",
    "write_html",
    "write_json",
    "write_junit",
    "write_markdown",
    "write_tuning",
]
