"""The evaluation text, its tokens, and where the original's rotary embedding changes."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmc.data import eval_text
from llmc.errors import ConfigError
from llmc.pipeline.steps.original import read_text, tokenize
from tests.models import save_tiny_tokenizer


def test_several_files_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone")  # with a byte order mark
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("zwei ü".encode())))
    assert read_text((str(tmp_path / "a"), "-")) == "one\n\nzwei ü"
    assert read_text(()) == eval_text()


def test_text_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Straße".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin is not UTF-8 at byte 4") as caught:
        read_text((str(tmp_path / "latin"),))
    assert "iconv" in str(caught.value.hint)


def test_text_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent cannot be read: No such file or directory"):
        read_text((str(tmp_path / "absent"),))


def test_empty_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_tokenizer(tmp_path))
    with pytest.raises(ConfigError, match="the evaluation text is empty"):
        tokenize(tokenizer, "")
