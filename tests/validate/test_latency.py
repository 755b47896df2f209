"""Structure and counts of a latency run, its arithmetic, and each side's memory in its own process."""

import os
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.arrays import Array
from llmc.artifact.latency import Latency, Ratio
from llmc.artifact.verdict import MeasurementStatus
from llmc.config import Dtype, Gate, Metric
from llmc.errors import ResourceError
from llmc.profile import Profile
from llmc.runtime.failures import MEMORY_HINT
from llmc.runtime.ort_model import OrtModel
from llmc.runtime.static_ort_model import StaticOrtModel
from llmc.validate.footprint import ArtifactJob, OriginalJob, resident_bytes, take_sample
from llmc.validate.gates import evaluate
from llmc.validate.latency import Schedule, Timed, _fastest, measure_latency
from llmc.validate.ratios import ratios
from llmc.validate.reference import TorchModel
from llmc.validate.roofline import kv_bytes, roofline, streamed_weight_bytes
from llmc.validate.series import noise, ratio, timing
from tests.lowering import tiny, write_lowered

from .conftest import build
from .decoder import Variant, timed_graph, write_decoder

PROFILE = Profile(
    schema_version=1, name="here", kind="cpu", device="a test", bandwidth_gbs=10.0,
    sources={"bandwidth_gbs": "made up"},
)  # fmt: skip
SMALL = Schedule(
    prompts=(8, 24, 150, 1024), contexts=(24, 150), prefill_rounds=2, decode_rounds=3, decode_tokens=12,
    footprint_rounds=1, batches=(1, 3), batch_rounds=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def timed(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Latency, Path, Any]:
    folder = tmp_path_factory.mktemp("artifact")
    interface = write_decoder(llama, folder, Variant(logits="last"))
    latency = measure_latency(
        timed_graph(folder, interface), TorchModel(llama), partial(build, "LlamaConfig"),
        tokens=np.array([5, 6, 7]), profile=PROFILE, threads=1, schedule=SMALL, counters=folder / "absent",
    )  # fmt: skip
    return latency, folder, interface


def test_counts(timed: tuple[Latency, Path, Any]) -> None:
    latency, _, _ = timed
    assert [p.prompt_tokens for p in latency.prefill] == [8, 24, 150]
    assert [d.context for d in latency.decode] == [24]
    assert all(p.artifact.n == p.original.n == 2 for p in latency.prefill)
    assert all(d.artifact.n == d.original.n == 36 for d in latency.decode)
    assert latency.dropped == (
        "prompt of 1024 tokens: the model ends at 160 positions",
        "decode at context 150: the model ends at 160 positions",
    )
    assert latency.energy == "not measured: this machine has no energy counter; GPU: not used"
    assert {d.artifact_joules_per_token for d in latency.decode} == {None}
    assert latency.original.startswith("torch ")
    assert latency.original.endswith("float32 sdpa, dynamic cache")
    for entry in (*latency.prefill, *latency.decode):
        assert entry.ratio.low <= entry.ratio.high
        for side in (entry.artifact, entry.original):
            assert 0 < side.min_ms <= side.p50_ms <= side.p95_ms <= side.p99_ms <= side.max_ms


class Slow(OrtModel):
    """A session that takes 30 ms more for each step."""

    def next_tokens(self, tokens: np.ndarray) -> np.ndarray:
        time.sleep(0.03)
        return super().next_tokens(tokens)


def test_the_fastest_way_to_run_a_step_is_measured(timed: tuple[Latency, Path, Any]) -> None:
    _, folder, interface = timed
    quick, slow = (
        partial(kind, folder, interface, threads=1, share_buffer=False) for kind in (OrtModel, Slow)
    )
    few = Schedule(decode_rounds=1, decode_tokens=3)
    for first, other in ((quick, slow), (slow, quick)):
        subject = replace(timed_graph(folder, interface), open=first, others=(other,))
        opener, ways = _fastest(subject, np.array([5, 6, 7]), (24,), few)
        assert opener is quick
        times = [way.step.p50_ms for way in ways]
        assert (times[0] < times[1]) is (first is quick)
        assert [(way.context, way.step.n) for way in ways] == [(24, 3)] * 2


def test_rates_lie_within_the_times(timed: tuple[Latency, Path, Any]) -> None:
    latency, _, _ = timed
    entries = [(p, p.prompt_tokens) for p in latency.prefill] + [(d, 1) for d in latency.decode]
    for entry, tokens in entries:
        for rate, side in (
            (entry.artifact_tokens_per_s, entry.artifact),
            (entry.original_tokens_per_s, entry.original),
        ):
            assert 1e3 * tokens / side.max_ms <= rate <= 1e3 * tokens / side.min_ms


def test_rows_of_a_batch_are_what_each_is_alone(llama: Any) -> None:
    model = TorchModel(llama)
    rows = np.array([[5, 9, 33], [7, 8, 2]])
    alone = []
    for row in rows:
        first = model.prefill(row)
        alone.append((first, model.decode(first)))
    together = model.prefill_rows(rows)
    assert list(zip(together.tolist(), model.decode_rows(together).tolist(), strict=True)) == alone


def test_batches_and_operators(timed: tuple[Latency, Path, Any]) -> None:
    latency, folder, _ = timed
    assert [(b.batch, b.context) for b in latency.batches] == [(1, 24), (3, 24)]
    for batch in latency.batches:
        assert batch.artifact.n == batch.original.n == 24
        assert batch.ttft.n == batch.ttft_original.n == 2
        assert batch.ttft.min_ms > 0
        assert batch.ttft_original.min_ms > 0
        assert batch.ratio.low <= batch.ratio.high
        for rate, side in (
            (batch.tokens_per_s, batch.artifact),
            (batch.original_tokens_per_s, batch.original),
        ):
            assert 1e3 * batch.batch / side.max_ms <= rate <= 1e3 * batch.batch / side.min_ms
    import onnx

    counted = Counter(n.op_type for n in onnx.load(folder / "model.onnx").graph.node)
    found = {o.name: o.calls for o in latency.operators}
    assert found["MatMul"] <= counted["MatMul"]
    assert found["Softmax"] == counted["Softmax"]
    assert [o.ms for o in latency.operators] == sorted((o.ms for o in latency.operators), reverse=True)
    assert not list(Path.cwd().glob("onnxruntime_profile*"))


def test_a_cache_of_fixed_length_is_timed_as_an_engine_is(tmp_path: Path) -> None:
    interface = write_lowered(tmp_path, "llama", Dtype.FLOAT32)
    static = Timed(
        partial(StaticOrtModel, tmp_path, interface, threads=1), "onnxruntime", interface, 1000, rows=2
    )
    latency = measure_latency(
        static, TorchModel(tiny("llama")), partial(build, "LlamaConfig"), tokens=np.array([5, 6, 7]),
        profile=PROFILE, threads=1, schedule=SMALL, counters=tmp_path / "absent",
    )  # fmt: skip
    assert ([p.prompt_tokens for p in latency.prefill], [d.context for d in latency.decode]) == (
        [8, 24],
        [24],
    )
    assert [b.batch for b in latency.batches] == [1]  # three rows are more than it takes
    assert latency.operators == ()  # the profiler is ONNX Runtime's, of its own sessions
    assert latency.roofline[0].weight_bytes == 1000
    assert latency.artifact_footprint.load.p50_ms > 0


class RoomForOneRow(OrtModel):
    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        if len(input_ids) > 1:
            raise ResourceError("out of memory: for 3 rows")
        return super().prefill(input_ids, mask, steps=steps)


def test_a_batch_without_memory_ends_the_batches_alone(llama: Any, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path, Variant(logits="last"))
    model = partial(RoomForOneRow, tmp_path, interface, threads=1, share_buffer=False)
    latency = measure_latency(
        replace(timed_graph(tmp_path, interface), open=model), TorchModel(llama),
        partial(build, "LlamaConfig"), tokens=np.array([5, 6, 7]), profile=PROFILE, threads=1,
        schedule=replace(SMALL, prompts=(8,), contexts=(8,)), counters=tmp_path / "absent",
    )  # fmt: skip
    assert [b.batch for b in latency.batches] == [1]
    assert latency.dropped == ("batches from 3 rows on: out of memory: for 3 rows",)


def test_footprints_are_of_separate_processes(timed: tuple[Latency, Path, Any]) -> None:
    latency, _, _ = timed
    artifact, original = latency.artifact_footprint, latency.original_footprint
    assert (artifact.load.n, original.load.n) == (1, 1)
    assert (artifact.prompt_tokens, artifact.decoded_tokens) == (150, 10)
    # The artifact's process never imports torch, the original's does.
    assert 20 << 20 < artifact.peak_bytes < original.peak_bytes
    for side in (artifact, original):
        assert 20 << 20 < side.steady_bytes <= side.peak_bytes


def test_ratios(timed: tuple[Latency, Path, Any]) -> None:
    latency, _, _ = timed
    ttft, inter_token = ratios(latency)
    assert (ttft.metric, inter_token.metric) == (Metric.TTFT_RATIO, Metric.INTER_TOKEN_RATIO)
    assert ttft.figures.keys() == {"prompt_8", "prompt_24", "prompt_150"}
    assert ttft.value == max(p.ratio.value for p in latency.prefill)
    assert inter_token.figures == {"context_24": latency.decode[0].ratio.value}
    nothing = latency.model_copy(update={"prefill": (), "decode": ()})
    assert [m.status for m in ratios(nothing)] == [MeasurementStatus.NOT_MEASURED] * 2


def test_roofline(timed: tuple[Latency, Path, Any], llama: Any) -> None:
    latency, folder, interface = timed
    (roof,) = latency.roofline
    # 2 layers x (keys + values) x 24 positions x 2 heads x 16 x 4 bytes
    assert roof.kv_bytes == 2 * 2 * 24 * 2 * 16 * 4
    assert roof.bound_ms == pytest.approx((roof.weight_bytes + roof.kv_bytes) / 10e9 * 1e3)
    assert roof.fraction == pytest.approx(roof.bound_ms / latency.decode[0].artifact.p50_ms)
    matrices = sum(p.numel() * 4 for n, p in llama.named_parameters() if "embed_tokens" not in n)
    assert matrices <= roof.weight_bytes < matrices + 2048
    assert roof.weight_bytes == streamed_weight_bytes(folder)
    unstated = PROFILE.model_copy(update={"bandwidth_gbs": None})
    blind = roofline(roof.weight_bytes, interface, 24, unstated, 1.0)
    assert (blind.bandwidth_gbs, blind.bound_ms, blind.fraction) == (None, None, None)


def test_kv_bytes_end_at_the_window(mistral: Any, tmp_path: Path) -> None:
    interface = write_decoder(mistral, tmp_path)
    assert kv_bytes(interface, 5) * 8 == kv_bytes(interface, 8) * 5
    assert kv_bytes(interface, 8) == kv_bytes(interface, 1000)


def test_ratio_is_of_all_samples_and_ranges_over_rounds() -> None:
    made = ratio([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]])
    assert (made.value, made.low, made.high) == (1.0, 0.5, 1.5)


