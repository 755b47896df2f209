"""What onnxruntime-genai makes of a tokenizer is asked once."""

from pathlib import Path

import pytest

from llmc.backends.onnxruntime import tokenizer_worker
from llmc.backends.onnxruntime.runtime_tokenizer import try_runtime_tokenizer, write_runtime_settings
from llmc.backends.onnxruntime.tokenizer_worker import TokenizerQuestion
from tests.models import save_tiny_tokenizer


def test_an_answer_is_kept_by_files_and_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    folder = save_tiny_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write_runtime_settings(folder, tokenizer, "TokenizersBackend", None, before=False, after=False)
    question = TokenizerQuestion(texts=["the fox"], ids=[], chats=[])
    first = try_runtime_tokenizer(folder, question).encode("the fox", special=False)
    assert first == tokenizer("the fox", add_special_tokens=False)["input_ids"]

    asked: list[TokenizerQuestion] = []
    original = tokenizer_worker.ask_runtime
    monkeypatch.setattr(
        tokenizer_worker, "ask_runtime", lambda inside, q: (asked.append(q), original(inside, q))[1]
    )
    assert try_runtime_tokenizer(folder, question).encode("the fox", special=False) == first
    assert asked == []
    try_runtime_tokenizer(folder, TokenizerQuestion(texts=["a dog"], ids=[], chats=[]))
    write_runtime_settings(folder, tokenizer, "TokenizersBackend", None, before=True, after=False)
    try_runtime_tokenizer(folder, question)
    assert len(asked) == 2
