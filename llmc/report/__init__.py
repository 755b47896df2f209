"""One report on an artifact in several forms: JSON, JUnit XML, text for a terminal."""

from llmc.report.document import Report, write_json
from llmc.report.junit import write_junit
from llmc.report.text import render_text

__all__ = ["Report", "render_text", "write_json", "write_junit"]
