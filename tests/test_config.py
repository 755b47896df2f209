"""What the types of a target refuse."""

import json

import pytest
from pydantic import ValidationError

from llmc.catalog import load_target
from llmc.config import Engine, EngineRule, EngineScheme, Span, Target

ONE = Span(least=1, typical=1, most=1)


def test_ranges_ascend() -> None:
    with pytest.raises(ValidationError, match="least 4, typical 1 and most 4 must be in ascending order"):
        Span(least=4, typical=1, most=4)


def test_a_prompt_fits_the_cache() -> None:
    with pytest.raises(ValidationError, match="prefill of 65 tokens does not fit kv_capacity 64"):
        Engine(kv_capacity=64, batch=ONE, prefill=Span(least=1, typical=1, most=65))


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        (
            "tensorrt-fp16",
            {"engine": None},
            "engine requires backend tensorrt, and backend tensorrt requires engine",
        ),
        ("tensorrt-fp16", {"provider": "cpu"}, "backend tensorrt needs provider cuda"),
        ("cpu-int4", {"backend": "tensorrt", "provider": "cuda"}, "engine requires backend tensorrt"),
        ("cuda-fp16", {"dtype": "bfloat16"}, "bfloat16 requires backend tensorrt"),
        ("cpu-int4", {"kv_cache": "int8"}, "kv_cache requires kernels: compiled or backend"),
        ("cpu-int4-compiled", {"kv_cache": "fp8"}, "in float32, float16 or int8, not fp8"),
        ("tensorrt-fp16", {"kernels": "compiled"}, "compiled requires backend onnxruntime and provider cpu"),
        ("cuda-fp16", {"kernels": "compiled"}, "compiled requires backend onnxruntime and provider cpu"),
        ("cpu-int4-compiled", {"kv_cache": "int4"}, "Input should be 'float32', 'float16', 'int8' or 'fp8'"),
        ("tensorrt-fp16", {"backend": "onnxruntime"}, "engine requires backend tensorrt"),
        (
            "tensorrt-fp16",
            {"quantize": {"accuracy_level": 0, "rules": []}},
            "takes its formats from engine.weights; quantize must be null",
        ),
        ("cpu-int4", {"lookup": 7}, "lookup requires backend onnxruntime and logits of all tokens"),
        ("tensorrt-fp16", {"lookup": 7, "logits": "all"}, "lookup requires backend onnxruntime"),
    ],
)
def test_backends_and_their_fields(target: str, changes: dict[str, object], message: str) -> None:
    fields = load_target(target).model_dump(mode="json")
    with pytest.raises(ValidationError, match=message):
        Target.model_validate_json(json.dumps({**fields, **changes}))


TEXT = {"window_tokens": 64, "max_windows": 1}
RULE = {"bits": 4, "block_size": 128, "symmetric": True, "method": "rtn"}
BLOCKS = {"accuracy_level": 0, "scales": "bfloat16", "rules": [{"scheme": RULE}]}
W8A8 = {"scheme": {"format": "int8", "activations": "dynamic"}}


def checkpoint_target(**changes: object) -> Target:
    """A target for servers, with some fields changed."""
    fields = load_target("cpu-fp32").model_dump(mode="json")
    own = {"backend": "checkpoint", "logits": "all", "checkpoint": {"format": "compressed-tensors"}}
    return Target.model_validate_json(json.dumps({**fields, **own, "quantize": BLOCKS, **changes}))


def test_a_checkpoint_runs_on_either_hardware() -> None:
    assert checkpoint_target().hardware is None
    weights = {"format": "compressed-tensors", "weights": [W8A8]}
    dynamic = checkpoint_target(quantize=None, checkpoint=weights)
    assert dynamic.checkpoint is not None
    assert dynamic.checkpoint.calibration is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": None}, "backend checkpoint requires a section checkpoint"),
        ({"backend": "onnxruntime"}, "checkpoint requires backend checkpoint"),
        ({"quantize": None}, "give exactly one of quantize and checkpoint.weights"),
        ({"checkpoint": {"format": "gptq", "weights": [W8A8]}}, "give exactly one of quantize and"),
        ({"quantize": {**BLOCKS, "scales": "activations"}}, "requires scales bfloat16 or float16"),
        ({"dtype": "float16"}, "requires dtype float32 and logits all"),
        ({"checkpoint": {"format": "exl2"}}, "Input should be 'compressed-tensors', 'gptq', 'awq' or"),
        ({"kv_cache": "int8"}, "servers have a KV cache in fp8 or in the type of activations, not in int8"),
        ({"kv_cache": "fp8"}, "needs a calibration text: state checkpoint.calibration"),
        ({"kv_cache": "fp8", "checkpoint": {"format": "gptq"}}, "format gptq has no scales of a KV cache"),
        ({"kv_cache": "fp8", "checkpoint": {"format": "awq"}}, "format awq has no scales of a KV cache"),
        ({"checkpoint": {"format": "gptq", "calibration": TEXT}}, "calibration is for rules that quantize"),
    ],
)
def test_a_checkpoint_and_its_fields(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        checkpoint_target(**changes)


def test_the_text_of_a_cache_is_that_of_the_section_or_of_the_weights() -> None:
    stated = checkpoint_target(kv_cache="fp8", checkpoint={"format": "modelopt", "calibration": TEXT})
    gptq = [{"scheme": {"bits": 4, "block_size": 32, "symmetric": True, "method": "gptq"}}]
    rules = {**BLOCKS, "rules": gptq, "calibration": TEXT}
    for target in (stated, checkpoint_target(kv_cache="fp8", quantize=rules)):
        assert target.cache_text is not None
        assert target.cache_text.model_dump() == TEXT
    assert checkpoint_target().cache_text is None
    assert load_target("cpu-int4-compiled-kv8").cache_text is None


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_tensorrt_scales_no_activations_by_token(kind: str) -> None:
    scheme = EngineScheme.model_validate({"format": kind, "activations": "dynamic"})
    with pytest.raises(ValidationError, match=f"TensorRT scales activations in {kind} by calibration text"):
        Engine(kv_capacity=64, batch=ONE, prefill=ONE, weights=(EngineRule(scheme=scheme),))


def test_a_scale_for_a_whole_tensor_is_for_checkpoints_in_fp8() -> None:
    with pytest.raises(ValidationError, match="a scale per tensor is for fp8, not int8"):
        EngineScheme.model_validate({"format": "int8", "scale_per": "tensor"})
    rule = EngineRule(scheme=EngineScheme.model_validate({"format": "fp8", "scale_per": "tensor"}))
    with pytest.raises(ValidationError, match="an engine has a scale of fp8 per output feature"):
        Engine(kv_capacity=64, batch=ONE, prefill=ONE, weights=(rule,))


def test_scales_in_bfloat16_are_for_checkpoints() -> None:
    with pytest.raises(ValidationError, match="scales in bfloat16 require backend checkpoint"):
        checkpoint_target(backend="onnxruntime", checkpoint=None)
