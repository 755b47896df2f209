"""KL divergence, agreement and perplexity against PyTorch's own functions on the same windows."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.artifact.verdict import MeasurementStatus
from llmc.config import Family, Metric
from llmc.errors import ConfigError
from llmc.runtime.ort_model import OrtModel
from llmc.validate.distribution import log_softmax
from llmc.validate.quality import cut_windows, measure_quality, plan_windows
from llmc.validate.reference import TorchModel
from llmc.validate.yardstick import FLOOR

from .decoder import Variant, write_decoder

WORSE = Variant(logits="last", max_length=64, scale_weight=("model.layers.1.mlp.down_proj.weight", 1.5))


def test_equals_pytorch_on_the_same_windows(llama: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    model = OrtModel(tmp_path, write_decoder(llama, tmp_path, WORSE), threads=1, share_buffer=False)
    made = measure_quality(model, TorchModel(llama), plan_windows(model.interface, tokens, (1,)))
    assert sorted(m.metric for m in made) == sorted(Family.TEXT.metrics)
    kl, p99, largest, top1, top5, perplexity, ratio = made
    assert ratio.status is MeasurementStatus.NOT_APPLICABLE

    # The artifact in one pass each, every position, from a graph that returns them all.
    every = Variant(**{**vars(WORSE), "logits": "all"})
    folder = tmp_path / "all"
    artifact = OrtModel(folder, write_decoder(llama, folder, every), threads=1, share_buffer=False)
    windows = torch.from_numpy(cut_windows(tokens, 63, (1,)))
    assert windows.shape == (11, 64)
    prefix = 1 + 63 // 4
    with torch.inference_mode():
        p = llama(windows).logits[:, prefix - 1 : -1].double().log_softmax(-1)
    q = torch.from_numpy(artifact.prefill(windows.numpy(), steps=0))[:, prefix - 1 : -1]
    q = q.double().log_softmax(-1)
    targets = windows[:, prefix:, None]
    each = (p.exp() * (p - q)).sum(-1).numpy()
    nll = [float(-x.gather(-1, targets).mean()) for x in (p, q)]
    assert kl.value == pytest.approx(each.mean(), rel=1e-3)
    assert p99.value == pytest.approx(np.percentile(each, 99), rel=1e-3)
    assert largest.value == pytest.approx(each.max(), rel=1e-3)
    assert kl.figures["tokens"] == 11 * (64 - prefix)
    assert kl.value > 1e-3
    assert top1.value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < top1.value < 1
    best = [x.topk(5).indices for x in (p, q)]
    shared = (best[0][..., :, None] == best[1][..., None, :]).any(-1).double().mean()
    assert top5.value == pytest.approx(float(shared))
    means = each.mean(axis=1)
    half = 2.2281 * means.std(ddof=1) / math.sqrt(11)  # Student's t of ten degrees of freedom
    assert (kl.low, kl.high) == pytest.approx((means.mean() - half, means.mean() + half), rel=1e-3)
    assert top1.low < top1.value < top1.high
    assert perplexity.low < perplexity.value < perplexity.high
    along = [v for n, v in kl.figures.items() if n.startswith("position_")]
    assert np.mean(along) == pytest.approx(kl.value, rel=1e-3)
    assert perplexity.value == pytest.approx(math.exp(nll[1] - nll[0]), rel=1e-4)
    losses = [-x.gather(-1, targets)[..., 0].numpy().ravel() for x in (p, q)]
    assert [perplexity.pairs[3][i] for i in (0, 1)] == pytest.approx([-x[3] for x in losses], abs=2e-3)
    assert 400 <= len(perplexity.pairs) <= 800
    assert perplexity.figures["perplexity_original"] == pytest.approx(math.exp(nll[0]), rel=1e-4)
    assert f"{11 * (64 - prefix)} tokens in 11 windows of 64" in kl.detail


def test_groups_of_windows_do_not_change_the_figures(
    llama: Any, tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OrtModel(tmp_path, write_decoder(llama, tmp_path, WORSE), threads=1, share_buffer=False)
    together = measure_quality(model, TorchModel(llama), plan_windows(model.interface, tokens, ()))
    per_token = sum(s.kv_heads * (s.key_width + s.value_width) for s in model.interface.cache)
    monkeypatch.setattr(
        "llmc.validate.quality.CACHE_BYTES", 4 * per_token * 64 * 3
    )  # three windows at a time
    apart = measure_quality(model, TorchModel(llama), plan_windows(model.interface, tokens, ()))
    for a, b in zip(together, apart, strict=True):
        assert a.value == (b.value if a.value is None else pytest.approx(b.value, rel=1e-4))
        assert a.detail == b.detail


def test_text_too_short(llama: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    model = OrtModel(tmp_path, write_decoder(llama, tmp_path), threads=1, share_buffer=False)
    with pytest.raises(
        ConfigError, match="20 tokens of text and 160 positions leave 4 tokens in each of 4 windows"
    ) as caught:
        plan_windows(model.interface, tokens[:20], ())
    assert caught.value.hint == "use a longer evaluation text"


def test_log_softmax_of_large_logits() -> None:
    values = log_softmax(np.array([[1e4, 1e4 - 1, -1e4]], np.float32))
    assert values.dtype == np.float32
    np.testing.assert_allclose(
        values[0, :2], [-math.log1p(math.exp(-1)), -1 - math.log1p(math.exp(-1))], rtol=1e-6
    )
    assert values[0, 2] == pytest.approx(-2e4, rel=1e-4)


def test_probabilities_of_nothing_are_told_as_1e_14(llama: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    """Logits so large that the right token has no probability left: a finite figure, and not a good one."""
    variant = Variant(logits="last", max_length=64, scale_weight=("lm_head.weight", 1e4))
    model = OrtModel(tmp_path, write_decoder(llama, tmp_path, variant), threads=1, share_buffer=False)
    made = {
        m.metric: m
        for m in measure_quality(model, TorchModel(llama), plan_windows(model.interface, tokens, ()))
    }
    assert 1e6 < made[Metric.TEXT_PERPLEXITY_RATIO].value < math.inf
    assert made[Metric.TEXT_KL_MEAN].value > 100


def test_a_yardstick_of_the_original_itself_has_its_floor(
    llama: Any, tokens: np.ndarray, tmp_path: Path
) -> None:
    original = TorchModel(llama)
    model = OrtModel(tmp_path, write_decoder(llama, tmp_path, WORSE), threads=1, share_buffer=False)
    windows = plan_windows(model.interface, tokens, ())
    made = {m.metric: m for m in measure_quality(model, original, windows, rounding=original)}
    kl, ratio = made[Metric.TEXT_KL_MEAN], made[Metric.TEXT_KL_RATIO]
    assert abs(ratio.figures["kl_rounding"]) < 1e-7
    assert ratio.value == pytest.approx(kl.value / FLOOR, rel=1e-6)  # fewer than 32 windows: all of them
