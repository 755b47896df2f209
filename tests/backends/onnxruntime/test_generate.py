"""Text and tokens through onnxruntime-genai."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from transformers import GenerationConfig, LlamaConfig

from llmc.artifact.text import TextRecord
from llmc.backends.model_file import write_model
from llmc.backends.onnxruntime.genai import write_genai_config
from llmc.backends.onnxruntime.generate import generate_text, generate_tokens
from llmc.config import Provider
from llmc.errors import ConfigError, ExitCode, ResourceError
from llmc.graph.interface import Interface

MakeCounter = Callable[..., tuple[ir.Model, Interface]]

TEMPLATE = (
    "{% for message in messages %}b{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}c{% endif %}"
)


@pytest.fixture
def artifact(tmp_path: Path, make_counter: MakeCounter, tokenizer_files: Callable[..., None]) -> Path:
    """The counting decoder with a tokenizer of letters: token 1 is `a`; 31 ends a text."""
    model, interface = make_counter()
    write_model(model, tmp_path)
    tokenizer_files(tmp_path)
    generation = GenerationConfig(eos_token_id=31, pad_token_id=0)
    write_genai_config(tmp_path, LlamaConfig(), generation, interface, Provider.CPU, 1, share_cache=False)
    return tmp_path


def text(folder: Path, prompt: str, tokens: int, chat: bool = False) -> list[str]:
    pieces: list[str] = []
    generate_text(folder, prompt, tokens, pieces.append, TextRecord(chat=chat))
    return pieces


def test_text_comes_piece_by_piece(artifact: Path) -> None:
    assert text(artifact, "abc", 4) == ["f", "l", "x", "p"]  # 1 + 2 + 3 is 6, 12, 24, 48 - 32


def test_tokens_stop_where_asked_and_leave_out_the_end(artifact: Path) -> None:
    assert generate_tokens(artifact, [1, 2, 3], 2) == [6, 12]
    assert generate_tokens(artifact, [30, 1], 5) == []


def test_the_context_ends_the_text(artifact: Path) -> None:
    assert len(generate_tokens(artifact, [1] * 60, 100)) == 4
    with pytest.raises(ConfigError, match=r"the prompt has 64 tokens, but .* has a context of 64") as caught:
        generate_tokens(artifact, [1] * 64, 1)
    assert caught.value.hint == "shorten the prompt"


def test_less_than_one_token_is_refused(artifact: Path) -> None:
    with pytest.raises(ConfigError, match="0 new tokens are requested") as caught:
        generate_tokens(artifact, [1], 0)
    assert caught.value.hint == "request 1 or more"


def test_an_empty_prompt_is_refused(artifact: Path) -> None:
    with pytest.raises(ConfigError, match="the prompt has no tokens"):
        text(artifact, "", 1)


def test_the_chat_template_is_applied_where_there_is_one(
    artifact: Path, tokenizer_files: Callable[..., None]
) -> None:
    tokenizer_files(artifact, TEMPLATE)
    assert text(artifact, "a", 1, chat=True) == ["f"]  # b, a and c are 2 + 1 + 3
    assert text(artifact, "a", 1, chat=False) == ["a"]


def test_penalties_and_sampling_of_the_config_are_off(artifact: Path) -> None:
    path = artifact / "genai_config.json"
    config = json.loads(path.read_text())
    config["search"] |= {"do_sample": True, "temperature": 9.0, "top_k": 32, "repetition_penalty": 5.0}
    path.write_text(json.dumps(config))
    assert all(generate_tokens(artifact, [1, 2, 3], 6) == [6, 12, 24, 16, 0, 0] for _ in range(3))


def test_a_single_end_of_sequence_may_be_a_number(artifact: Path) -> None:
    path = artifact / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["eos_token_id"] = 24
    path.write_text(json.dumps(config))
    assert generate_tokens(artifact, [1, 2, 3], 6) == [6, 12]


def test_a_folder_that_cannot_be_served_is_named(artifact: Path) -> None:
    (artifact / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="onnxruntime-genai cannot run") as caught:
        generate_tokens(artifact, [1], 1)
    assert caught.value.hint == "llmc verify finds what is wrong with it"
    (artifact / "genai_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"genai_config\.json is damaged"):
        generate_tokens(artifact, [1], 1)
    (artifact / "genai_config.json").unlink()
    with pytest.raises(ConfigError, match=r"cannot be served: it has no genai_config\.json"):
        generate_tokens(artifact, [1], 1)


def test_a_missing_runtime_is_a_resource_error(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(
        ResourceError, match="onnxruntime-genai, which runs artifacts, cannot be imported"
    ) as caught:
        generate_tokens(artifact, [1], 1)
    assert caught.value.exit_code is ExitCode.RESOURCES
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("pip install onnxruntime-genai")


def test_an_artifact_for_cuda_asks_for_a_gpu(
    artifact: Path, make_counter: MakeCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.path.exists("/dev/nvidiactl"):  # the driver is there: hide it from the loader
        monkeypatch.setattr("ctypes.CDLL", refuse)
    _, interface = make_counter()
    generation = GenerationConfig(eos_token_id=31, pad_token_id=0)
    write_genai_config(artifact, LlamaConfig(), generation, interface, Provider.CUDA, None, share_cache=False)
    with pytest.raises(ResourceError, match="is built for CUDA: this machine has no NVIDIA GPU") as caught:
        generate_tokens(artifact, [1], 1)
    assert caught.value.exit_code is ExitCode.RESOURCES


def refuse(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")
