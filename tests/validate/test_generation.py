"""Greedy text through onnxruntime-genai against PyTorch's generate, and every metric on one folder."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc import data
from llmc.artifact.verdict import MeasurementStatus
from llmc.config import Metric
from llmc.validate.generation import measure_generation
from llmc.validate.parity import Parity
from llmc.validate.quality import measure_quality
from llmc.validate.reference import TorchModel
from llmc.validate.session import OrtModel, shares_buffer

from .decoder import Variant
from .serving import tiny_tokenizer, write_artifact

SERVED = Variant(grouped=True, padding="right", logits="last")
PROMPTS = ("The sea", "def mean(values):", "Once", "A list of", "Water boils")


@pytest.mark.parametrize("share", [False, True], ids=["growing", "shared"])
def test_equal_text(llama: Any, tmp_path: Path, share: bool) -> None:
    write_artifact(llama, tmp_path, SERVED, share_buffer=share)
    (found,) = measure_generation(tmp_path, TorchModel(llama), tiny_tokenizer(), PROMPTS)
    assert found.metric is Metric.GENERATE_EQUAL
    assert found.value == 1.0
    assert found.detail == "5 prompts, 32 new tokens each"
    assert "onnxruntime-genai" in found.where


def test_other_weights_give_other_text(llama: Any, tmp_path: Path) -> None:
    variant = Variant(**{**vars(SERVED), "scale_weight": ("model.layers.0.self_attn.o_proj.weight", -1.0)})
    write_artifact(llama, tmp_path, variant, share_buffer=False)
    (found,) = measure_generation(tmp_path, TorchModel(llama), tiny_tokenizer(), PROMPTS)
    assert found.value < 1.0
    assert "differs from new token" in found.detail


def test_other_tokens_are_unequal(llama: Any, tmp_path: Path) -> None:
    write_artifact(llama, tmp_path, SERVED, share_buffer=False)
    path = tmp_path / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    swapped = text.replace('"T": 54', '"T": 55').replace('"U": 55', '"U": 54')
    assert swapped != text
    path.write_text(swapped, encoding="utf-8")
    (found,) = measure_generation(tmp_path, TorchModel(llama), tiny_tokenizer(), PROMPTS)
    assert found.value == 0.8
    assert "'The sea' is encoded as" in found.detail


def test_end_token_stops_both(llama: Any, tmp_path: Path) -> None:
    """Equal with the same end token; an artifact that does not know the model's runs on and differs."""
    write_artifact(llama, tmp_path, SERVED, share_buffer=False)
    tokenizer = tiny_tokenizer()
    reference = TorchModel(llama)
    before = llama.generation_config.eos_token_id
    later = reference.greedy(np.array(tokenizer("Once")["input_ids"]), 4)
    try:
        llama.generation_config.eos_token_id = int(later[2])
        (ran_on,) = measure_generation(tmp_path, reference, tokenizer, ("Once",))
        assert ran_on.value == 0.0
        config = tmp_path / "genai_config.json"
        text = config.read_text(encoding="utf-8")
        config.write_text(text.replace('"eos_token_id": 2', f'"eos_token_id": {later[2]}'), encoding="utf-8")
        (stopped,) = measure_generation(tmp_path, reference, tokenizer, ("Once",))
        assert stopped.value == 1.0
    finally:
        llama.generation_config.eos_token_id = before


def test_folder_that_is_not_served(llama: Any, tmp_path: Path) -> None:
    write_artifact(llama, tmp_path, SERVED, share_buffer=False)
    (tmp_path / "genai_config.json").write_text("{}", encoding="utf-8")
    (found,) = measure_generation(tmp_path, TorchModel(llama), tiny_tokenizer(), PROMPTS)
    assert math.isnan(found.value)
    assert "cannot load" in found.detail


def test_every_metric_of_a_served_folder(mistral: Any, tmp_path: Path) -> None:
    """On the shipped text and in the cache mode that the folder is served in."""
    interface = write_artifact(mistral, tmp_path, SERVED, share_buffer=True)
    assert shares_buffer(tmp_path)
    model = OrtModel(tmp_path, interface, threads=1, share_buffer=True)
    reference, tokenizer = TorchModel(mistral), tiny_tokenizer()
    tokens = np.array(tokenizer(data.eval_text()[:3000])["input_ids"])
    made = (
        *Parity(model, reference, tokens).measure(),
        *measure_quality(model, reference, tokens, start=(1,)),
        *measure_generation(tmp_path, reference, tokenizer, PROMPTS),
    )
    assert {m.metric for m in made} == set(Metric) - {Metric.TTFT_RATIO, Metric.INTER_TOKEN_RATIO}
    assert all(m.status is MeasurementStatus.MEASURED and math.isfinite(m.value) for m in made)


def test_shipped_text_and_prompts() -> None:
    assert len(data.eval_text().split()) > 4000
    assert len(data.prompts()) == 8
    assert len(set(data.prompts())) == 8
