"""Digest, tokenizer, generation config and reference of an opened checkpoint."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoTokenizer

from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.digest import digest_files
from llmc.errors import CheckpointError
from tests.checkpoint.tiny_gguf import write_gguf
from tests.models import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama", tokenizer=True)


def test_describes_itself(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.name == "tiny-llama"
    assert checkpoint.path == folder
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert [f.name for f in checkpoint.weight_files] == ["model.safetensors"]
    assert checkpoint.generation_config().eos_token_id == 2


def test_digest_changes_with_each_file_and_with_nothing_else(folder: Path, tmp_path: Path) -> None:
    digest = open_checkpoint(str(folder)).digest()
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text("nothing of the model")
    copy = open_checkpoint(str(tmp_path))
    assert copy.digest() == digest
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(before + b" ")
        assert copy.digest() != digest
        (tmp_path / name).write_bytes(before)
    assert copy.digest() == digest


def test_digest_sees_every_part_of_a_large_file(tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as stream:
        stream.truncate(130 << 20)
    seen = {digest_files([file])}
    for offset in (0, (64 << 20) - 1, 64 << 20, (130 << 20) - 1):
        with file.open("r+b") as stream:
            stream.seek(offset)
            stream.write(b"x")
        seen.add(digest_files([file]))
    assert len(seen) == 5


def test_tokenizer_of_a_folder_is_copied(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    checkpoint.require_tokenizer()
    written = checkpoint.save_tokenizer(tmp_path / "out")
    assert {file.name for file in written} >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    for file in written:
        assert file.read_bytes() == (folder / file.name).read_bytes()
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.decode(tokenizer("the lazy dog")["input_ids"]) == "the lazy dog"


def test_tokenizer_of_a_gguf_is_converted_to_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        checkpoint = open_checkpoint(str(write_gguf(tmp_path / name / f"{name}.gguf")))
        checkpoint.save_tokenizer(tmp_path / name / "out")
    first = {f.name: f.read_bytes() for f in (tmp_path / "one" / "out").iterdir()}
    second = {f.name: f.read_bytes() for f in (tmp_path / "two" / "out").iterdir()}
    assert first == second
    assert set(first) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    # Not how it was loaded, and no path of this machine.
    loading = {"is_local", "local_files_only", "name_or_path", "gguf_file"}
    assert not loading & set(json.loads(first["tokenizer_config.json"]))
    assert json.loads(first["special_tokens_map.json"])["bos_token"] == "<s>"
    saved = AutoTokenizer.from_pretrained(tmp_path / "one" / "out")
    assert saved("ab c")["input_ids"] == checkpoint.tokenizer()("ab c")["input_ids"] != []


def test_tokenizer_missing(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model("llama", tmp_path)))
    for use in (
        checkpoint.require_tokenizer,
        checkpoint.tokenizer,
        lambda: checkpoint.save_tokenizer(tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match="has no tokenizer") as caught:
            use()
        assert "tokenizer.json" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_tokenizer_damaged(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model("llama", tmp_path, tokenizer=True)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be read"):
        checkpoint.tokenizer()


def test_generation_config_damaged(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model("llama", tmp_path)))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not JSON"):
        checkpoint.generation_config()


@pytest.mark.parametrize(("stated", "attention"), [("eager", "eager"), (None, "sdpa")])
def test_reference_is_float32_in_eval_mode(
    stated: Literal["eager"] | None, attention: str, folder: Path
) -> None:
    model = open_checkpoint(str(folder)).load_reference(stated)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == attention
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 256)


def test_a_model_without_attention_is_loaded_as_transformers_chooses(tmp_path: Path) -> None:
    folder = save_tiny_model("mamba", tmp_path, state_size=8, time_step_rank=8)
    model = open_checkpoint(str(folder)).load_reference(None)
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 256)


def test_importing_the_station_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "gguf")
    code = f"import sys, llmc.checkpoint; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
