"""Whole tiny models with attention of unusual kinds, built for compiled kernels under all gates."""

from pathlib import Path

import pytest

from llmc.pipeline import build
from llmc.pipeline.result import BuildResult
from llmc.plan import plan_build
from llmc.progress import Progress, SilentProgress
from tests.models import EOS, save_tiny_model
from tests.notes import Notes


def built(
    folder: Path, model_type: str, target: str, progress: Progress | None = None, **overrides: int
) -> BuildResult:
    model = save_tiny_model(model_type, folder / "model", tokenizer=True, eos_token_id=EOS, **overrides)
    plan = plan_build(str(model), target=target, profile="local", output=folder / "out")
    result = build(plan, progress or SilentProgress())
    assert result.failure() is None, result.render()
    return result


def cache_types(result: BuildResult) -> set[str]:
    names = {name for slot in result.manifest.interface.cache for name in slot.names}
    return {spec.dtype for spec in result.manifest.interface.inputs if spec.name in names}


@pytest.mark.parametrize("target", ["cpu-int4-compiled", "cpu-int8-compiled"])
def test_sinks(target: str, tmp_path: Path) -> None:
    """Every expert is chosen, since rounding that turns a choice tells nothing about attention."""
    result = built(tmp_path, "gpt_oss", target, num_local_experts=2, num_experts_per_tok=2)
    assert cache_types(result) == {"float16"}
    assert result.manifest.kernels is not None
    assert "GroupQueryAttention" not in {each.operator for each in result.manifest.kernels.outside}


def test_attention_in_plain_operators(tmp_path: Path) -> None:
    result = built(tmp_path, "mpt", "cpu-int4-compiled", progress := Notes())
    assert cache_types(result) == {"float32"}
    assert any("the KV cache stays in float32, not float16" in note for note in progress.notes)
