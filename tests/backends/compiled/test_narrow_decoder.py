"""A whole tiny decoder over an int8 KV cache: its interface, onnxruntime-genai, and what the gate sees."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from llmc.artifact.store.folder import open_artifact
from llmc.artifact.verdict import Measurement
from llmc.backends.onnxruntime.generate import generate_tokens
from llmc.config import CacheType, Metric
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.runtime.ort_model import OrtModel
from llmc.validate.drawing import CACHE_STEPS
from llmc.validate.served_attention import measure_cache
from tests.backends.compiled.graphs import Array
from tests.models import EOS, VOCAB_SIZE, save_tiny_model
from tests.validate.levels import plan_of

CACHES = (CacheType.FLOAT32, CacheType.INT8)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model over a float32 and over an int8 cache."""
    folder = tmp_path_factory.mktemp("narrow")
    model = str(save_tiny_model("llama", folder / "model", tokenizer=True, eos_token_id=EOS))
    for cache in CACHES:
        plan = plan_build(
            model, target="cpu-int4-compiled", profile="local", output=folder / cache.value, verify=False
        )
        target = plan.target.model_copy(update={"kv_cache": cache})
        build(plan.model_copy(update={"target": target}), SilentProgress())
    return folder / CACHES[0].value, folder / CACHES[1].value


def opened(path: Path, *, threads: int = 1, share: bool = True) -> OrtModel:
    return OrtModel(path, open_artifact(path).manifest.interface, threads=threads, share_buffer=share)


def logits(model: OrtModel) -> Array:
    rng = np.random.default_rng(3)
    found = [model.prefill(rng.integers(0, VOCAB_SIZE, (1, 70)), steps=8)]
    found += [model.decode(rng.integers(0, VOCAB_SIZE, (1, 1))) for _ in range(8)]
    return np.concatenate(found, axis=1)


def test_the_interface_says_what_a_row_is(artifacts: tuple[Path, Path]) -> None:
    wide, narrow = (open_artifact(path).manifest.interface for path in artifacts)
    for before, after in zip(wide.cache, narrow.cache, strict=True):
        assert (after.key_width, after.value_width) == (before.key_width + 4, before.value_width + 4)
    caches = [spec for spec in (*narrow.inputs, *narrow.outputs) if "." in spec.name]
    assert len(caches) == 4 * len(narrow.cache)
    assert {(spec.dtype, spec.shape[-1]) for spec in caches} == {("int8", narrow.cache[0].key_width)}
    config = json.loads((artifacts[1] / "genai_config.json").read_text())
    assert config["model"]["decoder"]["head_size"] == narrow.cache[0].key_width


def test_onnxruntime_genai_serves_it(artifacts: tuple[Path, Path]) -> None:
    found = generate_tokens(artifacts[1], [5, 9, 33], 8)
    model = opened(artifacts[1])
    token, expected = int(model.prefill(np.array([[5, 9, 33]]), steps=8)[0, -1].argmax()), []
    while len(expected) < 8 and token != EOS:
        expected.append(token)
        token = int(model.decode(np.array([[token]]))[0, -1].argmax())
    assert found == expected


def test_threads_and_buffers_do_not_change_a_bit(artifacts: tuple[Path, Path]) -> None:
    alone = logits(opened(artifacts[1]))
    for threads, share in ((2, True), (5, True), (2, False)):
        np.testing.assert_array_equal(logits(opened(artifacts[1], threads=threads, share=share)), alone)
    wide = logits(opened(artifacts[0]))
    assert 0 < np.linalg.norm(alone - wide) < 0.1 * np.linalg.norm(wide)


@dataclass(frozen=True)
class Served:
    """The same weights and kernels over a float32 cache, in the place of the original."""

    model: OrtModel
    window: int | None = None

    def logits_at(self, input_ids: Array, positions: Array, *, pieces: Sequence[int] = ()) -> Array:
        self.model.prefill(input_ids[None, :1], steps=len(input_ids))
        made = [self.model.decode(x.reshape(1, 1))[0, 0] for x in input_ids[1:]]
        return np.stack([made[at - 1] for at in positions])


class Forgetful(OrtModel):
    """Loses the oldest half of the first layer's keys and values after a prompt."""

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        found = super().prefill(input_ids, mask, steps=steps)
        for value in self._cache[:2]:
            rows = value.numpy().copy()
            rows[:, :, : input_ids.shape[1] // 2] = 0
            value.update_inplace(rows)
        return found


def cache_loss(model: OrtModel, wide: Path) -> dict[Metric, Measurement]:
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 300)
    plan = plan_of(model.interface, tokens)
    return {m.metric: m for m in measure_cache(model, Served(opened(wide)), plan)}  # type: ignore[arg-type]


def test_what_the_cache_loses_is_measured(artifacts: tuple[Path, Path]) -> None:
    wide, narrow = artifacts
    interface = open_artifact(narrow).manifest.interface
    right = cache_loss(opened(narrow), wide)
    wrong = cache_loss(Forgetful(narrow, interface, threads=1, share_buffer=True), wide)
    assert set(right) == {Metric.CACHE_KL_MEAN, Metric.CACHE_KL_MAX}
    mean, most = (right[m].value or 0 for m in right)
    assert 0 < mean < most < 0.1
    assert (
        f"{CACHE_STEPS} steps after {(interface.max_length or 0) - CACHE_STEPS} tokens"
        in right[Metric.CACHE_KL_MEAN].detail
    )
    assert (wrong[Metric.CACHE_KL_MEAN].value or 0) > 5 * mean


def test_only_a_narrow_cache_has_the_level(artifacts: tuple[Path, Path]) -> None:
    tokens = np.arange(2, 60)
    for path, expected in zip(artifacts, (False, True), strict=True):
        assert (plan_of(opened(path).interface, tokens).cache_steps > 0) is expected
