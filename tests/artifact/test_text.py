"""The pieces of a text that comes token by token are the text of all its tokens."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from llmc.artifact.store.codec import TextCodec
from llmc.artifact.text import TextKind, TextRecord, text_kinds
from llmc.errors import ConfigError
from tests.models import save_tiny_tokenizer
from tests.texts import edit, replace_tokenizer


@pytest.mark.parametrize("kind", ["bytes", "gemma", "llama2", "unigram", "wordpiece"])
def test_pieces_add_up_to_the_text_of_transformers(kind: str, tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    if kind != "bytes":
        replace_tokenizer(tmp_path, kind)
    edit(tmp_path / "tokenizer_config.json", clean_up_tokenization_spaces=kind == "wordpiece")
    original = AutoTokenizer.from_pretrained(tmp_path)
    codec = TextCodec(tmp_path, TextRecord(cleans_up=kind == "wordpiece"))
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(0, len(original), 30).tolist()
        stream = codec.stream()
        pieces = [*map(stream.step, ids), stream.finish()]
        assert "".join(pieces) == original.decode(ids, skip_special_tokens=True)


def test_a_character_waits_for_its_last_byte(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    replace_tokenizer(tmp_path, "gemma")
    codec = TextCodec(tmp_path, TextRecord())
    stream = codec.stream()
    pieces = [stream.step(token) for token in codec.encode("ï x")]
    assert pieces == ["", "", "", "ï ", "x"]


def test_kinds_of_texts() -> None:
    assert text_kinds("plain", ["<s>"]) == set()
    assert text_kinds(" e\u0301<s>", ["<s>"]) == set(TextKind)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read") as caught:
        TextCodec(tmp_path, TextRecord())
    assert caught.value.hint == "build the artifact again"
