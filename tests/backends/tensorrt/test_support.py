"""Which engines a request comes to, and what is refused before anything is built."""

import pytest

from llmc.backends.tensorrt.support import Library, plan_engines
from llmc.catalog import list_targets, load_profile, load_target
from llmc.config import EngineRule, EngineScheme, Target, WeightFormat
from llmc.errors import ConfigError, UnsupportedError
from llmc.profile import Profile, ProfileKind

KNOWN = [listed.document for listed in list_targets()]


def _plans(target: str, *profiles: str) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    plans = plan_engines(load_target(target), [load_profile(p) for p in profiles], KNOWN)
    return [(p.library.value, p.sms, p.profiles) for p in plans]


def test_one_engine_serves_every_capability_that_can_share_it() -> None:
    assert _plans("tensorrt-int4", "rtx-5090", "l4", "rtx-4090") == [
        ("tensorrt_rtx", ("SM89", "SM120"), ("rtx-5090", "l4", "rtx-4090"))
    ]


def test_turing_and_what_tensorrt_rtx_has_no_kernels_for_stand_alone() -> None:
    assert _plans("tensorrt-fp16", "t4", "a10", "h100-sxm", "h200", "b200") == [
        ("tensorrt_rtx", ("SM75",), ("t4",)),
        ("tensorrt_rtx", ("SM86",), ("a10",)),
        ("tensorrt", ("SM90",), ("h100-sxm", "h200")),
        ("tensorrt", ("SM100",), ("b200",)),
    ]


def test_names_of_files() -> None:
    plan = plan_engines(load_target("tensorrt-fp16"), [load_profile("a10"), load_profile("l4")], KNOWN)[0]
    assert plan.library is Library.RTX
    assert plan.name == "sm86-sm89.engine"


def test_a_precision_that_the_gpu_lacks_is_refused_with_what_works() -> None:
    message = (
        r"needs int8, which NVIDIA T4 \(profile t4, compute capability 7.5\) does not support; 8.0, 8.6, "
    )
    with pytest.raises(UnsupportedError, match=message) as caught:
        _plans("tensorrt-int4", "rtx-4090", "t4")
    assert caught.value.hint == "for t4 use tensorrt-fp16"


def test_bfloat16_is_refused_on_turing() -> None:
    with pytest.raises(
        UnsupportedError, match=r"needs bfloat16, which NVIDIA T4 .* does not support; 8.0"
    ) as caught:
        _plans("tensorrt-bf16", "t4")
    assert caught.value.hint == "for t4 use tensorrt-fp16"


def test_fp8_is_refused_on_ampere() -> None:
    rule = EngineRule(scheme=EngineScheme(format=WeightFormat.FP8))
    target = load_target("tensorrt-int8")
    assert target.engine is not None
    fp8 = target.model_copy(update={"engine": target.engine.model_copy(update={"weights": (rule,)})})
    with pytest.raises(
        UnsupportedError, match=r"needs fp8, .*compute capability 8.6\) does not support; 8.9"
    ):
        plan_engines(fp8, [load_profile("rtx-3090")], KNOWN)
    assert plan_engines(fp8, [load_profile("l4")], KNOWN)[0].sms == ("SM89",)


def _profile(capability: str | None) -> Profile:
    return Profile(
        schema_version=1,
        name="mine",
        kind=ProfileKind.GPU,
        device="a device",
        compute_capability=capability,
        sources={"compute_capability": "its maker"},
    )


def test_a_profile_needs_a_capability_that_engines_exist_for() -> None:
    target: Target = load_target("tensorrt-fp16")
    with pytest.raises(ConfigError, match="profile mine states no compute capability"):
        plan_engines(target, [_profile(None)], KNOWN)
    message = r"no TensorRT builds engines for a device \(compute capability 6.1\)"
    with pytest.raises(UnsupportedError, match=message) as caught:
        plan_engines(target, [_profile("6.1")], KNOWN)
    assert "7.5, 8.0, 8.6, 8.9, 9.0" in str(caught.value.hint)
