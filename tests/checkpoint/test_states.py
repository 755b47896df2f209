"""Models that keep their state elsewhere than in a cache of transformers."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from llmc.errors import UnsupportedError
from tests.checkpoint.refusals import refused


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("rwkv", r"RwkvForCausalLM keeps a state of its own \(state\)"),
        ("xlnet", r"XLNetLMHeadModel keeps a state of its own \(mems\)"),
        ("xlstm", "xLSTMForCausalLM keeps its state in a xLSTMCache of its own"),
        ("xlm", "XLMWithLMHeadModel keeps its state in a dict of its own"),
        ("openai-gpt", "OpenAIGPTLMHeadModel keeps nothing between steps"),
        (
            "deepseek_v4",
            "keeps the state of layers 0-2, 4, 6.* in .* of its own, DeepseekV4HCACache",
        ),
    ],
)
def test_a_state_elsewhere(model_type: str, message: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    error = refused(tmp_path, message, UnsupportedError)
    assert "Cache" in str(error.hint)
