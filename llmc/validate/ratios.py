"""Make measurements for gates of the times of an artifact and its original."""

from llmc.artifact.latency import Latency
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Metric
from llmc.validate.measure import measured, unmeasured


def ratios(latency: Latency) -> tuple[Measurement, ...]:
    """Return TTFT_RATIO and INTER_TOKEN_RATIO: the worst ratio of medians, with its noise interval.

    They are not measured if artifact and original ran on different kinds of devices.
    """
    series = {
        Metric.TTFT_RATIO: {f"prompt_{p.prompt_tokens}": (p.ratio.value, p.noise) for p in latency.prefill},
        Metric.INTER_TOKEN_RATIO: {f"context_{d.context}": (d.ratio.value, d.noise) for d in latency.decode},
    }
    measurements = []
    for metric, entries in series.items():
        if latency.apart is not None:
            status = MeasurementStatus.NOT_MEASURED
            measurements.append(unmeasured(metric, status, latency.apart, latency.where))
        elif entries:
            figures = {name: value for name, (value, _) in entries.items()}
            value, uncertainty = max(entries.values())
            detail = (
                f"worst of {', '.join(figures)}; against {latency.original}, {latency.threads} threads;"
                f" the machine's noise is {100 * uncertainty:.1f} %"
            )
            interval = (value / (1 + uncertainty), value * (1 + uncertainty))
            measurements.append(measured(metric, value, detail, latency.where, figures, interval))
        else:
            why = "; ".join(latency.dropped) or "no length was requested"
            measurements.append(unmeasured(metric, MeasurementStatus.NOT_MEASURED, why, latency.where))
    return tuple(measurements)