def test_noise_is_what_two_series_of_one_thing_may_differ_by() -> None:
    random = np.random.default_rng(0)

    def series(rounds: int) -> list[list[float]]:
        return (10 * np.exp(random.normal(0, 0.05, (rounds, 8)))).tolist()

    found = [noise(series(8), series(8)) for _ in range(20)]
    assert all(0 < value < 0.1 for value in found)
    # More rounds know better; two rounds tell their worst.
    assert np.mean([noise(series(64), series(64)) for _ in range(20)]) < 0.5 * np.mean(found)
    assert noise([[1.0], [1.2]], [[1.0], [1.0]]) == pytest.approx(0.2)


def test_a_gate_fails_only_past_the_noise(timed: tuple[Latency, Path, Any]) -> None:
    latency, _, _ = timed
    gate = Gate(metric=Metric.INTER_TOKEN_RATIO, max=1.0, reason="not slower than the original")

    def passed(value: float, unsure: float) -> bool:
        spread = Ratio(value=value, low=value, high=value)
        entry = latency.decode[0].model_copy(update={"ratio": spread, "noise": unsure})
        return evaluate([gate], ratios(latency.model_copy(update={"decode": (entry,)}))).passed

    assert passed(0.99, 0.05)
    assert passed(1.04, 0.05)
    assert not passed(1.06, 0.05)
    assert not passed(1.1, 0.0)


