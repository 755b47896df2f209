"""Models that are no causal language models over text alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc.errors import UnsupportedError
from tests.checkpoint.refusals import refused


@pytest.mark.parametrize(
    ("model_type", "name", "purpose"),
    [
        ("llama", "LlamaForSequenceClassification", "classifies texts or scores them"),
        ("qwen2", "Qwen2ForRewardModel", "reward model"),
        ("qwen2", "Qwen2ForTokenClassification", "classifies tokens"),
        ("mistral", "MistralModel", r"no language model head \(an embedding model\)"),
        ("vit", "ViTModel", "no language model head$"),
        ("xlm-roberta", "XLMRobertaModel", r"no language model head \(an embedding model\)"),
        ("vibevoice", "VibeVoiceForConditionalGeneration", "generates sound"),
        ("llama", "SomeCrossEncoder", "ranks texts"),
        ("llama", "LlamaBidirectionalModel", "reads a text in both directions"),
        ("mistral", "MistralBiForMNTP", "reads a text in both directions"),
    ],
)
def test_other_purpose_by_architecture(model_type: str, name: str, purpose: str, tmp_path: Path) -> None:
    config = {"model_type": model_type, "architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, f"holds a {name}, which .*{purpose}", UnsupportedError)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen2", "is_causal": False},
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
    ],
)
def test_attention_in_both_directions(fields: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    refused(tmp_path, "attends in both directions", UnsupportedError)


@pytest.mark.parametrize(
    "file", ["modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"]
)
def test_embedding_model_by_its_files(file: str, llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("[]")
    refused(folder, f"sentence-transformers .it has {file}", UnsupportedError)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"model_type": "idefics", "num_hidden_layers": 4, "cross_layer_interval": 2}, "layers 0, 2"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "every layer"),
    ],
)
def test_cross_attention(config: dict[str, object], layers: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, f"{config['model_type']} has cross-attention in {layers}", UnsupportedError)
