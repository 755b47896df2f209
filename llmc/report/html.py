"""Render the report as one HTML file, which loads nothing and follows the light and dark mode."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel

from llmc.artifact.store.disk import replace_text
from llmc.report.document import Report
from llmc.report.figures import format_bound, format_estimate, format_figure, ungated
from llmc.report.pictures import draw_pictures
from llmc.report.tables import make_notes, make_tables


def write_html(report: Report, path: Path) -> None:
    """Write the verdict, pictures and all figures; the report's own JSON is embedded unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, render_html(report))


def render_html(report: Report) -> str:
    """Return the page as text; everything that comes from the report is escaped."""
    return render_page(
        "page.html",
        report,
        draw_pictures(report),
        report=report,
        tables=make_tables(report),
        notes=make_notes(report),
        ungated=ungated(report.measurements, report.verdict.checks),
        bound=format_bound,
        estimate=format_estimate,
        figure=format_figure,
    )


def render_page(name: str, document: BaseModel, pictures: Mapping[str, str], **values: object) -> str:
    """Render a page from one of our templates, with a document embedded unchanged; values are escaped.

    Args:
        pictures: SVG by caption.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("llmc.report", "")
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, loader=loader
    ).get_template(name)
    style = files("llmc.report").joinpath("style.css").read_text(encoding="utf-8")
    # In a script element only `</` could end it, and in JSON it may be written as `<\/`.
    return template.render(
        style=Markup(style),
        document=Markup(document.model_dump_json(indent=1).replace("</", "<\\/")),
        pictures={caption: Markup(svg) for caption, svg in pictures.items()},
        **values,
    )
