"""Draw pictures of a report as SVG with the page's own colours, so that they follow light and dark mode.

matplotlib draws them with placeholder colours, which are then replaced by CSS variables.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from llmc.artifact.latency import BatchLatency, Latency, OperatorTime
from llmc.artifact.verdict import Measurement, Peer
from llmc.config import Metric
from llmc.progress import printable
from llmc.report.document import Report

#: Placeholder colours of matplotlib, and the variables that the page defines.
_COLOURS = {
    "#010203": "var(--ink)",
    "#010204": "var(--faint)",
    "#010205": "var(--first)",
    "#010206": "var(--second)",
}
INK, FAINT, FIRST, SECOND = _COLOURS
_SIZE = (4.8, 2.7)


def draw_pictures(report: Report) -> dict[str, str]:
    """Return SVG by caption, for everything that the report has figures for."""
    by_metric = {m.metric: m for m in report.measurements}
    drawn: dict[str, str] = {}

    def draw(caption: str, plot: Callable[[Any], None]) -> None:
        drawn[caption] = draw_svg(plot)

    snr = _figures(by_metric.get(Metric.WEIGHTS_SNR))
    if layers := _by_layer(snr):
        draw(
            "What quantization left of each layer's weights, dB (worst matrix)",
            lambda ax: _layers(ax, layers),
        )
    along = {
        n: v for n, v in _figures(by_metric.get(Metric.TEXT_KL_MEAN)).items() if n.startswith("position_")
    }
    if along:
        draw("KL divergence along the text, nats per token", lambda ax: _along(ax, along))
    levels = {
        m.metric.area: values
        for m in report.measurements
        if m.metric.is_logit_difference and (values := [v for v in _figures(m).values() if v > 0])
    }
    if levels:
        draw("Largest logit difference, with the artifact's own weights", lambda ax: _levels(ax, levels))
    pairs = next((m.pairs for m in report.measurements if m.pairs), ())
    if pairs:
        draw(
            "Log-probability of the text's tokens: original across, artifact up", lambda ax: _pairs(ax, pairs)
        )
    if report.sizes:
        draw("Stored weights by kind, MB", lambda ax: _sizes(ax, report.sizes))
    if report.peers:
        draw(
            "Size and quality of the artifacts of this model: MB and KL divergence in nats",
            lambda ax: _peers(ax, report.peers),
        )
    if report.latency is not None and report.latency.decode:
        latency = report.latency
        draw(
            "Time to the next token, ms: p50 to p99, artifact and original", lambda ax: _latency(ax, latency)
        )
        if any(r.bound_ms is not None for r in latency.roofline):
            draw("Next token against the memory roofline, ms", lambda ax: _roofline(ax, latency))
    if report.latency is not None and report.latency.operators:
        operators = report.latency.operators
        draw("Time by kind of operator in one step, ms", lambda ax: _operators(ax, operators))
    if report.latency is not None and report.latency.batches:
        batches = report.latency.batches
        draw("Tokens per second of all rows, by batch", lambda ax: _batches(ax, batches))
    return drawn


def draw_svg(plot: Callable[[Any], None]) -> str:
    """Return what `plot` draws on a pair of axes, as SVG in the colours of the page."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text
        "text.parse_math": False,  # a name may hold dollars
        "svg.hashsalt": "llmc",  # the same report gives the same bytes
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        plot(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for placeholder, variable in _COLOURS.items():
        svg = svg.replace(placeholder, variable)
    return svg


def _layers(axes: Any, layers: dict[int, float]) -> None:
    axes.bar(list(layers), list(layers.values()), color=FIRST)
    axes.set_xlabel("layer")
    axes.set_ylim(bottom=max(0.0, min(layers.values()) - 5))


def _along(axes: Any, along: dict[str, float]) -> None:
    axes.plot([int(n.split("_")[1]) for n in along], list(along.values()), color=FIRST, marker="o")
    axes.set_xlabel("tokens decoded before")
    axes.set_ylim(0, 1.15 * max(along.values()))


def _levels(axes: Any, levels: dict[str, list[float]]) -> None:
    for at, values in enumerate(levels.values()):
        axes.scatter(values, [at] * len(values), color=FIRST, s=18, alpha=0.7)
    axes.set_yticks(range(len(levels)), list(levels))
    axes.set_xscale("log")


def _pairs(axes: Any, pairs: Sequence[tuple[float, float]]) -> None:
    finite = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    least = min((min(pair) for pair in finite), default=-1.0)
    axes.plot([least, 0], [least, 0], color=FAINT)
    axes.scatter([a for a, _ in finite], [b for _, b in finite], color=FIRST, s=8, alpha=0.6)


def _operators(axes: Any, operators: Sequence[OperatorTime]) -> None:
    shown = operators[:8][::-1]
    axes.barh([o.name for o in shown], [o.ms for o in shown], color=FIRST)


def _batches(axes: Any, batches: Sequence[BatchLatency]) -> None:
    places = range(len(batches))
    axes.bar([i - 0.2 for i in places], [b.tokens_per_s for b in batches], 0.4, color=FIRST, label="artifact")
    theirs = [b.original_tokens_per_s for b in batches]
    axes.bar([i + 0.2 for i in places], theirs, 0.4, color=SECOND, label="original")
    axes.set_xticks(list(places), [str(b.batch) for b in batches])
    axes.set_xlabel("rows")
    axes.legend()


def _sizes(axes: Any, sizes: dict[str, int]) -> None:
    names = sorted(sizes, key=lambda n: sizes[n])
    axes.barh(names, [sizes[n] / 1e6 for n in names], color=FIRST)


def _peers(axes: Any, peers: Sequence[Peer]) -> None:
    for peer in peers:
        at = (peer.bytes / 1e6, peer.kl_mean)
        axes.scatter([at[0]], [at[1]], color=FIRST)
        axes.annotate(printable(peer.title), at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlim(0, 1.5 * max(p.bytes for p in peers) / 1e6)
    axes.set_ylim(0, 1.2 * max(p.kl_mean for p in peers) or 1.0)
    axes.set_xlabel("MB")


def _latency(axes: Any, latency: Latency) -> None:
    for side, colour, shift in (("artifact", FIRST, -0.15), ("original", SECOND, 0.15)):
        timings = [getattr(d, side) for d in latency.decode]
        at = [i + shift for i in range(len(timings))]
        middle = [t.p50_ms for t in timings]
        upper = [t.p99_ms - t.p50_ms for t in timings]
        axes.bar(at, middle, width=0.28, color=colour, label=side)
        axes.errorbar(at, middle, yerr=[[0.0] * len(upper), upper], fmt="none", ecolor=INK, capsize=3)
    axes.set_xticks(range(len(latency.decode)), [f"context {d.context}" for d in latency.decode])
    axes.legend()


def _roofline(axes: Any, latency: Latency) -> None:
    at = range(len(latency.decode))
    axes.bar(at, [d.artifact.p50_ms for d in latency.decode], color=FIRST, label="measured")
    axes.bar(at, [r.bound_ms or 0.0 for r in latency.roofline], color=SECOND, label="bytes / bandwidth")
    axes.set_xticks(at, [f"context {d.context}" for d in latency.decode])
    axes.legend()


def _figures(measurement: Measurement | None) -> dict[str, float]:
    """Return the finite figures of a measurement, if there is one."""
    return {} if measurement is None else {n: v for n, v in measurement.figures.items() if math.isfinite(v)}


def _by_layer(snr: dict[str, float]) -> dict[int, float]:
    """Return the worst ratio by the layer's number, which is the first number in a tensor's name."""
    worst: dict[int, float] = {}
    for name, value in snr.items():
        if match := re.search(r"\.(\d+)\.", name):
            layer = int(match.group(1))
            worst[layer] = min(value, worst.get(layer, math.inf))
    return dict(sorted(worst.items()))