def test_timing() -> None:
    made = timing([float(x) for x in range(101)])
    assert (made.n, made.p50_ms, made.p95_ms, made.p99_ms, made.min_ms, made.max_ms) == (
        101,
        50,
        95,
        99,
        0,
        100,
    )


def test_a_process_that_fails_says_why(llama: Any, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path / "model")
    gone = partial(OrtModel, tmp_path, interface, threads=1, share_buffer=False)
    with pytest.raises(ResourceError, match=r"memory of the artifact ended with 1: .*has no model\.onnx"):
        take_sample(ArtifactJob(gone, "onnxruntime", 4, 1))
    with pytest.raises(ResourceError, match="memory of the original ended with 9: no message"):
        take_sample(OriginalJob(partial(os._exit, 9), 1, 4, 1))
    full = partial(exec, "raise RuntimeError('CUDA out of memory')")
    with pytest.raises(ResourceError, match="original ended with 1: RuntimeError: CUDA out of") as raised:
        take_sample(OriginalJob(full, 1, 4, 1))
    assert raised.value.hint == MEMORY_HINT


def test_peak_is_not_inherited_from_a_large_parent(llama: Any, tmp_path: Path) -> None:
    block = np.ones(400 << 17)  # 400 MiB
    interface = write_decoder(llama, tmp_path)
    sample = take_sample(ArtifactJob(timed_graph(tmp_path, interface).open, "onnxruntime", 4, 1))
    here = resident_bytes()[0]
    assert here is not None
    assert here > 400 << 20 > sample.peak_bytes
    assert block.all()


def test_peak_is_of_memory_that_was_touched() -> None:
    before = resident_bytes()[0]
    reserved = np.empty(1 << 30, np.uint8)
    after = resident_bytes()[0]
    assert before is not None
    assert after is not None
    assert after - before < 64 << 20
    assert reserved.nbytes == 1 << 30
