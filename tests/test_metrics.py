"""The table of metrics says which direction is better and what an interval decides; what ships goes by it.

What is expected stands here by meaning, not by the table: a figure of an artifact that is right, and of one
that is not.
"""

import pytest

from llmc.artifact.verdict import CheckStatus, Verdict
from llmc.catalog import list_targets
from llmc.config import Better, Gate, Metric
from llmc.report import Report, compare_reports
from llmc.validate.gates import evaluate
from llmc.validate.measure import measured

#: A figure of an artifact that is all but equal to its original, and of one that is ruined.
RIGHT_AND_RUINED = {
    "files.mismatches": (0, 3),
    "gates.mismatches": (0, 3),
    "graph.mismatches": (0, 3),
    "original.mismatches": (0, 3),
    "interface.mismatches": (0, 3),
    "serving.mismatches": (0, 3),
    "tokenizer.equal_fraction": (1.0, 0.2),
    "chat.equal_fraction": (1.0, 0.2),
    "weights.mismatches": (0, 3),
    "weights.snr_db": (60.0, 1.0),
    "weights.block_snr_db": (60.0, 1.0),
    "weights.max_steps": (0.5, 90.0),
    "positions.verified": (4096, 8),
    "original.decode_max_abs": (1e-6, 9.0),
    "passes.max_abs": (1e-6, 9.0),
    "prefill.max_abs": (1e-6, 9.0),
    "chunks.max_abs": (1e-6, 9.0),
    "decode.max_abs": (1e-6, 9.0),
    "decode.top1_agreement": (1.0, 0.2),
    "ragged.max_abs": (1e-6, 9.0),
    "window.max_abs": (1e-6, 9.0),
    "cache.kl_mean": (1e-6, 5.0),
    "cache.kl_max": (1e-6, 5.0),
    "cache.scale_ratio": (1.0, 9.0),
    "rounding.kl_mean": (1e-6, 5.0),
    "rounding.kl_ratio": (1.0, 50.0),
    "rounding.noise_ratio": (0.01, 2.0),
    "rounding.position_ratio": (1.1, 50.0),
    "rounding.token_ratio": (1.1, 50.0),
    "text.kl_mean": (1e-6, 5.0),
    "text.kl_p99": (1e-6, 5.0),
    "text.kl_max": (1e-6, 5.0),
    "text.top1_agreement": (1.0, 0.2),
    "text.top5_agreement": (1.0, 0.2),
    "text.kl_ratio": (0.5, 4.0),
    "text.perplexity_ratio": (1.0, 9.0),
    "task.accuracy_change": (0.0, -0.6),
    "generate.equal_fraction": (1.0, 0.2),
    "generate.logit_gap": (0.0, 9.0),
    "generate.seeded_fraction": (1.0, 0.2),
    "ranks.mismatches": (0, 210),
    "ranks.max_abs": (1e-6, 9.0),
    "server.skipped_tensors": (0, 686),
    "server.weights_mismatches": (0, 210),
    "server.product_max_rel": (0.002, 0.5),
    "server.tokenizer_equal": (1.0, 0.2),
    "server.logprob_max_abs": (0.01, 9.0),
    "server.kl_mean": (1e-6, 5.0),
    "server.perplexity_ratio": (1.0, 9.0),
    "server.greedy_gap": (0.0, 9.0),
    "latency.ttft_ratio": (0.5, 4.0),
    "latency.inter_token_ratio": (0.5, 4.0),
    "latency.previous_ratio": (1.0, 4.0),
}


def _report(metric: Metric, value: float) -> Report:
    return Report(
        llmc="0", model="m", target="t", profile="p", verdict=Verdict(passed=True, checks=()),
        measurements=(measured(metric, value, "", ""),), latency=None,
    )  # fmt: skip


def test_every_metric_has_a_figure_that_is_right() -> None:
    assert list(RIGHT_AND_RUINED) == [metric.value for metric in Metric]


@pytest.mark.parametrize("metric", Metric)
def test_a_ruined_artifact_is_worse_than_a_right_one(metric: Metric) -> None:
    right, ruined = (_report(metric, float(value)) for value in RIGHT_AND_RUINED[metric.value])
    down, up = (compare_reports(*pair, {metric.value: 0.0})[0] for pair in ((right, ruined), (ruined, right)))
    assert down.regression is not None
    assert up.regression is None


@pytest.mark.parametrize("metric", Metric)
def test_noise_of_the_machine_alone_fails_no_gate(metric: Metric) -> None:
    gate = Gate(metric=metric, max=1.0, reason="a bound within the interval")
    around, beyond = (
        evaluate([gate], [measured(metric, (low + high) / 2, "", "", interval=(low, high))]).checks[0].status
        for low, high in ((0.95, 1.2), (1.05, 1.2))
    )
    is_time = metric.value.startswith("latency.")
    assert around is (CheckStatus.PASS if is_time else CheckStatus.UNDECIDED)
    assert beyond is CheckStatus.FAIL


@pytest.mark.parametrize("listed", list_targets(), ids=lambda listed: listed.document.name)
def test_gates_bound_what_is_worse(listed: object) -> None:
    for gate in listed.document.gates:  # type: ignore[attr-defined]
        assert (gate.max is None) == (gate.metric.better is Better.MORE), gate
