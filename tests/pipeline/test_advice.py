"""What is said about an artifact that misses its gates on quality."""

import pytest

from llmc.artifact.verdict import MeasurementStatus, Verdict
from llmc.catalog import load_target
from llmc.config import Metric
from llmc.pipeline.gate.advice import advise, explain_missed, stored_bits
from llmc.validate.gates import evaluate
from llmc.validate.measure import measured, unmeasured


def judge(target: str, **figures: float) -> Verdict:
    gates = [g for g in load_target(target).gates if g.metric.value.startswith("text.")]
    found = {
        "kl_mean": 0.1,
        "kl_ratio": 0.5,
        "perplexity_ratio": 1.01,
        "top1_agreement": 1.0,
        "kl_p99": 0.0,
        "kl_max": 0.0,
        **figures,
    }
    made = [measured(Metric(f"text.{name}"), value, "4 windows", "here") for name, value in found.items()]
    return evaluate(gates, made)


@pytest.mark.parametrize(
    ("target", "kl", "advised"),
    [
        ("cpu-int4", 0.4, "cpu-mixed-4.6"),
        ("cpu-int4", 0.5, "cpu-mixed"),  # 0.5 / 4**0.6 is 0.218, and cpu-mixed-4.6 allows 0.18
        ("cpu-mixed", 0.5, "cpu-int8"),
        ("cpu-int4-compiled", 0.5, "cpu-mixed-compiled"),
        ("cpu-mixed-compiled", 0.5, "cpu-int8-compiled"),
    ],
)
def test_the_next_target_that_would_hold(target: str, kl: float, advised: str) -> None:
    advice = advise(load_target(target), judge(target, kl_mean=kl))
    assert advice is not None
    bound = next(g.max for g in load_target(advised).gates if g.metric is Metric.TEXT_KL_MEAN)
    assert advice.startswith(f"--target {advised} would pass")
    assert advice.endswith(f"and {bound:g} allowed")


@pytest.mark.parametrize("name", ["vllm-nvfp4", "gptq-int4", "modelopt-nvfp4"])
def test_a_checkpoint_is_not_exchanged_for_one_of_another_format(name: str) -> None:
    advice = advise(load_target(name), judge(name, kl_mean=0.9)) or f"--target {name}"
    advised = load_target(advice.removeprefix("--target ").partition(" ")[0])
    assert advised.platform == load_target(name).platform


def test_a_checkpoint_has_no_steps_to_bisect() -> None:
    advice = advise(load_target("vllm-w4a16"), judge("vllm-w4a16", kl_ratio=2.0))
    assert advice is not None
    assert advice.endswith("weights.snr_db in the report has the loss of each matrix")


def test_worse_than_plain_rounding_is_a_defect() -> None:
    advice = advise(load_target("cpu-int4"), judge("cpu-int4", kl_ratio=2.0))
    assert advice == "it loses more than plain rounding to the same bits: llmc bisect ARTIFACT finds the step"


def test_nothing_is_advised_where_nothing_is_known() -> None:
    target = load_target("cpu-int8")
    assert advise(target, judge("cpu-int8", kl_mean=0.001)) is None
    assert advise(target, judge("cpu-int8", kl_mean=1e9)) is None  # not even floats would hold
    other = measured(Metric.INTERFACE, 1.0, "", "")
    gates = [g for g in target.gates if g.metric is Metric.INTERFACE]
    assert advise(target, evaluate(gates, [other])) is None


@pytest.mark.parametrize(
    ("metric", "advised"),
    [
        (Metric.FILES, "its files differ from those that were built: build the artifact again"),
        (Metric.SERVING, None),
    ],
)
def test_what_was_not_measured_is_not_advised_on(metric: Metric, advised: str | None) -> None:
    target = load_target("cpu-int4")
    left = [g.metric for g in target.gates if g.metric is not metric]
    found = [unmeasured(m, MeasurementStatus.NOT_MEASURED, "missed before", "nowhere") for m in left]
    verdict = evaluate(target.gates, [measured(metric, 1.0, "", "here"), *found])
    assert Metric.TEXT_KL_RATIO in {check.metric for check in verdict.missed}
    assert advise(target, verdict) == advised


def test_a_missed_gate_says_how_it_was_measured_and_why_it_is_there() -> None:
    (line,) = explain_missed(judge("cpu-int4", kl_ratio=2.0).missed)
    assert line.startswith("text.kl_ratio: 4 windows; the bound: the KL divergence of the artifact")


def test_bits_of_every_kind_of_target() -> None:
    found = {n: stored_bits(load_target(n)) for n in ("cpu-fp32", "cpu-int8", "cpu-mixed", "tensorrt-int4")}
    assert found == {"cpu-fp32": 16.0, "cpu-int8": 8.0, "cpu-mixed": 5.2, "tensorrt-int4": 4.0}
