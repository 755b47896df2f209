"""What the types of a target refuse."""

import json

import pytest
from pydantic import ValidationError

from llmc.catalog import load_target
from llmc.config import Engine, Span, Target

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
        ("cpu-int4", {"kv_cache": "int8"}, "kv_cache requires kernels: compiled"),
        ("tensorrt-fp16", {"kernels": "compiled"}, "compiled requires backend onnxruntime and provider cpu"),
        ("cuda-fp16", {"kernels": "compiled"}, "compiled requires backend onnxruntime and provider cpu"),
        ("cpu-int4-compiled", {"kv_cache": "int4"}, "Input should be 'float32', 'float16' or 'int8'"),
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
