"""What llmc reads is held against transformers' own loader."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.agreement import Agreement
from llmc.checkpoint.safetensors import SafetensorsStore
from tests.checkpoint.quantized_folders import gptq_config, pack_gptq, write_codes
from tests.checkpoint.tiny_gguf import write_gguf
from tests.models import save_tiny_model

NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_a_folder_is_read_alike(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model(model_type, tmp_path)))
    everything = len(checkpoint.tensors.infos()) + len(checkpoint.tied)
    assert checkpoint.compare_loaders() == Agreement((), everything)


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe", "lfm2"])
def test_a_gguf_is_read_alike(architecture: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", architecture)
    capfd.readouterr()
    agreement = open_checkpoint(str(file)).compare_loaders()
    assert capfd.readouterr().err == ""
    assert (agreement.mismatches, agreement.left_out) == ((), "")
    assert agreement.compared > 15


def test_a_mistake_of_our_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model("llama", tmp_path)))
    read = SafetensorsStore.read

    def swapped(self: SafetensorsStore, name: str, *rows: Any) -> np.ndarray:
        return read(self, name, *rows)[::-1].copy() if name == NAME else read(self, name, *rows)

    monkeypatch.setattr(SafetensorsStore, "read", swapped)
    (mismatch,) = checkpoint.compare_loaders().mismatches
    assert mismatch == f"4096 of 4096 values of {NAME} differ"


def test_what_transformers_cannot_read_is_not_compared(tmp_path: Path) -> None:
    file = save_tiny_model("llama", tmp_path) / "model.safetensors"
    save_file({f"module.{name}": value for name, value in load_file(file).items()}, file)
    agreement = open_checkpoint(str(tmp_path)).compare_loaders()
    assert agreement.compared == 0
    assert "a wrapper was saved with the model" in agreement.left_out


def test_codes_that_transformers_keeps_are_no_mismatch(tmp_path: Path) -> None:
    write_codes(tmp_path, gptq_config(), pack_gptq())
    agreement = open_checkpoint(str(tmp_path)).compare_loaders()
    assert agreement.mismatches == ()
    assert "transformers" in agreement.left_out
