"""Which tokens end a text: written for engines, read back."""

from pathlib import Path

import pytest
from transformers import GenerationConfig, LlamaConfig

from llmc.backends.special_tokens import GENERATION_CONFIG, read_stop_tokens, write_generation_config
from llmc.errors import ConfigError


def test_written_and_read_back(tmp_path: Path) -> None:
    stated = GenerationConfig(eos_token_id=[7, 300], pad_token_id=3)
    write_generation_config(tmp_path, LlamaConfig(bos_token_id=1), stated, 256)
    assert read_stop_tokens(tmp_path) == (7,)  # 300 is outside of the vocabulary
    assert GenerationConfig.from_pretrained(tmp_path).pad_token_id == 3
    (tmp_path / GENERATION_CONFIG).write_text('{"eos_token_id": 5}')
    assert read_stop_tokens(tmp_path) == (5,)


def test_no_end_is_none(tmp_path: Path) -> None:
    nothing = LlamaConfig(eos_token_id=None, bos_token_id=None)
    write_generation_config(tmp_path, nothing, GenerationConfig(), 256)
    assert read_stop_tokens(tmp_path) == ()


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_damaged_file_is_named(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / GENERATION_CONFIG).write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json cannot be read: ") as caught:
        read_stop_tokens(tmp_path)
    assert caught.value.hint == "build the artifact again"
