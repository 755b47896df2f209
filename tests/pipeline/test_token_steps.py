"""An artifact whose state is computed token by token: verified, served and described."""

import json
from pathlib import Path

import pytest

from llmc.backends.onnxruntime.generate import generate_tokens
from llmc.cli import main
from llmc.config import Metric
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.caches import own_cache
from tests.models import EOS, build_tiny_model, save_tiny_model

STEPS = 6
METRICS = (Metric.PREFILL_MAX_ABS, Metric.CHUNKS_MAX_ABS, Metric.DECODE_MAX_ABS, Metric.RAGGED_MAX_ABS)


def test_it_is_verified_and_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    folder = save_tiny_model("zaya", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    plan = plan_build(str(folder), target="cpu-fp32", profile="local", output=tmp_path / "out")
    found = {check.metric: check.value for check in build(plan, SilentProgress()).verdict.checks}
    for metric in (
        Metric.PREFILL_MAX_ABS,
        Metric.CHUNKS_MAX_ABS,
        Metric.DECODE_MAX_ABS,
        Metric.RAGGED_MAX_ABS,
    ):
        assert found[metric] <= 1e-4, metric

    prompt = [5, 9, 17, 40, 41]
    model = build_tiny_model("zaya")
    expected = list(prompt)
    with torch.inference_mode():
        for _ in range(STEPS):
            expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    assert generate_tokens(tmp_path / "out", prompt, STEPS) == expected[len(prompt) :]

    with pytest.raises(SystemExit):
        main(["inspect", str(folder), "--support", "--target", "cpu-fp32", "--json"])
    support = json.loads(capsys.readouterr().out)
    kinds = {kind["name"]: kind["layers"] for kind in support["captured"]}
    assert kinds["recurrence, token by token"] == [0, 1, 2]
    assert [target["refused"] for target in support["targets"]] == [None]
