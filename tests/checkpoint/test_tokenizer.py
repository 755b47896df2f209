"""Tokenizers that cannot be loaded here."""

import sys
from pathlib import Path

import pytest

from llmc.checkpoint.tokenizer import require_tokenizer
from llmc.errors import ResourceError


def test_sentencepiece_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ResourceError, match=r"is a SentencePiece model, but .* not installed") as caught:
        require_tokenizer(tmp_path)
    assert caught.value.hint == "pip install sentencepiece"
    (tmp_path / "tokenizer.model").write_text("IQ== 0\n")  # tiktoken's
    require_tokenizer(tmp_path)
