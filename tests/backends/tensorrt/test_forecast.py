"""A forecast worked out by hand."""

import pytest

from llmc.artifact.manifest import WeightRecord
from llmc.backends.tensorrt.forecast import forecast
from llmc.config import Engine, EngineRule, EngineScheme, Span, WeightFormat, WeightRole
from llmc.graph.interface import CacheSlot, Interface, TensorSpec
from llmc.profile import Profile, ProfileKind, Throughput

INTERFACE = Interface(
    inputs=(
        TensorSpec(name="k", dtype="float16", shape=("batch", 2, 100, 8)),
        TensorSpec(name="v", dtype="float16", shape=("batch", 2, 100, 4)),
    ),
    outputs=(),
    cache=(
        CacheSlot(
            layer=0,
            past_key="k",
            past_value="v",
            present_key="K",
            present_value="V",
            kv_heads=2,
            key_width=8,
            value_width=4,
            window=None,
        ),
    ),
    logits="last",
    position_ids=False,
    padding="right",
    max_length=100,
)
ENGINE = Engine(
    kv_capacity=100, batch=Span(least=1, typical=1, most=1), prefill=Span(least=1, typical=10, most=100)
)


def _weight(role: WeightRole, size: int) -> WeightRecord:
    return WeightRecord(
        name=role.value, role=role, shape=(1000, 1000), bits=8, block_size=None, symmetric=True, bytes=size
    )


def _profile(**facts: object) -> Profile:
    sources = dict.fromkeys((*facts, "dense"), "its maker")
    return Profile(
        schema_version=1, name="mine", kind=ProfileKind.GPU, device="a GPU", sources=sources, **facts
    )


def test_bounds() -> None:
    weights = (_weight(WeightRole.LINEAR, 1_000_000), _weight(WeightRole.EMBEDDING, 500_000))
    profile = _profile(memory_gib=0.002, bandwidth_gbs=1.0, dense=Throughput(fp16=1.0))
    found = forecast(INTERFACE, weights, ENGINE, profile, scratch_bytes=100_000)
    assert found.weight_bytes == 1_000_000
    assert found.kv_bytes == 2 * (8 + 4) * 2
    assert found.largest_batch == 400_000 // 4800
    assert found.largest_context == 400_000 // 48
    assert found.tokens_per_s == pytest.approx(1e9 / 1_004_800)
    assert found.ttft_ms == pytest.approx(1.0)  # weights: 1 ms; 2e7 operations: 0.02 ms
    assert "forecast for mine, not measured: at most 995 tokens/s" in found.render()


@pytest.mark.parametrize(
    ("dense", "wanted"),
    [
        (Throughput(fp16=1.0, fp8=4.0), 5.0),  # 2e10 operations at 4 TFLOP/s
        (Throughput(fp16=8.0, fp8=4.0), 2.5),  # the head is in float16, and no product faster than that
        (Throughput(fp16=1.0), None),  # what fp8 takes is not stated
    ],
)
def test_a_bound_on_prefill_takes_the_fastest_type_of_a_product(
    dense: Throughput, wanted: float | None
) -> None:
    rules = (
        EngineRule(role=WeightRole.LM_HEAD, scheme=None),
        EngineRule(scheme=EngineScheme(format=WeightFormat.FP8, activations="static")),
    )
    engine = ENGINE.model_copy(
        update={"weights": rules, "prefill": Span(least=1, typical=10_000, most=10_000)}
    )
    weights = (_weight(WeightRole.LINEAR, 1_000_000),)
    profile = _profile(memory_gib=1.0, bandwidth_gbs=1000.0, dense=dense)
    found = forecast(INTERFACE, weights, engine, profile, scratch_bytes=0)
    assert found.ttft_ms == (None if wanted is None else pytest.approx(wanted))


def test_facts_that_a_profile_does_not_state_are_not_made_up() -> None:
    found = forecast(INTERFACE, (_weight(WeightRole.LINEAR, 9),), ENGINE, _profile(), scratch_bytes=0)
    assert (found.largest_batch, found.largest_context, found.tokens_per_s, found.ttft_ms) == (None,) * 4
