"""The evaluation text: files, standard input, and what cannot be read."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmc.data import eval_text
from llmc.errors import ConfigError
from llmc.evaluation import EvaluationText, read_text


def test_several_files_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone")  # with a byte order mark
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("zwei ü".encode())))
    names = (str(tmp_path / "a"), "-")
    assert read_text(names) == EvaluationText(text="one\n\nzwei ü", names=names)
    assert read_text(()) == EvaluationText(text=eval_text())


def test_text_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Straße".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin is not UTF-8 at byte 4") as caught:
        read_text((str(tmp_path / "latin"),))
    assert "iconv" in str(caught.value.hint)


def test_text_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent cannot be read: No such file or directory"):
        read_text((str(tmp_path / "absent"),))
